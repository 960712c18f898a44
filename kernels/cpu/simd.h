/* simd.h - the vector vocabulary of the CPU operations, one meaning on every instruction set.
 *
 * A variant file sets BTX_VL, the f32 lanes of a vector, before this file is included:
 *
 *     BTX_VL   vf            instruction set
 *     1        float         portable C11
 *     4        float32x4_t   NEON, as every aarch64 has it
 *     8        __m256        AVX2, FMA, F16C
 *     16       __m512        AVX-512 F, BW, VL, DQ
 *
 * The _n forms touch the first n lanes only, 0 <= n <= BTX_VL: memory behind them is neither read nor written,
 * and the lanes behind them load as zero. Every function treats all lanes alike, so a value does not depend on
 * the lane it is computed in, nor on whether that was a tail.
 */
#ifndef BTX_SIMD_H
#define BTX_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "half.h"

#ifndef BTX_VL
#error "set BTX_VL to 1, 4, 8 or 16 before including simd.h"
#endif

#if BTX_VL == 4
#include <arm_neon.h>
#elif BTX_VL != 1
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define BTX_INLINE static inline __attribute__((always_inline))
#define BTX_UNROLL _Pragma("GCC unroll 16")
#else
#define BTX_INLINE static inline
#define BTX_UNROLL
#endif

/* ---- vectors ------------------------------------------------------------------------------------ */

/* vf_max(a, b) and vf_min(a, b) give b when either is NaN, or when they are equal (zeros of two signs). vf_round gives
 * the nearest integer, ties to even; vf_scale2(a, n) gives a * 2^n of whole n in [-160, 160], rounded once where a is
 * zero or |a| >= 2^-46; vf_select_nonzero(switches, a, b) gives a where switches is not zero (a NaN is not), else b. */

#if BTX_VL == 4

typedef float32x4_t vf;

static inline vf vf_zero(void)
{
    return vdupq_n_f32(0.0f);
}
static inline vf vf_set1(float value)
{
    return vdupq_n_f32(value);
}
static inline vf vf_load(const float *from)
{
    return vld1q_f32(from);
}
/* NEON has no masks: the _n forms take a tail lane by lane. */
static inline vf vf_load_n(const float *from, int n)
{
    if (n == BTX_VL)
        return vld1q_f32(from);
    vf a = vf_zero();
    if (n > 0)
        a = vld1q_lane_f32(from, a, 0);
    if (n > 1)
        a = vld1q_lane_f32(from + 1, a, 1);
    if (n > 2)
        a = vld1q_lane_f32(from + 2, a, 2);
    return a;
}
static inline void vf_store(float *to, vf a)
{
    vst1q_f32(to, a);
}
static inline void vf_store_n(float *to, vf a, int n)
{
    if (n == BTX_VL) {
        vst1q_f32(to, a);
        return;
    }
    if (n > 0)
        vst1q_lane_f32(to, a, 0);
    if (n > 1)
        vst1q_lane_f32(to + 1, a, 1);
    if (n > 2)
        vst1q_lane_f32(to + 2, a, 2);
}

static inline vf vf_add(vf a, vf b)
{
    return vaddq_f32(a, b);
}
static inline vf vf_sub(vf a, vf b)
{
    return vsubq_f32(a, b);
}
static inline vf vf_mul(vf a, vf b)
{
    return vmulq_f32(a, b);
}
static inline vf vf_div(vf a, vf b)
{
    return vdivq_f32(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    return vfmaq_f32(c, a, b);
}
/* Not vmaxq and vminq: those give NaN when either is. */
static inline vf vf_max(vf a, vf b)
{
    return vbslq_f32(vcgtq_f32(a, b), a, b);
}
static inline vf vf_min(vf a, vf b)
{
    return vbslq_f32(vcltq_f32(a, b), a, b);
}
static inline vf vf_select_nonzero(vf switches, vf a, vf b)
{
    return vbslq_f32(vceqq_f32(switches, vdupq_n_f32(0.0f)), b, a);
}
static inline float vf_reduce_add(vf a)
{
    return vaddvq_f32(a);
}
static inline float vf_reduce_max(vf a)
{
    return vmaxvq_f32(a);
}

static inline vf vf_round(vf a)
{
    return vrndnq_f32(a);
}
/* In two steps of half the exponent, of which only the second can round. */
static inline vf vf_scale2(vf a, vf n)
{
    const int32x4_t bias = vdupq_n_s32(127);
    int32x4_t whole = vcvtq_s32_f32(n);
    int32x4_t first = vshrq_n_s32(whole, 1);
    int32x4_t second = vsubq_s32(whole, first);
    a = vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(first, bias), 23)));
    return vmulq_f32(a, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(second, bias), 23)));
}

