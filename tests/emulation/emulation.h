/* emulation.h - CUDA on the host, for tests: what the kernels of kernels/cuda/ need to be compiled by a C++17 compiler
 * and run without a GPU. Stands in for the CUDA headers and for the instructions of kernels/cuda/device.cuh.
 *
 *   device.cpp   blocks: a fiber per thread, barriers, warp collectives, shared memory
 *   runtime.cpp  the host's side: memory, events, errors, faults on demand
 *
 * What it is after is mistakes, not speed:
 *   - Threads are scheduled in pseudo-random order (BTX_EMULATE_SEED), which moves on with every launch, and so are
 *     blocks. A thread runs until it waits for others, so a missing barrier shows as a wrong result.
 *   - All memory starts as 0xff bytes (NaN). Shared memory is so again for every block, the destination of a
 *     copy_async_16 from its issue until its thread waits for it.
 *   - Device memory and dynamic shared memory are exactly as large as asked for, between guards that are looked at
 *     after every block and launch.
 *   - Misuse is told with kernel, block, thread and line, and becomes a sticky error as on a device.
 *   - With -fsanitize=thread (and without libtsan) device.cpp sees every access of shared memory: see races.cpp. */
#ifndef BTX_EMULATION_H
#define BTX_EMULATION_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <type_traits>

/* ---- the language -------------------------------------------------------------------------------------------------
 */

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

/* Blocks run one after the other, all on the host thread that launches, so one copy will do. Thread-local memory of a
 * library is in one piece: device.cpp finds it there and fills it for every block. AddressSanitizer guards only what is
 * not thread-local; its builds go without the filling. */
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_)
    {
    }
};

#define BTX_EMULATION_VECTOR(T, name, bytes2, bytes4)                                                                  \
    struct __attribute__((aligned(bytes2))) name##2                                                                    \
    {                                                                                                                  \
        T x, y;                                                                                                        \
    };                                                                                                                 \
    struct __attribute__((aligned(bytes4))) name##4                                                                    \
    {                                                                                                                  \
        T x, y, z, w;                                                                                                  \
    };                                                                                                                 \
    static inline name##2 make_##name##2(T x, T y)                                                                     \
    {                                                                                                                  \
        return name##2 {x, y};                                                                                         \
    }                                                                                                                  \
    static inline name##4 make_##name##4(T x, T y, T z, T w)                                                           \
    {                                                                                                                  \
        return name##4 {x, y, z, w};                                                                                   \
    }
BTX_EMULATION_VECTOR(int, int, 8, 16)
BTX_EMULATION_VECTOR(unsigned, uint, 8, 16)
BTX_EMULATION_VECTOR(float, float, 8, 16)
BTX_EMULATION_VECTOR(unsigned short, ushort, 4, 8)
BTX_EMULATION_VECTOR(unsigned char, uchar, 2, 4)
#undef BTX_EMULATION_VECTOR
struct int3 {
    int x, y, z;
};
struct float3 {
    float x, y, z;
};
struct __attribute__((aligned(16))) double2 {
    double x, y;
};
struct __attribute__((aligned(16))) longlong2 {
    long long x, y;
};

/* Of the running thread; device.cpp sets them when it switches threads. */
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

/* ---- blocks, warps: device.cpp ------------------------------------------------------------------------------------
 */

