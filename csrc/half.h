/* half.h - single values of f16 and bf16 to f32 and back, for the core and the kernels. */
#ifndef BTX_HALF_H
#define BTX_HALF_H

#include <stdint.h>
#include <string.h>

static inline uint32_t btx_f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float btx_f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float btx_bf16_to_f32(uint16_t value)
{
    return btx_f32_from_bits((uint32_t)value << 16);
}

/* Nearest, ties to even; a NaN stays a NaN (made quiet). */
static inline uint16_t btx_f32_to_bf16(float value)
{
    uint32_t bits = btx_f32_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline float btx_f16_to_f32(uint16_t value)
{
    uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
    uint32_t magnitude = value & 0x7fffu;
    if (magnitude >= 0x7c00u) { /* infinity; NaN, made quiet */
        return btx_f32_from_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 |
                                 (magnitude > 0x7c00u ? 0x400000u : 0u));
    }
    if (magnitude >= 0x400u)
        return btx_f32_from_bits(sign | (magnitude + (112u << 10)) << 13);
    float subnormal = (float)magnitude * 0x1p-24f;
    return btx_f32_from_bits(sign | btx_f32_bits(subnormal));
}

/* Nearest, ties to even; overflow is infinity; a NaN stays a NaN (made quiet). */
static inline uint16_t btx_f32_to_f16(float value)
{
    uint32_t bits = btx_f32_bits(value);
    uint32_t sign = bits >> 16 & 0x8000u;
    uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return (uint16_t)(sign | 0x7e00u | (magnitude >> 13 & 0x3ffu));
    if (magnitude >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00u); /* from 65520 on */
    if (magnitude < 0x38800000u) {         /* below 2^-14: adding 0.5 leaves the subnormal's bits in the last place */
        float sum = btx_f32_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (btx_f32_bits(sum) - 0x3f000000u));
    }
    magnitude += 0xfffu + (magnitude >> 13 & 1u);
    return (uint16_t)(sign | (magnitude - 0x38000000u) >> 13);
}

#endif /* BTX_HALF_H */
