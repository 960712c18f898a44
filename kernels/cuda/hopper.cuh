/* hopper.cuh - what the sm_90a kernels ask of the device beyond device.cuh: products of whole warpgroups (wgmma),
 * barriers in shared memory, the tensor copy engine.
 *
 * A warpgroup is four warps, the first a multiple of four. Its operands lie in shared memory as swizzled tiles: rows of
 * 64 16-bit elements, 128 bytes, the tile on a multiple of 1024 bytes, where chunk c (16 bytes) of row r is found at
 * chunk c ^ r % 8 of that row. Longer rows are several such tiles.
 *
 * Everything can be compiled for any architecture, and does nothing but for sm_90a: a kernel's body should be between
 * #ifdef BTX_SM90A and #endif, and be launched only where cuda_executor says that sm90a code runs. */
#ifndef BTX_HOPPER_CUH
#define BTX_HOPPER_CUH

#include <stdint.h>

#include "device.cuh"

#define BTX_WARPGROUP 128
#define BTX_SWIZZLED_ALIGNMENT 1024 /* bytes */

#ifdef BTX_EMULATE /* emulation.h has what attention_mass_sm90.cu needs */
#define BTX_SWIZZLED_SHARED(name) BTX_DYNAMIC_SHARED(name)
#else
#include <cuda.h> /* CUtensorMap */

/* The dynamic shared memory of a kernel that has swizzled tiles, under this name. */
#define BTX_SWIZZLED_SHARED(name)                                                                                      \
    extern __shared__ __align__(BTX_SWIZZLED_ALIGNMENT)                                                                \
    unsigned char name[]

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define BTX_SM90A
#define BTX_HOPPER_ASM(...) asm volatile(__VA_ARGS__)
#else
#define BTX_HOPPER_ASM(...) ((void)0)
#endif

__device__ static inline unsigned shared_address(const void *shared)
{
    return (unsigned)__cvta_generic_to_shared(shared);
}
#endif /* BTX_EMULATE */

/* ---- swizzled tiles ---------------------------------------------------------------------------------------------- */

/* Where chunk (of 8 elements) of a row lies, in elements from the tile's first. */
__device__ static inline int swizzled(int row, int chunk)
{
    return row * 64 + (chunk ^ (row & 7)) * 8;
}

/* An operand for wgmma: rows of a tile from one on that is a multiple of 8, and 16 columns from one on that is a
 * multiple of 16; first is where the unswizzled tile would have that element. */
__device__ static inline uint64_t make_descriptor(const void *first)
{
    const uint64_t leading = 1, swizzle_128 = 1;
    const uint64_t groups = 1024 >> 4; /* bytes from 8 rows to the next 8, in sixteenths */
    return swizzle_128 << 62 | groups << 32 | leading << 16 | (shared_address(first) & 0x3ffff) >> 4;
}

/* The descriptor of what lies so many elements, a multiple of 8, behind what the descriptor is of. */
__device__ static inline uint64_t move_descriptor(uint64_t descriptor, int elements)
{
    return descriptor >> 32 << 32 | (uint32_t)((uint32_t)descriptor + elements / 8);
}

/* The same descriptor, known to the compiler as one that all lanes have: what is computed from it and handed to wgmma
 * is then computed once a warp, not moved from a lane's registers for each product. */
__device__ static inline uint64_t uniform_descriptor(uint64_t descriptor)
{
    return descriptor >> 32 << 32 | __shfl_sync(BTX_ALL_LANES, (uint32_t)descriptor, 0);
}

#ifndef BTX_EMULATE
/* ---- products of a warpgroup ------------------------------------------------------------------------------------- */

/* What the warpgroup's threads did to their sums and operands in registers before comes before the products after. */
__device__ static inline void wgmma_fence(void)
{
    BTX_HOPPER_ASM("wgmma.fence.sync.aligned;" :: : "memory");
}

/* Ends a group of products. */
__device__ static inline void wgmma_commit(void)
{
    BTX_HOPPER_ASM("wgmma.commit_group.sync.aligned;" :: : "memory");
}

/* Waits until at most pending of the latest groups are under way. */
template <int pending> __device__ static inline void wgmma_wait(void)
{
    BTX_HOPPER_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

/* Keeps the compiler from moving what it does with the sums to before this point; they are to be read after a wait. */
template <int N> __device__ static inline void wgmma_hold(float (&sum)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        BTX_HOPPER_ASM("" : "+f"(sum[i])::"memory");
}

/* Shared memory that this thread wrote by ordinary stores or cp.async (after its wait) is seen by what wgmma and the
 * copy engine do after the next barrier. */
__device__ static inline void fence_async_proxy(void)
{
    BTX_HOPPER_ASM("fence.proxy.async.shared::cta;" :: : "memory");
}

/* sum [64, N] = accumulate ? sum : 0, + a [64, 16] b [N, 16]^T, bf16 or f16 by type, f32 sums. Started, not done: sums
 * must not be touched, nor operands be overwritten, until a wait. Of the sums, warp w of the warpgroup and lane l have
 *   sum[4 * n + 2 * h + i]: row 16 * w + 8 * h + l / 4, column 8 * n + 2 * (l % 4) + i
 * and a in registers, four words of two elements, is as in multiply_16x8x16, with a warp's 16 rows. */
#define BTX_SUMS_8(sum, i)                                                                                             \
    "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]),            \
        "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define BTX_SUMS_32(sum, i) BTX_SUMS_8(sum, i), BTX_SUMS_8(sum, i + 8), BTX_SUMS_8(sum, i + 16), BTX_SUMS_8(sum, i + 24)
#define BTX_SUMS_64(sum, i) BTX_SUMS_32(sum, i), BTX_SUMS_32(sum, i + 32)
#define BTX_PLACES_32                                                                                                  \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BTX_PLACES_64                                                                                                  \
    BTX_PLACES_32 ", "                                                                                                 \
                  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                   \
                  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

/* places: of the sums' registers; a, b, p: numbers of the operands that follow, for a in registers its first. */
#define BTX_DEFINE_WGMMA(N, T, type, places, sums, a, b, p)                                                            \
    __device__ static inline void wgmma_m64n##N##k16(float (&sum)[N / 2], uint64_t a_descriptor,                       \
                                                     uint64_t b_descriptor, T, int accumulate)                         \
    {                                                                                                                  \
        BTX_HOPPER_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                                                \
                       "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" places "}, %" #a ", %" #b  \
                       ", p, 1, 1, 0, 0;\n}\n" : sums : "l"(a_descriptor),                                             \
                       "l"(b_descriptor), "r"(accumulate) : "memory");                                                 \
    }