namespace btx_emulation {
/* Where a thread waits, for messages; barriers at different places must not meet. */
struct site {
    const char *file;
    int line;
    static constexpr site here(const char *file = __builtin_FILE(), int line = __builtin_LINE())
    {
        return site{file, line};
    }
};

enum class barrier { plain, any, all, count };
int block_barrier(barrier kind, int predicate, site at);

/* Collectives of a warp. Every thread gives the address of its operands; the last one to come does the work of all. */
enum class operation {
    syncwarp,
    shuffle_idx,
    shuffle_xor,
    shuffle_up,
    shuffle_down,
    ballot,
    match_any,
    reduce_add,
    reduce_min,
    reduce_max,
    reduce_min_signed,
    reduce_max_signed,
    reduce_and,
    reduce_or,
    reduce_xor,
    load_matrix,
    multiply_bf16,
    multiply_f16,
    wgmma_bf16,
    wgmma_f16,
    wgmma_wait
};
struct shuffle_operands {
    uint64_t value, result;
    int source; /* lane */
};
struct vote_operands { /* ballot, match, reductions */
    unsigned value, result;
};
struct matrix_operands {
    const void *row;
    unsigned *fragment; /* [4] */
};
struct multiply_operands {
    float *c;          /* [4] */
    const unsigned *a; /* [4] */
    unsigned b[2];
};
/* sum [16 of a warpgroup's 64 rows, 64] = accumulate ? sum : 0, + a b^T; nothing is computed before a wait. */
struct wgmma_operands {
    float *sum;        /* [32] */
    const unsigned *a; /* [4] */
    uint64_t b;        /* descriptor */
    int accumulate;
};
void wgmma_commit(void);
void collective(operation what, unsigned mask, void *operands, site at);

void copy_issue(void *shared, const void *global, bool wanted, site at); /* zeros come where it is not wanted */
void copy_commit(void);
void copy_wait(unsigned pending);

unsigned char *dynamic_shared(void);
unsigned lane(void);
void atomic_access(const void *at, size_t bytes);

/* A device's failure, from inside a kernel: the launch ends, the error is sticky. Does not return. */
[[noreturn]] void trap(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* name, for messages; call(arguments) runs one thread. */
void launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*call)(const void *arguments), void *arguments, void (*release)(void *arguments));

/* Arguments are copied when a kernel is launched, and for every thread. */
template <typename... P, typename... A>
void launch_kernel(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A &&...arguments)
{
    struct copy {
        void (*kernel)(P...);
        std::tuple<std::remove_cv_t<P>...> arguments;
    };
    auto call = [](const void *memory) {
        const copy *all = static_cast<const copy *>(memory);
        std::apply(all->kernel, all->arguments);
    };
    auto release = [](void *memory) { delete static_cast<copy *>(memory); };
    launch(name, reinterpret_cast<const void *>(kernel), grid, block, shared_bytes, call,
           new copy{kernel, {static_cast<P>(arguments)...}}, release);
}

template <typename T> uint64_t to_bits(T value)
{
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}
template <typename T> T from_bits(uint64_t bits)
{
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <typename T> T shuffle(operation what, unsigned mask, T value, int source, site at)
{
    shuffle_operands operands = {to_bits(value), 0, source};
    collective(what, mask, &operands, at);
    return from_bits<T>(operands.result);
}
static inline unsigned vote(operation what, unsigned mask, unsigned value, site at)
{
    vote_operands operands = {value, 0};
    collective(what, mask, &operands, at);
    return operands.result;
}
} // namespace btx_emulation

