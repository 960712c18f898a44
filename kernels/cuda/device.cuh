/* device.cuh - what the kernels ask of the device beyond plain C++: asynchronous copies, matrix instructions, the
 * exponential; launches. Everything else they use is CUDA's own __shfl_*_sync, __ballot_sync, __syncthreads,
 * __syncwarp and atomics.
 *
 * The tests compile the same kernels for the host (BTX_EMULATE): tests/emulation/emulation.h then stands in for CUDA
 * and for this file's instructions. */
#ifndef BTX_DEVICE_CUH
#define BTX_DEVICE_CUH

#ifdef BTX_EMULATE
#include "emulation.h" /* tests/emulation/ */
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define BTX_WARP 32
#define BTX_ALL_LANES 0xffffffffu

/* The dynamic shared memory of a kernel, under this name. */
#define BTX_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

/* kernel may be (kernel<...>) in parentheses. */
#define BTX_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
    kernel<<<grid, threads, shared_bytes, stream>>>(__VA_ARGS__)

/* ---- copies of 16 bytes from global to shared memory; both ends are 16-byte aligned ------------------------------ */

__device__ static inline void copy_async_16(void *shared, const void *global)
{
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

/* The same where wanted; zeros where not. */
__device__ static inline void copy_async_16_or_zero(void *shared, const void *global, bool wanted)
{
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(wanted ? 16 : 0)
                 : "memory");
}

__device__ static inline void copy_async_commit(void)
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Waits until at most pending of this thread's latest groups are under way. A barrier makes them visible to others. */
template <int pending> __device__ static inline void copy_async_wait(void)
{
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

/* ---- matrix fragments ---------------------------------------------------------------------------------------------
 */

/* Four 8 x 8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, and gets of
 * each matrix the elements [l / 4][2 * (l % 4)] and its neighbour. */
__device__ static inline void load_matrix_x4(unsigned (&fragment)[4], const void *shared_row)
{
    unsigned address = (unsigned)__cvta_generic_to_shared(shared_row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

/* c [16, 8] += a [16, 16] b [8, 16]^T, bf16 or f16 by type, f32 sums. Lane l holds
 *   a: rows l / 4 (registers 0, 2) and l / 4 + 8 (1, 3), columns 2 * (l % 4) + {0, 1}, registers 2, 3 eight further
 *   b: row l / 4, columns 2 * (l % 4) + {0, 1}, register 1 eight further
 *   c: rows l / 4 (0, 1) and l / 4 + 8 (2, 3), columns 2 * (l % 4) + {0, 1} */
__device__ static inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                               __nv_bfloat16)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ static inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* 2^x within 2 units in the last place; 0 for -infinity. */
__device__ static inline float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif /* BTX_EMULATE */

/* ---- elements -----------------------------------------------------------------------------------------------------
 */

__device__ static inline float to_f32(float x)
{
    return x;
}
__device__ static inline float to_f32(__half x)
{
    return __half2float(x);
}
__device__ static inline float to_f32(__nv_bfloat16 x)
{
    return __bfloat162float(x);
}

/* To nearest, ties to even. */
template <typename T> __device__ static inline T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x)
{
    return x;
}
template <> __device__ inline __half from_f32<__half>(float x)
{
    return __float2half_rn(x);
}
template <> __device__ inline __nv_bfloat16 from_f32<__nv_bfloat16>(float x)
{
    return __float2bfloat16_rn(x);
}

/* ---- sums in a fixed order ----------------------------------------------------------------------------------------
 */

__device__ static inline float warp_sum(float x)
{
    for (int mask = 16; mask > 0; mask /= 2)
        x += __shfl_xor_sync(BTX_ALL_LANES, x, mask);
    return x;
}

__device__ static inline float warp_max(float x)
{
    for (int mask = 16; mask > 0; mask /= 2)
        x = fmaxf(x, __shfl_xor_sync(BTX_ALL_LANES, x, mask));
    return x;
}

#endif /* BTX_DEVICE_CUH */