#define BTX_DEFINE_WGMMA_REGISTERS(N, T, type, places, sums, a0, a1, a2, a3, b, p)                                     \
    __device__ static inline void wgmma_m64n##N##k16_registers(float (&sum)[N / 2], const unsigned (&a)[4],            \
                                                               uint64_t b_descriptor, T, int accumulate)               \
    {                                                                                                                  \
        BTX_HOPPER_ASM("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p ", 0;\n"                                                \
                       "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type " {" places "}, {%" #a0         \
                       ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p, 1, 1, 0;\n}\n" : sums : "r"(a[0]),                \
                       "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(accumulate) : "memory");                \
    }

BTX_DEFINE_WGMMA(128, __nv_bfloat16, "bf16", BTX_PLACES_64, BTX_SUMS_64(sum, 0), 64, 65, 66)
BTX_DEFINE_WGMMA_REGISTERS(64, __nv_bfloat16, "bf16", BTX_PLACES_32, BTX_SUMS_32(sum, 0), 32, 33, 34, 35, 36, 37)
BTX_DEFINE_WGMMA_REGISTERS(64, __half, "f16", BTX_PLACES_32, BTX_SUMS_32(sum, 0), 32, 33, 34, 35, 36, 37)

/* ---- barriers in shared memory ----------------------------------------------------------------------------------- */

/* A phase ends when count threads have arrived and the bytes they expect have been copied; their parity is 0, 1, 0
 * and so on. */
__device__ static inline void barrier_init(uint64_t *barrier, unsigned count)
{
    BTX_HOPPER_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

/* After the last barrier_init, before a barrier of all threads. */
__device__ static inline void barrier_init_fence(void)
{
    BTX_HOPPER_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
    fence_async_proxy();
}

__device__ static inline void barrier_arrive(uint64_t *barrier)
{
    BTX_HOPPER_ASM("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ static inline void barrier_arrive_expect(uint64_t *barrier, unsigned bytes)
{
    BTX_HOPPER_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                   "r"(bytes) : "memory");
}

/* Waits for the end of the phase of this parity; that before the first counts as one of parity 1. */
__device__ static inline void barrier_wait(uint64_t *barrier, unsigned parity)
{
    unsigned done = 1;
    do {
        BTX_HOPPER_ASM("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, "
                       "p;\n}\n" : "=r"(done) : "r"(shared_address(barrier)),
                       "r"(parity) : "memory");
    } while (!done);
}

/* ---- the tensor copy engine -------------------------------------------------------------------------------------- */

/* Copies the box of a tensor map that begins at these coordinates (the innermost first) to shared memory, zeros where
 * it is outside the tensor; barrier is to expect the bytes of the whole box. By one thread. */
__device__ static inline void copy_box(void *shared, const CUtensorMap *map, uint64_t *barrier, int c0, int c1, int c2)
{
    BTX_HOPPER_ASM("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                   "[%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
                   "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(barrier)) : "memory");
}

__device__ static inline void copy_box(void *shared, const CUtensorMap *map, uint64_t *barrier, int c0, int c1, int c2,
                                       int c3)
{
    BTX_HOPPER_ASM("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                   "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
                   "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier)) : "memory");
}

/* The other way; what is outside the tensor is left out. Writes to shared memory need a fence_async_proxy before. */
__device__ static inline void store_box(const CUtensorMap *map, const void *shared, int c0, int c1, int c2)
{
    BTX_HOPPER_ASM("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
                   "r"(c0), "r"(c1), "r"(c2), "r"(shared_address(shared)) : "memory");
}

__device__ static inline void store_commit(void)
{
    BTX_HOPPER_ASM("cp.async.bulk.commit_group;" :: : "memory");
}

/* Waits until the shared memory of this thread's stores can be overwritten. */
__device__ static inline void store_wait_read(void)
{
    BTX_HOPPER_ASM("cp.async.bulk.wait_group.read 0;" :: : "memory");
}

/* Four 8 x 8 matrices of 16-bit elements to shared memory, as load_matrix_x4 reads them. */
__device__ static inline void store_matrix_x4(void *shared_row, const unsigned (&fragment)[4])
{
    BTX_HOPPER_ASM("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared_row)),
                   "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3]) : "memory");
}

#endif /* BTX_EMULATE */

#endif /* BTX_HOPPER_CUH */
