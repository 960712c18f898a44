/* peak.c - loops that do one thing as fast as the machine can: what floors.py divides by.
 *
 * Compiled when a benchmark starts, for the best instruction set the machine has, with the vectors and the
 * exponential of our kernels (simd.h). One of these is defined, as kernels/cpu/variant_*.c name them:
 *
 *     PEAK_scalar PEAK_neon PEAK_avx2 PEAK_avx512 PEAK_avx512_bf16
 *
 * Every function works on the calling thread alone and returns a value that depends on all it did, so that nothing
 * can be left out. floors.py counts and keeps the time. */
#include <stdint.h>
#include <string.h>

#if defined(PEAK_avx512_bf16)
#define BTX_VL 16
#define PEAK_TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"
#elif defined(PEAK_avx512)
#define BTX_VL 16
#define PEAK_TARGET "avx512f,avx512bw,avx512vl,avx512dq"
#elif defined(PEAK_avx2)
#define BTX_VL 8
#define PEAK_TARGET "avx2,fma,f16c"
#elif defined(PEAK_neon)
#define BTX_VL 4
#else
#define BTX_VL 1
#endif

#if defined(PEAK_TARGET)
#include <immintrin.h> /* before the target is raised, as in kernels/cpu/variant_*.c */
#define PEAK_DO(text) _Pragma(#text)
#define PEAK_PRAGMA(text) PEAK_DO(text)
#if defined(__clang__)
PEAK_PRAGMA(clang attribute push(__attribute__((target(PEAK_TARGET))), apply_to = function))
#else
PEAK_PRAGMA(GCC target(PEAK_TARGET))
#endif
#endif

#include "simd.h"

/* Independent sums, enough to hide the latency of a multiply-add and few enough to stay in registers. Without vectors
 * of our own (scalar) the compiler makes some from the array. */
#if BTX_VL == 16 || BTX_VL == 4
#define PEAK_SUMS 16
#elif BTX_VL == 8
#define PEAK_SUMS 12
#else
#define PEAK_SUMS 32
#endif

/* Multiply-adds of one round of peak_f32 and of peak_bf16, exponentials of one round of peak_exp. */
int32_t peak_f32_multiply_adds(void)
{
    return PEAK_SUMS * BTX_VL;
}
int32_t peak_bf16_multiply_adds(void)
{
#ifdef PEAK_avx512_bf16
    return PEAK_SUMS * BTX_VL * 2;
#else
    return PEAK_SUMS * BTX_VL;
#endif
}
#define PEAK_EXPS 2048 /* a first-level cache's worth */
int32_t peak_exp_exps(void)
{
    return PEAK_EXPS;
}

/* f32 multiply-adds. factor near 1 and term near 0 keep the sums finite; the compiler knows neither. */
float peak_f32(int64_t rounds, float factor, float term)
{
    const vf a = vf_set1(factor), b = vf_set1(term);
    vf sum[PEAK_SUMS], total = vf_zero();
    for (int i = 0; i < PEAK_SUMS; i++)
        sum[i] = vf_set1((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        BTX_UNROLL
        for (int i = 0; i < PEAK_SUMS; i++)
            sum[i] = vf_fma(sum[i], a, b);
    }
    for (int i = 0; i < PEAK_SUMS; i++)
        total = vf_add(total, sum[i]);
    return vf_reduce_add(total);
}

/* bf16 multiply-adds into f32 where the machine has a dot product of pairs, else the f32 ones: there a bf16 operand
 * is widened and costs at least as much. */
float peak_bf16(int64_t rounds, float factor, float term)
{
#ifdef PEAK_avx512_bf16
    const __m512bh a = (__m512bh)vf_set1(factor), b = (__m512bh)vf_set1(term);
    vf sum[PEAK_SUMS], total = vf_zero();
    for (int i = 0; i < PEAK_SUMS; i++)
        sum[i] = vf_set1((float)i);
    for (int64_t r = 0; r < rounds; r++) {
        BTX_UNROLL
        for (int i = 0; i < PEAK_SUMS; i++)
            sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
    }
    for (int i = 0; i < PEAK_SUMS; i++)
        total = vf_add(total, sum[i]);
    return vf_reduce_add(total);
#else
    return peak_f32(rounds, factor, term);
#endif
}

/* The kernels' own exponential, to base two. x [PEAK_EXPS]. */
float peak_exp(int64_t rounds, const float *x)
{
    vf sum[4] = {vf_zero(), vf_zero(), vf_zero(), vf_zero()};
    for (int64_t r = 0; r < rounds; r++) {
        for (int i = 0; i < PEAK_EXPS; i += 4 * BTX_VL) {
            BTX_UNROLL
            for (int k = 0; k < 4; k++)
                sum[k] = vf_add(sum[k], vf_exp2_from(vf_load(x + i + k * BTX_VL), vf_zero()));
        }
    }
    return vf_reduce_add(vf_add(vf_add(sum[0], sum[1]), vf_add(sum[2], sum[3])));
}

/* Reads count floats (a multiple of 256) from x, rounds times. */
float peak_read(int64_t rounds, const float *x, int64_t count)
{
    vf sum[8];
    for (int k = 0; k < 8; k++)
        sum[k] = vf_zero();
    for (int64_t r = 0; r < rounds; r++) {
        for (int64_t i = 0; i < count; i += 8 * BTX_VL) {
            BTX_UNROLL
            for (int k = 0; k < 8; k++)
                sum[k] = vf_add(sum[k], vf_load(x + i + k * BTX_VL));
        }
    }
    vf total = vf_zero();
    for (int k = 0; k < 8; k++)
        total = vf_add(total, sum[k]);
    return vf_reduce_add(total);
}

/* Copies count floats from x to y, rounds times. memcpy keeps large copies out of the caches by itself. */
float peak_copy(int64_t rounds, const float *x, int64_t count, float *y)
{
    for (int64_t r = 0; r < rounds; r++) {
        memcpy(y, x, (size_t)count * sizeof *y);
#if defined(__GNUC__)
        __asm__ volatile("" : : "r"(y) : "memory"); /* every round counts */
#endif
    }
    return y[count - 1];
}

#if defined(PEAK_TARGET) && defined(__clang__)
#pragma clang attribute pop
#endif