static inline vf vf_from_f16(uint16x4_t halves)
{
    return vcvt_f32_f16(vreinterpret_f16_u16(halves));
}
static inline vf vf_from_bf16(uint16x4_t halves)
{
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}
static inline uint16x4_t vf_to_f16(vf a)
{
    return vreinterpret_u16_f16(vcvt_f16_f32(a));
}
/* By integers: the instructions for bf16 are an extension. */
static inline uint16x4_t vf_to_bf16(vf a)
{
    uint32x4_t bits = vreinterpretq_u32_f32(a);
    uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16);
}

/* The two bf16 of each 32-bit lane. */
static inline vf vf_bf16_low(vf pairs)
{
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pairs), 16));
}
static inline vf vf_bf16_high(vf pairs)
{
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pairs), vdupq_n_u32(0xffff0000u)));
}

static inline uint16x4_t vf_halves(const uint16_t *from)
{
    return vld1_u16(from);
}
static inline uint16x4_t vf_halves_n(const uint16_t *from, int n)
{
    if (n == BTX_VL)
        return vld1_u16(from);
    uint16x4_t a = vdup_n_u16(0);
    if (n > 0)
        a = vld1_lane_u16(from, a, 0);
    if (n > 1)
        a = vld1_lane_u16(from + 1, a, 1);
    if (n > 2)
        a = vld1_lane_u16(from + 2, a, 2);
    return a;
}
static inline void vf_put_halves(uint16_t *to, uint16x4_t a)
{
    vst1_u16(to, a);
}
static inline void vf_put_halves_n(uint16_t *to, uint16x4_t a, int n)
{
    if (n == BTX_VL) {
        vst1_u16(to, a);
        return;
    }
    if (n > 0)
        vst1_lane_u16(to, a, 0);
    if (n > 1)
        vst1_lane_u16(to + 1, a, 1);
    if (n > 2)
        vst1_lane_u16(to + 2, a, 2);
}

#elif BTX_VL == 16

typedef __m512 vf;

static inline __mmask16 vf_first(int n)
{
    return (__mmask16)((1u << n) - 1u);
}

static inline vf vf_zero(void)
{
    return _mm512_setzero_ps();
}
static inline vf vf_set1(float value)
{
    return _mm512_set1_ps(value);
}
static inline vf vf_load(const float *from)
{
    return _mm512_loadu_ps(from);
}
static inline vf vf_load_n(const float *from, int n)
{
    return _mm512_maskz_loadu_ps(vf_first(n), from);
}
static inline void vf_store(float *to, vf a)
{
    _mm512_storeu_ps(to, a);
}
static inline void vf_store_n(float *to, vf a, int n)
{
    _mm512_mask_storeu_ps(to, vf_first(n), a);
}

