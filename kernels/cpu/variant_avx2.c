/* variant_avx2.c - the operations on AVX2, FMA and F16C. */
#include "cpu.h"

#if defined(__x86_64__)
/* System headers come before the target is raised: it is for our functions only. */
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#define BTX_VARIANT avx2
#define BTX_VL 8

static int btx_cpu_available(void)
{
    unsigned eax, ebx, ecx, edx; /* not every compiler knows __builtin_cpu_supports("f16c") */
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           (ecx & bit_F16C) != 0;
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "variant.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