#define BTX_WARP 32
#define BTX_ALL_LANES 0xffffffffu
#define BTX_DYNAMIC_SHARED(name) unsigned char *const name = btx_emulation::dynamic_shared()
#define BTX_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...)                                                   \
    ((void)(stream), btx_emulation::launch_kernel(#kernel, kernel, grid, threads, shared_bytes, ##__VA_ARGS__))

#define BTX_EMULATION_SITE btx_emulation::site at = btx_emulation::site::here()

static inline void __syncthreads(BTX_EMULATION_SITE)
{
    btx_emulation::block_barrier(btx_emulation::barrier::plain, 0, at);
}
static inline int __syncthreads_or(int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::block_barrier(btx_emulation::barrier::any, predicate, at);
}
static inline int __syncthreads_and(int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::block_barrier(btx_emulation::barrier::all, predicate, at);
}
static inline int __syncthreads_count(int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::block_barrier(btx_emulation::barrier::count, predicate, at);
}
static inline void __syncwarp(unsigned mask = BTX_ALL_LANES, BTX_EMULATION_SITE)
{
    btx_emulation::collective(btx_emulation::operation::syncwarp, mask, nullptr, at);
}
static inline void __threadfence(void)
{
}
static inline void __threadfence_block(void)
{
}
static inline void __threadfence_system(void)
{
}

/* Segments of width lanes, as PTX has it: beyond the segment's end a thread gets its own value. */
template <typename T>
static inline T __shfl_sync(unsigned mask, T value, int source, int width = BTX_WARP, BTX_EMULATION_SITE)
{
    const int first = (int)btx_emulation::lane() & ~(width - 1);
    return btx_emulation::shuffle(btx_emulation::operation::shuffle_idx, mask, value, first | (source & (width - 1)),
                                  at);
}
template <typename T>
static inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = BTX_WARP, BTX_EMULATION_SITE)
{
    const int own = (int)btx_emulation::lane(), last = own | (width - 1), source = own ^ lane_mask;
    return btx_emulation::shuffle(btx_emulation::operation::shuffle_xor, mask, value, source <= last ? source : own,
                                  at);
}
template <typename T>
static inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = BTX_WARP, BTX_EMULATION_SITE)
{
    const int own = (int)btx_emulation::lane(), first = own & ~(width - 1), source = own - (int)delta;
    return btx_emulation::shuffle(btx_emulation::operation::shuffle_up, mask, value, source >= first ? source : own,
                                  at);
}
template <typename T>
static inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = BTX_WARP, BTX_EMULATION_SITE)
{
    const int own = (int)btx_emulation::lane(), last = own | (width - 1), source = own + (int)delta;
    return btx_emulation::shuffle(btx_emulation::operation::shuffle_down, mask, value, source <= last ? source : own,
                                  at);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::vote(btx_emulation::operation::ballot, mask, predicate != 0, at);
}
static inline int __any_sync(unsigned mask, int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::vote(btx_emulation::operation::reduce_or, mask, predicate != 0, at) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, BTX_EMULATION_SITE)
{
    return btx_emulation::vote(btx_emulation::operation::reduce_and, mask, predicate != 0, at) != 0;
}
static inline unsigned __match_any_sync(unsigned mask, unsigned value, BTX_EMULATION_SITE)
{
    return btx_emulation::vote(btx_emulation::operation::match_any, mask, value, at);
}
#define BTX_EMULATION_REDUCE(name, T, what)                                                                            \
    static inline T __reduce_##name##_sync(unsigned mask, T value, BTX_EMULATION_SITE)                                 \
    {                                                                                                                  \
        return (T)btx_emulation::vote(btx_emulation::operation::reduce_##what, mask, (unsigned)value, at);             \
    }
BTX_EMULATION_REDUCE(add, unsigned, add)
BTX_EMULATION_REDUCE(add, int, add)
BTX_EMULATION_REDUCE(min, unsigned, min)
BTX_EMULATION_REDUCE(min, int, min_signed)
BTX_EMULATION_REDUCE(max, unsigned, max)
BTX_EMULATION_REDUCE(max, int, max_signed)
BTX_EMULATION_REDUCE(and, unsigned, and)
BTX_EMULATION_REDUCE(or, unsigned, or)
BTX_EMULATION_REDUCE(xor, unsigned, xor)
#undef BTX_EMULATION_REDUCE

/* Threads change places only where they wait, so plain accesses are atomic; races.cpp is told that they are meant to
 * be. */
#define BTX_EMULATION_ATOMIC(T, name, result)                                                                          \
    __attribute__((noinline, no_sanitize("thread"))) static T atomic##name(T *at, T value)                             \
    {                                                                                                                  \
        btx_emulation::atomic_access(at, sizeof *at);                                                                  \
        const T old = *at;                                                                                             \
        *at = (T)(result);                                                                                             \
        return old;                                                                                                    \
    }
#define BTX_EMULATION_ATOMICS(T)                                                                                       \
    BTX_EMULATION_ATOMIC(T, Add, old + value)                                                                          \
    BTX_EMULATION_ATOMIC(T, Min, value < old ? value : old)                                                            \
    BTX_EMULATION_ATOMIC(T, Max, value > old ? value : old)                                                            \
    BTX_EMULATION_ATOMIC(T, Exch, value)                                                                               \
    BTX_EMULATION_ATOMIC(T, Or, old | value)                                                                           \
    BTX_EMULATION_ATOMIC(T, And, old &value)                                                                           \
    BTX_EMULATION_ATOMIC(T, Xor, old ^ value)                                                                          \
    __attribute__((noinline, no_sanitize("thread"))) static T atomicCAS(T *at, T compare, T value)                     \
    {                                                                                                                  \
        btx_emulation::atomic_access(at, sizeof *at);                                                                  \
        const T old = *at;                                                                                             \
        *at = old == compare ? value : old;                                                                            \
        return old;                                                                                                    \
    }
BTX_EMULATION_ATOMICS(int)
BTX_EMULATION_ATOMICS(unsigned)
BTX_EMULATION_ATOMICS(unsigned long long)
#undef BTX_EMULATION_ATOMIC
#undef BTX_EMULATION_ATOMICS

/* ---- numbers ------------------------------------------------------------------------------------------------------
 */

static inline unsigned __float_as_uint(float x)
{
    return (unsigned)btx_emulation::to_bits(x);
}
static inline int __float_as_int(float x)
{
    return (int)btx_emulation::to_bits(x);
}
static inline float __uint_as_float(unsigned x)
{
    return btx_emulation::from_bits<float>(x);
}
static inline float __int_as_float(int x)
{
    return btx_emulation::from_bits<float>((unsigned)x);
}

/* CUDA's overloads; mixed types beyond these do not compile there either. */
#define BTX_EMULATION_MIN_MAX(T, U, V)                                                                                 \
    static inline constexpr T min(U a, V b)                                                                            \
    {                                                                                                                  \
        return (T)a < (T)b ? (T)a : (T)b;                                                                              \
    }                                                                                                                  \
    static inline constexpr T max(U a, V b)                                                                            \
    {                                                                                                                  \
        return (T)a > (T)b ? (T)a : (T)b;                                                                              \
    }
BTX_EMULATION_MIN_MAX(int, int, int)
BTX_EMULATION_MIN_MAX(unsigned, unsigned, unsigned)
BTX_EMULATION_MIN_MAX(unsigned, unsigned, int)
BTX_EMULATION_MIN_MAX(unsigned, int, unsigned)
BTX_EMULATION_MIN_MAX(long, long, long)
BTX_EMULATION_MIN_MAX(unsigned long, unsigned long, unsigned long)
BTX_EMULATION_MIN_MAX(long long, long long, long long)
BTX_EMULATION_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
#undef BTX_EMULATION_MIN_MAX
static inline float min(float a, float b)
{
    return fminf(a, b);
}
static inline float max(float a, float b)
{
    return fmaxf(a, b);
}
static inline double min(double a, double b)
{
    return fmin(a, b);
}
static inline double max(double a, double b)
{
    return fmax(a, b);
}

static inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
static inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}
static inline int __clz(int x)
{
    return x == 0 ? 32 : __builtin_clz((unsigned)x);
}
static inline int __clzll(long long x)
{
    return x == 0 ? 64 : __builtin_clzll((unsigned long long)x);
}
static inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
static inline int __ffsll(long long x)
{
    return __builtin_ffsll(x);
}
static inline unsigned __brev(unsigned x)
{
    unsigned y = 0;
    for (int i = 0; i < 32; i++)
        y |= (x >> i & 1u) << (31 - i);
    return y;
}
static inline unsigned __umulhi(unsigned x, unsigned y)
{
    return (unsigned)((uint64_t)x * y >> 32);
}