static inline vf vf_add(vf a, vf b)
{
    return _mm512_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b)
{
    return _mm512_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b)
{
    return _mm512_mul_ps(a, b);
}
static inline vf vf_div(vf a, vf b)
{
    return _mm512_div_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    return _mm512_fmadd_ps(a, b, c);
}
static inline vf vf_max(vf a, vf b)
{
    return _mm512_max_ps(a, b);
}
static inline vf vf_min(vf a, vf b)
{
    return _mm512_min_ps(a, b);
}
static inline vf vf_select_nonzero(vf switches, vf a, vf b)
{
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(switches, vf_zero(), _CMP_NEQ_UQ), a);
}
static inline float vf_reduce_add(vf a)
{
    return _mm512_reduce_add_ps(a);
}
static inline float vf_reduce_max(vf a)
{
    return _mm512_reduce_max_ps(a);
}

static inline vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline vf vf_scale2(vf a, vf n)
{
    return _mm512_scalef_ps(a, n);
}

static inline vf vf_from_f16(__m256i halves)
{
    return _mm512_cvtph_ps(halves);
}
static inline vf vf_from_bf16(__m256i halves)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
static inline __m256i vf_to_f16(vf a)
{
    return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* Not vcvtneps2bf16: that one flushes subnormals. */
static inline __m256i vf_to_bf16(vf a)
{
    __m512i bits = _mm512_castps_si512(a);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

/* The two bf16 of each 32-bit lane. */
static inline vf vf_bf16_low(vf pairs)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs), 16));
}
static inline vf vf_bf16_high(vf pairs)
{
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs), _mm512_set1_epi32((int)0xffff0000u)));
}

static inline __m256i vf_halves(const uint16_t *from)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)from);
}
static inline __m256i vf_halves_n(const uint16_t *from, int n)
{
    return _mm256_maskz_loadu_epi16(vf_first(n), from);
}
static inline void vf_put_halves(uint16_t *to, __m256i a)
{
    _mm256_storeu_si256((__m256i *)(void *)to, a);
}
static inline void vf_put_halves_n(uint16_t *to, __m256i a, int n)
{
    _mm256_mask_storeu_epi16(to, vf_first(n), a);
}

#elif BTX_VL == 8

typedef __m256 vf;

static inline __m256i vf_first(int n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

static inline vf vf_zero(void)
{
    return _mm256_setzero_ps();
}
static inline vf vf_set1(float value)
{
    return _mm256_set1_ps(value);
}
static inline vf vf_load(const float *from)
{
    return _mm256_loadu_ps(from);
}
static inline vf vf_load_n(const float *from, int n)
{
    return _mm256_maskload_ps(from, vf_first(n));
}
static inline void vf_store(float *to, vf a)
{
    _mm256_storeu_ps(to, a);
}
/* A masked store is slow microcode on AMD's cores, and most are of whole vectors or of nothing. */
static inline void vf_store_n(float *to, vf a, int n)
{
    if (n == BTX_VL)
        _mm256_storeu_ps(to, a);
    else if (n > 0)
        _mm256_maskstore_ps(to, vf_first(n), a);
}

static inline vf vf_add(vf a, vf b)
{
    return _mm256_add_ps(a, b);
}
static inline vf vf_sub(vf a, vf b)
{
    return _mm256_sub_ps(a, b);
}
static inline vf vf_mul(vf a, vf b)
{
    return _mm256_mul_ps(a, b);
}
static inline vf vf_div(vf a, vf b)
{
    return _mm256_div_ps(a, b);
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    return _mm256_fmadd_ps(a, b, c);
}
static inline vf vf_max(vf a, vf b)
{
    return _mm256_max_ps(a, b);
}
static inline vf vf_min(vf a, vf b)
{
    return _mm256_min_ps(a, b);
}
static inline vf vf_select_nonzero(vf switches, vf a, vf b)
{
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(switches, vf_zero(), _CMP_NEQ_UQ));
}

