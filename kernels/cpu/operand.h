/* operand.h - the left side of a product: rows [rows, dim] of f32, rounded to the dtype of the weights, as the tiles of
 * tile.h read them.
 *
 *     weights                      a row of the operand
 *     f32                          f32 [dim]
 *     bf16, with vdpbf16ps         bf16 [dim], to an even number
 *     bf16, without                f32 [dim] of bf16 values, to an even number
 *
 * What fills an odd dim is zero. */
#ifndef BTX_OPERAND_H
#define BTX_OPERAND_H

#include "btx.h"
#include "simd.h"

#ifdef BTX_BF16_DOT
#define BTX_OPERAND_BF16_SIZE 2
#else
#define BTX_OPERAND_BF16_SIZE 4
#endif

/* Bytes of a row. */
static inline int64_t operand_stride(int64_t dim, btx_dtype dtype)
{
    return dtype == BTX_BF16 ? (dim + dim % 2) * BTX_OPERAND_BF16_SIZE : dim * 4;
}

static size_t btx_cpu_operand_bytes(int64_t rows, int64_t dim, btx_dtype dtype)
{
    return (size_t)rows * (size_t)operand_stride(dim, dtype);
}

#ifdef BTX_BF16_DOT
/* The instruction takes subnormals as zero, but so does the product that reads them. */
static inline __m256i operand_halves(vf value)
{
    return (__m256i)_mm512_cvtneps_pbh(value);
}
#endif

/* Elements [k, k + n) of a row, n <= BTX_VL. */
static inline void operand_store_n(void *row, btx_dtype dtype, int64_t k, vf value, int n)
{
    if (dtype == BTX_F32) {
        vf_store_n((float *)row + k, value, n);
        return;
    }
#ifdef BTX_BF16_DOT
    vf_put_halves_n((uint16_t *)row + k, operand_halves(value), n);
#else
    vf_store_n((float *)row + k, vf_from_bf16(vf_to_bf16(value)), n);
#endif
}

static inline void operand_store(void *row, btx_dtype dtype, int64_t k, vf value)
{
    if (dtype == BTX_F32) {
        vf_store((float *)row + k, value);
        return;
    }
#ifdef BTX_BF16_DOT
    vf_put_halves((uint16_t *)row + k, operand_halves(value));
#else
    vf_store((float *)row + k, vf_from_bf16(vf_to_bf16(value)));
#endif
}

/* The zero behind a row of odd dim. */
static inline void operand_end(void *row, btx_dtype dtype, int64_t dim)
{
    if (dtype == BTX_BF16 && dim % 2 != 0)
        operand_store_n(row, dtype, dim, vf_zero(), 1);
}

#endif /* BTX_OPERAND_H */