/* Approximations are better here than on a device, but for what is flushed to zero. */
static inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}
static inline float __frcp_rn(float x)
{
    return 1.0f / x;
}
static inline float __fsqrt_rn(float x)
{
    return sqrtf(x);
}
static inline float __fmul_rn(float x, float y)
{
    return x * y;
}
static inline float __fadd_rn(float x, float y)
{
    return x + y;
}
static inline float __fsub_rn(float x, float y)
{
    return x - y;
}
static inline float __fdiv_rn(float x, float y)
{
    return x / y;
}
static inline float __fmaf_rn(float x, float y, float z)
{
    return fmaf(x, y, z);
}
static inline float __fdividef(float x, float y) /* 0 for the largest divisors */
{
    return fabsf(y) > 0x1p126f && isfinite(y) ? (isfinite(x) ? copysignf(0.0f, x * y) : NAN) : x / y;
}
static inline float exp2_fast(float x)
{
    const float y = exp2f(fabsf(x) < 0x1p-126f ? 0.0f : x);
    return y < 0x1p-126f ? 0.0f : y;
}
static inline float btx_emulation_expf(float x)
{
    return exp2_fast(x * 1.44269504f);
}
static inline float btx_emulation_log2f(float x)
{
    return log2f(x);
}
static inline float btx_emulation_logf(float x)
{
    return logf(x);
}
static inline float btx_emulation_sinf(float x)
{
    return sinf(x);
}
static inline float btx_emulation_cosf(float x)
{
    return cosf(x);
}
static inline void btx_emulation_sincosf(float x, float *sine, float *cosine)
{
    *sine = sinf(x);
    *cosine = cosf(x);
}
/* glibc declares these names for itself. */
#define __expf btx_emulation_expf
#define __log2f btx_emulation_log2f
#define __logf btx_emulation_logf
#define __sinf btx_emulation_sinf
#define __cosf btx_emulation_cosf
#define __sincosf btx_emulation_sincosf
static inline float __saturatef(float x)
{
    return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; /* NaN is 0 */
}