static inline float vf_reduce_add(vf a)
{
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
static inline float vf_reduce_max(vf a)
{
    __m128 max = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    max = _mm_max_ps(max, _mm_movehl_ps(max, max));
    return _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
}

static inline vf vf_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* In two steps of half the exponent, of which only the second can round. */
static inline vf vf_scale2(vf a, vf n)
{
    const __m256i bias = _mm256_set1_epi32(127);
    __m256i whole = _mm256_cvtps_epi32(n);
    __m256i first = _mm256_srai_epi32(whole, 1);
    __m256i second = _mm256_sub_epi32(whole, first);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}

static inline vf vf_from_f16(__m128i halves)
{
    return _mm256_cvtph_ps(halves);
}
static inline vf vf_from_bf16(__m128i halves)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
static inline __m128i vf_to_f16(vf a)
{
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline __m128i vf_to_bf16(vf a)
{
    __m256i bits = _mm256_castps_si256(a);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

static inline vf vf_bf16_low(vf pairs)
{
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs), 16));
}
static inline vf vf_bf16_high(vf pairs)
{
    /* Shifts need no register for a mask: AVX2 has none to spare in tile.h. */
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_srli_epi32(_mm256_castps_si256(pairs), 16), 16));
}

static inline __m128i vf_halves(const uint16_t *from)
{
    return _mm_loadu_si128((const __m128i *)(const void *)from);
}
static inline __m128i vf_halves_n(const uint16_t *from, int n)
{
    uint16_t lanes[BTX_VL] = {0};
    for (int i = 0; i < n; i++)
        lanes[i] = from[i];
    return vf_halves(lanes);
}
static inline void vf_put_halves(uint16_t *to, __m128i a)
{
    _mm_storeu_si128((__m128i *)(void *)to, a);
}
static inline void vf_put_halves_n(uint16_t *to, __m128i a, int n)
{
    uint16_t lanes[BTX_VL];
    vf_put_halves(lanes, a);
    for (int i = 0; i < n; i++)
        to[i] = lanes[i];
}

#elif BTX_VL == 1

typedef float vf;

static inline vf vf_zero(void)
{
    return 0.0f;
}
static inline vf vf_set1(float value)
{
    return value;
}
static inline vf vf_load(const float *from)
{
    return *from;
}
static inline vf vf_load_n(const float *from, int n)
{
    return n > 0 ? *from : 0.0f;
}
static inline void vf_store(float *to, vf a)
{
    *to = a;
}
static inline void vf_store_n(float *to, vf a, int n)
{
    if (n > 0)
        *to = a;
}

static inline vf vf_add(vf a, vf b)
{
    return a + b;
}
static inline vf vf_sub(vf a, vf b)
{
    return a - b;
}
static inline vf vf_mul(vf a, vf b)
{
    return a * b;
}
static inline vf vf_div(vf a, vf b)
{
    return a / b;
}
/* Fused or not, as the compiler finds cheap: fmaf is a library call on plain x86-64. */
static inline vf vf_fma(vf a, vf b, vf c)
{
    return a * b + c;
}
static inline vf vf_max(vf a, vf b)
{
    return a > b ? a : b;
}
static inline vf vf_min(vf a, vf b)
{
    return a < b ? a : b;
}
static inline vf vf_select_nonzero(vf switches, vf a, vf b)
{
    return switches != 0.0f ? a : b;
}
static inline float vf_reduce_add(vf a)
{
    return a;
}
static inline float vf_reduce_max(vf a)
{
    return a;
}

/* rintf is a call, on plain x86-64, that only large values need. */
static inline vf vf_round(vf a)
{
    return a > -0x1p22f && a < 0x1p22f ? (a + 0x1.8p23f) - 0x1.8p23f : rintf(a);
}
static inline vf vf_scale2(vf a, vf n)
{
    int32_t whole = n == n ? (int32_t)n : 0; /* a NaN has no int32 */
    int32_t first = whole / 2, second = whole - first;
    a *= btx_f32_from_bits((uint32_t)(first + 127) << 23);
    return a * btx_f32_from_bits((uint32_t)(second + 127) << 23);
}

