/* variant_avx512_bf16.c - the operations on AVX-512 with its bf16 dot product. */
#include "cpu.h"

#if defined(__x86_64__)
/* System headers come before the target is raised: it is for our functions only. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BTX_VARIANT avx512_bf16
#define BTX_VL 16
#define BTX_BF16_DOT

static int btx_cpu_available(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16");
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))),                 \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