/* Loads and stores with a hint. */
#define BTX_EMULATION_LOAD(name)                                                                                       \
    template <typename T> static inline T name(const T *from)                                                          \
    {                                                                                                                  \
        return *from;                                                                                                  \
    }
#define BTX_EMULATION_STORE(name)                                                                                      \
    template <typename T> static inline void name(T *to, const T value)                                                \
    {                                                                                                                  \
        *to = value;                                                                                                   \
    }
BTX_EMULATION_LOAD(__ldg)
BTX_EMULATION_LOAD(__ldca)
BTX_EMULATION_LOAD(__ldcg)
BTX_EMULATION_LOAD(__ldcs)
BTX_EMULATION_LOAD(__ldlu)
BTX_EMULATION_LOAD(__ldcv)
BTX_EMULATION_STORE(__stwb)
BTX_EMULATION_STORE(__stcg)
BTX_EMULATION_STORE(__stcs)
BTX_EMULATION_STORE(__stwt)
#undef BTX_EMULATION_LOAD
#undef BTX_EMULATION_STORE

/* 16-bit elements. The members are there for these functions alone. */
struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __attribute__((aligned(4))) __half2 {
    __half x, y;
};
struct __attribute__((aligned(4))) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __half half;
typedef __half2 half2;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;

/* NaN becomes the canonical one, as on a device. */
static inline __nv_bfloat16 __float2bfloat16_rn(float x)
{
    const uint32_t bits = __float_as_uint(x);
    if (x != x)
        return __nv_bfloat16{0x7fff};
    return __nv_bfloat16{(uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
static inline float __bfloat162float(__nv_bfloat16 x)
{
    return __uint_as_float((uint32_t)x.bits << 16);
}
static inline __half __float2half_rn(float x)
{
    const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    if (magnitude > 0x7f800000u)
        return __half{0x7fff};
    if (magnitude >= 0x477ff000u) /* 65520, the first that rounds to infinity */
        return __half{(uint16_t)(sign | 0x7c00u)};
    if (magnitude < 0x38800000u) /* subnormal: the addition rounds to a multiple of 2^-24 */
        return __half{(uint16_t)(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
    return __half{(uint16_t)(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13))};
}
static inline float __half2float(__half x)
{
    const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    if (magnitude >= 0x400u)
        return __uint_as_float(sign | ((magnitude << 13) + 0x38000000u));
    return __uint_as_float(sign | __float_as_uint((float)magnitude * 0x1p-24f));
}
static inline __nv_bfloat16 __float2bfloat16(float x)
{
    return __float2bfloat16_rn(x);
}
static inline __half __float2half(float x)
{
    return __float2half_rn(x);
}
static inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y)
{
    return __nv_bfloat162{__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
static inline __half2 __floats2half2_rn(float x, float y)
{
    return __half2{__float2half_rn(x), __float2half_rn(y)};
}
static inline float2 __bfloat1622float2(__nv_bfloat162 x)
{
    return float2{__bfloat162float(x.x), __bfloat162float(x.y)};
}
static inline float2 __half22float2(__half2 x)
{
    return float2{__half2float(x.x), __half2float(x.y)};
}
static inline float __low2float(__nv_bfloat162 x)
{
    return __bfloat162float(x.x);
}
static inline float __high2float(__nv_bfloat162 x)
{
    return __bfloat162float(x.y);
}
static inline float __low2float(__half2 x)
{
    return __half2float(x.x);
}
static inline float __high2float(__half2 x)
{
    return __half2float(x.y);
}
static inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x)
{
    return x.bits;
}
static inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x)
{
    return __nv_bfloat16{x};
}
static inline unsigned short __half_as_ushort(__half x)
{
    return x.bits;
}
static inline __half __ushort_as_half(unsigned short x)
{
    return __half{x};
}

/* ---- the instructions of device.cuh -------------------------------------------------------------------------------
 */

static inline void copy_async_16(void *shared, const void *global, BTX_EMULATION_SITE)
{
    btx_emulation::copy_issue(shared, global, true, at);
}
static inline void copy_async_16_or_zero(void *shared, const void *global, bool wanted, BTX_EMULATION_SITE)
{
    btx_emulation::copy_issue(shared, global, wanted, at);
}
static inline void copy_async_commit(void)
{
    btx_emulation::copy_commit();
}
template <int pending> static inline void copy_async_wait(void)
{
    btx_emulation::copy_wait(pending);
}
static inline void load_matrix_x4(unsigned (&fragment)[4], const void *shared_row, BTX_EMULATION_SITE)
{
    btx_emulation::matrix_operands operands = {shared_row, fragment};
    btx_emulation::collective(btx_emulation::operation::load_matrix, BTX_ALL_LANES, &operands, at);
}
static inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __nv_bfloat16,
                                    BTX_EMULATION_SITE)
{
    btx_emulation::multiply_operands operands = {c, a, {b0, b1}};
    btx_emulation::collective(btx_emulation::operation::multiply_bf16, BTX_ALL_LANES, &operands, at);
}
static inline void multiply_16x8x16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, __half,
                                    BTX_EMULATION_SITE)
{
    btx_emulation::multiply_operands operands = {c, a, {b0, b1}};
    btx_emulation::collective(btx_emulation::operation::multiply_f16, BTX_ALL_LANES, &operands, at);
}

/* ---- the instructions of hopper.cuh that attention_mass_sm90.cu has ------------------------------------------------
 *
 * A warp's share of a warpgroup's product is its own: its 16 rows, all columns. So a warp is all that has to meet. */

#define BTX_SM90A

static inline unsigned shared_address(const void *shared)
{
    return (unsigned)((const unsigned char *)shared - btx_emulation::dynamic_shared());
}
static inline void wgmma_fence(void)
{
}
static inline void fence_async_proxy(void)
{
}
template <int N> static inline void wgmma_hold(float (&)[N])
{
}
static inline void wgmma_m64n64k16_registers(float (&sum)[32], const unsigned (&a)[4], uint64_t b, __nv_bfloat16,
                                             int accumulate, BTX_EMULATION_SITE)
{
    btx_emulation::wgmma_operands operands = {sum, a, b, accumulate};
    btx_emulation::collective(btx_emulation::operation::wgmma_bf16, BTX_ALL_LANES, &operands, at);
}
static inline void wgmma_m64n64k16_registers(float (&sum)[32], const unsigned (&a)[4], uint64_t b, __half,
                                             int accumulate, BTX_EMULATION_SITE)
{
    btx_emulation::wgmma_operands operands = {sum, a, b, accumulate};
    btx_emulation::collective(btx_emulation::operation::wgmma_f16, BTX_ALL_LANES, &operands, at);
}
static inline void wgmma_commit(void)
{
    btx_emulation::wgmma_commit();
}
template <int pending> static inline void wgmma_wait(BTX_EMULATION_SITE)
{
    unsigned operands = pending;
    btx_emulation::collective(btx_emulation::operation::wgmma_wait, BTX_ALL_LANES, &operands, at);
}

/* ---- the runtime: runtime.cpp -------------------------------------------------------------------------------------
 */

typedef enum cudaError {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInitializationError = 3,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorECCUncorrectable = 214,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorLaunchOutOfResources = 701,
    cudaErrorLaunchTimeout = 702,
    cudaErrorAssert = 710,
    cudaErrorHardwareStackError = 714,
    cudaErrorIllegalInstruction = 715,
    cudaErrorMisalignedAddress = 716,
    cudaErrorInvalidAddressSpace = 717,
    cudaErrorInvalidPc = 718,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906,
    cudaErrorUnknown = 999
} cudaError_t;

typedef enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
} cudaMemcpyKind;