static inline vf vf_from_f16(uint16_t half)
{
    return btx_f16_to_f32(half);
}
static inline vf vf_from_bf16(uint16_t half)
{
    return btx_bf16_to_f32(half);
}
static inline uint16_t vf_to_f16(vf a)
{
    return btx_f32_to_f16(a);
}
static inline uint16_t vf_to_bf16(vf a)
{
    return btx_f32_to_bf16(a);
}

static inline vf vf_bf16_low(vf pairs)
{
    return btx_f32_from_bits(btx_f32_bits(pairs) << 16);
}
static inline vf vf_bf16_high(vf pairs)
{
    return btx_f32_from_bits(btx_f32_bits(pairs) & 0xffff0000u);
}

static inline uint16_t vf_halves(const uint16_t *from)
{
    return *from;
}
static inline uint16_t vf_halves_n(const uint16_t *from, int n)
{
    return n > 0 ? *from : 0;
}
static inline void vf_put_halves(uint16_t *to, uint16_t a)
{
    *to = a;
}
static inline void vf_put_halves_n(uint16_t *to, uint16_t a, int n)
{
    if (n > 0)
        *to = a;
}

#else
#error "BTX_VL must be 1, 4, 8 or 16"
#endif

/* Brings the cache line at from nearer, into the second level; any address is fine. A macro, because GCC takes a
 * function that only prefetches for one without effects and drops the calls. */
#if BTX_VL == 1
#define vf_prefetch(from) ((void)(from))
#elif BTX_VL == 4
#define vf_prefetch(from) __builtin_prefetch((from), 0, 2)
#else
#define vf_prefetch(from) _mm_prefetch((const char *)(from), _MM_HINT_T1)
#endif

/* ---- f16 and bf16 in memory --------------------------------------------------------------------- */

/* Loads widen exactly; stores round to nearest even, as the single-value conversions above. */
static inline vf vf_load_f16(const uint16_t *from)
{
    return vf_from_f16(vf_halves(from));
}
static inline vf vf_load_bf16(const uint16_t *from)
{
    return vf_from_bf16(vf_halves(from));
}
static inline vf vf_load_f16_n(const uint16_t *from, int n)
{
    return vf_from_f16(vf_halves_n(from, n));
}
static inline vf vf_load_bf16_n(const uint16_t *from, int n)
{
    return vf_from_bf16(vf_halves_n(from, n));
}
static inline void vf_store_f16(uint16_t *to, vf a)
{
    vf_put_halves(to, vf_to_f16(a));
}
static inline void vf_store_bf16(uint16_t *to, vf a)
{
    vf_put_halves(to, vf_to_bf16(a));
}
static inline void vf_store_f16_n(uint16_t *to, vf a, int n)
{
    vf_put_halves_n(to, vf_to_f16(a), n);
}
static inline void vf_store_bf16_n(uint16_t *to, vf a, int n)
{
    vf_put_halves_n(to, vf_to_bf16(a), n);
}

/* ---- powers of two ---------------------------------------------------------------------------------------- */

/* 2^r of |r| <= 1/2, by a polynomial of degree 5: within 2^-22 of the true value, relatively. */
static inline vf vf_exp2_fraction(vf r)
{
    vf p = vf_set1(1.3276475e-3f);
    p = vf_fma(p, r, vf_set1(9.6755410e-3f));
    p = vf_fma(p, r, vf_set1(5.5507131e-2f));
    p = vf_fma(p, r, vf_set1(2.4022120e-1f));
    p = vf_fma(p, r, vf_set1(6.9314694e-1f));
    return vf_fma(p, r, vf_set1(1.0000001f));
}

/* 2^(t - reference) of a whole reference: within 2^-22 of the true value, relatively, down to about 2^-126, below which
 * it loses bits and ends as 0; infinity above 2^128. The fraction of t alone decides the significand: another reference
 * gives the same bits with another exponent. t below -2^23 is 0, NaN and -infinity give NaN, infinity NaN or infinity.
 */
