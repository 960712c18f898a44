/* hopper.cuh - the asynchronous products of Hopper (sm_90a): a warpgroup of four warps multiplies 64 rows at once, and
 * goes on before the result is there.
 *
 * Device code that uses them is compiled under BTX_HOPPER alone; the host asks executor->hopper before it launches it.
 *
 * The right side of a product is in shared memory: rows of 64 elements of 16 bits, 128 bytes each, from an address that
 * is a multiple of 1024, the 16-byte chunk c of row r in place c ^ r % 8. Sums are as multiply_16x8x16's (device.cuh):
 * warp w of the warpgroup has rows [16 w, 16 w + 16), eight columns in four registers. */
#ifndef BTX_HOPPER_CUH
#define BTX_HOPPER_CUH

#include <stdint.h>

#include "device.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BTX_HOPPER
#endif

/* Before the first product, and after its registers were written otherwise. */
__device__ static inline void wgmma_fence(void)
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ static inline void wgmma_commit(void)
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Waits until at most pending of the latest groups are under way. */
template <int pending> __device__ static inline void wgmma_wait(void)
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* Keeps the compiler from moving what is done with sums across this point: it does not know that they are written
 * later than the product's instruction. Before a product, and after the wait for it. */
template <int N> __device__ static inline void wgmma_hold(float (&sum)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+f"(sum[i])::"memory");
}

/* Makes this thread's writes to shared memory, finished asynchronous copies among them, visible to products that are
 * started behind the next barrier. */
__device__ static inline void fence_async_proxy(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Of the tile at a row that is a multiple of 8; 16 elements further along a row are 32 bytes. */
__device__ static inline uint64_t make_descriptor(const void *shared)
{
    const uint64_t address = (uint64_t)__cvta_generic_to_shared(shared);
    const uint64_t row_groups = 1024; /* bytes from eight rows to the next */
    return (address & 0x3ffff) >> 4 | (uint64_t)1 << 16 | row_groups >> 4 << 32 | (uint64_t)1 << 62; /* 128-byte swizzle */
}

/* sum [64, 64] of a warpgroup += a [64, 16], in registers as multiply_16x8x16's of each warp's 16 rows, times b [64, 16]^T,
 * a tile in shared memory. accumulate 0: sum = ... */
__device__ static inline void wgmma_m64n64k16_registers(float (&sum)[32], const unsigned (&a)[4], uint64_t b, __nv_bfloat16,
                                                        int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]),
                   "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7]),
                   "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),
                   "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]),
                   "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]),
                   "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]),
                   "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]),
                   "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

__device__ static inline void wgmma_m64n64k16_registers(float (&sum)[32], const unsigned (&a)[4], uint64_t b, __half,
                                                        int accumulate)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, "
                 "%8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, "
                 "%24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]),
                   "+f"(sum[4]), "+f"(sum[5]), "+f"(sum[6]), "+f"(sum[7]),
                   "+f"(sum[8]), "+f"(sum[9]), "+f"(sum[10]), "+f"(sum[11]),
                   "+f"(sum[12]), "+f"(sum[13]), "+f"(sum[14]), "+f"(sum[15]),
                   "+f"(sum[16]), "+f"(sum[17]), "+f"(sum[18]), "+f"(sum[19]),
                   "+f"(sum[20]), "+f"(sum[21]), "+f"(sum[22]), "+f"(sum[23]),
                   "+f"(sum[24]), "+f"(sum[25]), "+f"(sum[26]), "+f"(sum[27]),
                   "+f"(sum[28]), "+f"(sum[29]), "+f"(sum[30]), "+f"(sum[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#endif /* BTX_HOPPER_CUH */