typedef enum cudaStreamCaptureStatus {
    cudaStreamCaptureStatusNone,
    cudaStreamCaptureStatusActive,
    cudaStreamCaptureStatusInvalidated
} cudaStreamCaptureStatus;

typedef enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
} cudaDeviceAttr;

typedef enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
} cudaFuncAttribute;

struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
    int warpSize, maxThreadsPerBlock, major, minor, multiProcessorCount, l2CacheSize;
};

typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
#define cudaStreamLegacy ((cudaStream_t)0x1)
#define cudaStreamPerThread ((cudaStream_t)0x2)
#define cudaStreamDefault 0u
#define cudaStreamNonBlocking 1u
#define cudaEventDefault 0u
#define cudaEventBlockingSync 1u
#define cudaEventDisableTiming 2u
#define cudaHostAllocDefault 0u
#define cudaHostAllocPortable 1u
#define cudaHostAllocMapped 2u
#define cudaHostAllocWriteCombined 4u
#define CUDART_VERSION 13000
#define CUDART_CB

cudaError_t cudaMalloc(void **memory, size_t bytes);
cudaError_t cudaFree(void *memory);
cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned flags);
cudaError_t cudaMallocHost(void **memory, size_t bytes);
cudaError_t cudaFreeHost(void *memory);
cudaError_t cudaMemGetInfo(size_t *free, size_t *total);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = 0);
cudaError_t cudaMemset(void *to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = 0);
cudaError_t cudaStreamCreate(cudaStream_t *stream);
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaStreamQuery(cudaStream_t stream);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags = 0);
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status);
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*fn)(void *), void *data);
cudaError_t cudaEventCreate(cudaEvent_t *event);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = 0);
cudaError_t cudaEventQuery(cudaEvent_t event);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDeviceCount(int *count);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize(void);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
const char *cudaGetErrorString(cudaError_t error); /* of a failure in a kernel: what went wrong, and where */
const char *cudaGetErrorName(cudaError_t error);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value);