static inline vf vf_exp2_from(vf t, vf reference)
{
    vf n = vf_round(t);
    vf p = vf_exp2_fraction(vf_sub(t, n)); /* the difference is exact */
    n = vf_max(vf_set1(-160.0f), vf_sub(n, reference));
#if BTX_VL != 16 /* that one's vf_scale2 takes any n, but makes 0 of NaN and -infinity */
    n = vf_min(vf_set1(160.0f), n);
#endif
    return vf_scale2(p, n);
}

/* The same of t in [-126, 126] or NaN, and reference 0, in fewer instructions. */
static inline vf vf_exp2_normal(vf t)
{
    vf n = vf_round(t), p = vf_exp2_fraction(vf_sub(t, n));
#if BTX_VL == 8 /* no result is subnormal, so n goes into the exponent; a NaN has none that it could change */
    __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
#elif BTX_VL == 4
    int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p), exponent));
#else
    return vf_scale2(p, n);
#endif
}

/* ---- many vectors at once ------------------------------------------------------------------------------- */

/* Lane i = the sum of the lanes of a[i], each by the same additions in the same order. */
#if BTX_VL == 16
static inline vf vf_reduce_add_each(const vf a[BTX_VL])
{
    vf quarter[4]; /* [i]: for each quarter of the lanes, the sums of a[4 i] ... a[4 i + 3] */
    BTX_UNROLL
    for (int i = 0; i < 4; i++) {
        const vf *b = a + 4 * i;
        __m512d ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(b[0], b[1]), _mm512_unpackhi_ps(b[0], b[1])));
        __m512d cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(b[2], b[3]), _mm512_unpackhi_ps(b[2], b[3])));
        quarter[i] =
            _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    }
    vf low = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[0], quarter[1], 0x88),
                           _mm512_shuffle_f32x4(quarter[0], quarter[1], 0xdd));
    vf high = _mm512_add_ps(_mm512_shuffle_f32x4(quarter[2], quarter[3], 0x88),
                            _mm512_shuffle_f32x4(quarter[2], quarter[3], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
#elif BTX_VL == 8
static inline vf vf_reduce_add_each(const vf a[BTX_VL])
{
    vf low = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    vf high = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}
#elif BTX_VL == 4
static inline vf vf_reduce_add_each(const vf a[BTX_VL])
{
    return vpaddq_f32(vpaddq_f32(a[0], a[1]), vpaddq_f32(a[2], a[3]));
}
#else
static inline vf vf_reduce_add_each(const vf a[BTX_VL])
{
    return a[0];
}
#endif

/* Lane j of a[i] becomes lane i of a[j]. */
#if BTX_VL == 8
static inline void vf_transpose(vf a[BTX_VL])
{
    vf pairs[8], quads[8]; /* [i]: of each half of the lanes */
    BTX_UNROLL
    for (int i = 0; i < 8; i += 2) {
        pairs[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    BTX_UNROLL
    for (int i = 0; i < 8; i += 4) {
        BTX_UNROLL
        for (int k = 0; k < 2; k++) {
            quads[i + 2 * k] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0x44);
            quads[i + 2 * k + 1] = _mm256_shuffle_ps(pairs[i + k], pairs[i + 2 + k], 0xee);
        }
    }
    BTX_UNROLL
    for (int i = 0; i < 4; i++) {
        a[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
        a[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
}
#else
static inline void vf_transpose(vf a[BTX_VL])
{
    float rows[BTX_VL][BTX_VL], columns[BTX_VL][BTX_VL];
    for (int i = 0; i < BTX_VL; i++)
        vf_store(rows[i], a[i]);
    for (int i = 0; i < BTX_VL; i++) {
        for (int j = 0; j < BTX_VL; j++)
            columns[j][i] = rows[i][j];
    }
    for (int i = 0; i < BTX_VL; i++)
        a[i] = vf_load(columns[i]);
}
#endif

#endif /* BTX_SIMD_H */