template <typename T> static inline cudaError_t cudaMalloc(T **memory, size_t bytes)
{
    return cudaMalloc((void **)memory, bytes);
}
template <typename T> static inline cudaError_t cudaMallocHost(T **memory, size_t bytes)
{
    return cudaMallocHost((void **)memory, bytes);
}
template <typename T> static inline cudaError_t cudaHostAlloc(T **memory, size_t bytes, unsigned flags)
{
    return cudaHostAlloc((void **)memory, bytes, flags);
}
template <typename T> static inline cudaError_t cudaFuncSetAttribute(T *kernel, cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel), attribute, value);
}
template <typename T>
static inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, T *, int threads, size_t bytes)
{
    const int by_memory = (int)(233472 / (bytes + 1024)), by_threads = 2048 / threads;
    *blocks = by_memory < by_threads ? by_memory : by_threads;
    return cudaSuccess;
}

/* ---- for tests ----------------------------------------------------------------------------------------------------
 */

extern "C" {
/* Fails calls to come, "cudaMalloc:3" the third one of that function, "launch:7" the seventh kernel, "cudaMalloc:1+"
 * every one, "cudaGetDeviceCount:1:35" with that error; several parted by commas; NULL: none. What fails in a kernel,
 * or in a wait for one, is sticky. The variable BTX_EMULATE_FAIL holds the first ones. */
__attribute__((visibility("default"))) void btx_emulation_fail(const char *faults);
/* Forgets errors, the sticky one as well, and faults. Work not yet done is dropped. */
__attribute__((visibility("default"))) void btx_emulation_reset(void);
/* So many devices, which are all the same one, and which of them the calling thread's is now; at first one. */
__attribute__((visibility("default"))) void btx_emulation_devices(int count, int current);
/* The calling thread's. */
__attribute__((visibility("default"))) int btx_emulation_current_device(void);
/* Kernels launched since btx_emulation_devices by threads whose device this was. */
__attribute__((visibility("default"))) int64_t btx_emulation_launches_on(int device);
/* Kernels launched since the process began. */
__attribute__((visibility("default"))) int64_t btx_emulation_launches(void);
/* Memory, streams and events that are not freed. */
__attribute__((visibility("default"))) int64_t btx_emulation_live(void);
/* Calls of a function so far, "launch" included; 0 for what nobody called. */
__attribute__((visibility("default"))) int64_t btx_emulation_calls(const char *function);
/* The schedule of the launches to come; BTX_EMULATE_SEED, or 1, at first. */
__attribute__((visibility("default"))) void btx_emulation_seed(uint64_t seed);
/* Nonzero: work is done no sooner than somebody waits for it, as on a slow device (BTX_EMULATE_DEFER). */
__attribute__((visibility("default"))) void btx_emulation_defer(int defer);
/* Does up to so many pieces (copies, kernels, events) of what was deferred. How many there were. */
__attribute__((visibility("default"))) int btx_emulation_advance(int pieces);
/* Nonzero: all streams are captured into a CUDA graph, the only one; zero: no longer. What is called for meanwhile is
 * not done. Whether nothing has invalidated the capture: memory allocated or freed, a wait. */
__attribute__((visibility("default"))) int btx_emulation_capture(int capture);
/* Calls for what the graph holds. */
__attribute__((visibility("default"))) void btx_emulation_replay(void);
/* Nonzero: executors take the kernels for sm_90a that are emulated (BTX_EMULATE_SM90A). */
__attribute__((visibility("default"))) int btx_emulation_sm90a(void);
}

#endif /* BTX_EMULATION_H */
