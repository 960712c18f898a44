/* selftest.cpp - the emulation itself: kernels whose results are known, and mistakes that must be found.
 *
 * Prints a line per check that fails; the last line counts them. */
#include <vector>

#include "emulation.h"

static int num_checks, num_failures;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        num_checks++;                                                                                                  \
        if (!(condition)) {                                                                                            \
            num_failures++;                                                                                            \
            printf("selftest.cpp:%d: failed: %s\n", __LINE__, #condition);                                             \
        }                                                                                                              \
    } while (0)

/* Device memory that is released with its scope. */
template <typename T> struct device_array {
    T *data = nullptr;
    explicit device_array(size_t count)
    {
        CHECK(cudaMalloc(&data, count * sizeof(T)) == cudaSuccess);
    }
    ~device_array()
    {
        cudaFree(data);
    }
    T &operator[](size_t i)
    {
        return data[i];
    }
};

/* The launch failed with this error, and its message says so. */
static bool failed_with(cudaError_t error, const char *word)
{
    const cudaError_t found = cudaDeviceSynchronize();
    const bool right = found == error && strstr(cudaGetErrorString(found), word) != nullptr;
    if (!right)
        printf("found %s: %s\n", cudaGetErrorName(found), cudaGetErrorString(found));
    btx_emulation_reset();
    return right;
}

static const cudaStream_t stream = nullptr;
#ifdef __SANITIZE_THREAD__
static const bool sees_accesses = true;
#else
static const bool sees_accesses = false;
#endif

/* ---- indices, memory ----------------------------------------------------------------------------------------------
 */

__global__ void write_indices(unsigned *out)
{
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    atomicAdd(&out[block * blockDim.x * blockDim.y * blockDim.z + thread], block * 1000 + thread);
}

/* Reads shared memory nobody wrote: must be NaN in every block. */
template <int count> __global__ void read_fresh(float *out)
{
    __shared__ float fixed[count];
    BTX_DYNAMIC_SHARED(memory);
    float *dynamic = (float *)memory;
    out[(blockIdx.x * 2) * blockDim.x + threadIdx.x] = fixed[threadIdx.x];
    out[(blockIdx.x * 2 + 1) * blockDim.x + threadIdx.x] = dynamic[threadIdx.x];
    __syncthreads();
    fixed[threadIdx.x] = dynamic[threadIdx.x] = 1.0f;
}

static void test_memory(void)
{
    const dim3 grid(3, 2, 2), block(5, 3, 2);
    device_array<unsigned> out(12 * 30);
    CHECK(out[0] == 0xffffffffu && out[12 * 30 - 1] == 0xffffffffu);
    cudaMemset(out.data, 0, 12 * 30 * sizeof(unsigned));
    BTX_LAUNCH(write_indices, grid, block, 0, stream, out.data);
    for (unsigned i = 0; i < 12 * 30; i++)
        CHECK(out[i] == i / 30 * 1000 + i % 30);

    device_array<float> fresh(4 * 2 * 64);
    BTX_LAUNCH((read_fresh<64>), 4, 64, 64 * sizeof(float), stream, fresh.data);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
#ifndef __SANITIZE_ADDRESS__
    for (int i = 0; i < 4 * 2 * 64; i++)
        CHECK(fresh[i] != fresh[i]);
#endif
}

/* ---- barriers -----------------------------------------------------------------------------------------------------
 */

/* Reverses its block's values through shared memory, again and again. */
template <bool before, bool after> __global__ void reverse(int *values, int times)
{
    __shared__ int copy[256];
    for (int i = 0; i < times; i++) {
        copy[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
        if (before)
            __syncthreads();
        values[blockIdx.x * blockDim.x + threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
        if (after)
            __syncthreads();
    }
}

template <bool before, bool after> static int wrong_after_reverse(int num_threads)
{
    int wrong = 0;
    device_array<int> values(3 * (size_t)num_threads);
    for (int i = 0; i < 3 * num_threads; i++)
        values[(size_t)i] = i;
    BTX_LAUNCH((reverse<before, after>), 3, num_threads, 0, stream, values.data, 3);
    wrong += cudaDeviceSynchronize() != cudaSuccess; /* where accesses are seen, see races.cpp */
    btx_emulation_reset();
    for (int i = 0; i < 3 * num_threads; i++)
        wrong += values[(size_t)i] != i / num_threads * num_threads + num_threads - 1 - i % num_threads;
    return wrong;
}

__global__ void count_votes(int *out)
{
    const int odd = threadIdx.x % 2;
    if (threadIdx.x >= 90) /* who has returned counts as arrived */
        return;
    const int count = __syncthreads_count(odd), any = __syncthreads_or(threadIdx.x == 77),
              all = __syncthreads_and(threadIdx.x != 77);
    out[threadIdx.x] = count * 100 + any * 10 + all;
}

__global__ void wait_apart(int half)
{
    if ((int)threadIdx.x < half)
        __syncthreads();
    else
        __shfl_sync(BTX_ALL_LANES, 1, 0);
}

__global__ void meet_at_two_places(void)
{
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void diverge_in_a_warp(void)
{
    if (threadIdx.x % 2)
        __syncwarp();
    else
        __shfl_xor_sync(BTX_ALL_LANES, 1, 2);
}

static void test_barriers(void)
{
    int before = 0, after = 0;
    for (int threads : {32, 96, 256}) {
        CHECK((wrong_after_reverse<true, true>(threads)) == 0);
        before += (wrong_after_reverse<false, true>(threads)) != 0;
        after += (wrong_after_reverse<true, false>(threads)) != 0;
    }
    for (int seed = 0; seed < 10; seed++) {
        btx_emulation_seed((uint64_t)seed);
        CHECK((wrong_after_reverse<true, true>(64)) == 0);
        before += (wrong_after_reverse<false, true>(64)) != 0;
        after += (wrong_after_reverse<true, false>(64)) != 0;
    }
    CHECK(before >= (sees_accesses ? 13 : 12)); /* a missing barrier shows under nearly every schedule */
    CHECK(after >= (sees_accesses ? 13 : 6));

    device_array<int> votes(96);
    BTX_LAUNCH(count_votes, 1, 96, 0, stream, votes.data);
    for (size_t i = 0; i < 90; i++)
        CHECK(votes[i] == 45 * 100 + 10);

    BTX_LAUNCH(wait_apart, 1, 64, 0, stream, 32);
    CHECK(cudaDeviceSynchronize() == cudaSuccess); /* warps need not wait for each other, and the others returned */
    BTX_LAUNCH(wait_apart, 2, 64, 0, stream, 16);
    CHECK(failed_with(cudaErrorLaunchFailure, "wait_apart, block"));
    BTX_LAUNCH(wait_apart, 2, 64, 0, stream, 48);
    CHECK(failed_with(cudaErrorLaunchFailure, "deadlock"));
    BTX_LAUNCH(meet_at_two_places, 1, 64, 0, stream);
    CHECK(failed_with(cudaErrorLaunchFailure, "meets another"));
    BTX_LAUNCH(diverge_in_a_warp, 1, 32, 0, stream);
    CHECK(failed_with(cudaErrorLaunchFailure, "__syncwarp"));
}

/* ---- warps --------------------------------------------------------------------------------------------------------
 */

__global__ void shuffle_all(int *out)
{
    const int lane = (int)threadIdx.x, value = 100 + lane;
    int *own = out + 16 * lane;
    own[0] = __shfl_sync(BTX_ALL_LANES, value, 5);
    own[1] = __shfl_sync(BTX_ALL_LANES, value, lane + 1, 8);
    own[2] = __shfl_xor_sync(BTX_ALL_LANES, value, 3);
    own[3] = __shfl_xor_sync(BTX_ALL_LANES, value, 16, 16);
    own[4] = __shfl_up_sync(BTX_ALL_LANES, value, 2u);
    own[5] = __shfl_down_sync(BTX_ALL_LANES, value, 3u, 8);
    own[6] = (int)__ballot_sync(BTX_ALL_LANES, lane % 3 == 0);
    own[7] = __any_sync(BTX_ALL_LANES, lane == 31) * 2 + __all_sync(BTX_ALL_LANES, lane < 31);
    own[8] = (int)__reduce_add_sync(BTX_ALL_LANES, (unsigned)lane);
    own[9] = __reduce_min_sync(BTX_ALL_LANES, -lane);
    own[10] = (int)__reduce_max_sync(BTX_ALL_LANES, (unsigned)-lane);
    own[11] = (int)__match_any_sync(BTX_ALL_LANES, (unsigned)lane / 16);
    own[12] = (int)__shfl_xor_sync(BTX_ALL_LANES, 1.5 * lane, 1); /* 8 bytes */
    const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;  /* two groups, each on its own */
    int sum = lane;
    for (int mask = 8; mask > 0; mask /= 2)
        sum += __shfl_xor_sync(half, sum, mask);
    own[13] = sum;
    if (lane >= 8) /* who has returned is not waited for */
        return;
    own[14] = (int)__reduce_add_sync(BTX_ALL_LANES, 1u);
    own[15] = __shfl_sync(BTX_ALL_LANES, value, 9); /* and has no value */
}

__global__ void stray_lane(void)
{
    __syncwarp(0xfffeu);
}

static void test_warps(void)
{
    device_array<int> out(16 * 32);
    BTX_LAUNCH(shuffle_all, 1, 32, 0, stream, out.data);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    for (int lane = 0; lane < 32; lane++) {
        const int *own = out.data + 16 * lane;
        CHECK(own[0] == 105);
        CHECK(own[1] == 100 + (lane & ~7) + (lane + 1) % 8);
        CHECK(own[2] == 100 + (lane ^ 3));
        CHECK(own[3] == (lane < 16 ? 100 + lane : 100 + lane - 16));
        CHECK(own[4] == 100 + (lane < 2 ? lane : lane - 2));
        CHECK(own[5] == 100 + (lane % 8 + 3 < 8 ? lane + 3 : lane));
        CHECK((unsigned)own[6] == 0x49249249u);
        CHECK(own[7] == 2);
        CHECK(own[8] == 496);
        CHECK(own[9] == -31);
        CHECK(own[10] == -1);
        CHECK((unsigned)own[11] == (lane < 16 ? 0xffffu : 0xffff0000u));
        CHECK(own[12] == (int)(1.5 * (lane ^ 1)));
        CHECK(own[13] == (lane < 16 ? 120 : 376));
        CHECK(lane >= 8 || (own[14] == 8 && own[15] == -1));
    }
    BTX_LAUNCH(stray_lane, 1, 32, 0, stream);
    CHECK(failed_with(cudaErrorLaunchFailure, "own mask"));
}

/* ---- matrices -----------------------------------------------------------------------------------------------------
 */

template <typename T> static T element(float x);
template <> __nv_bfloat16 element(float x)
{
    return __float2bfloat16_rn(x);
}
template <> __half element(float x)
{
    return __float2half_rn(x);
}

/* c [16, 8] += a [16, 16] b [8, 16]^T, through shared memory rows of 24 elements. */
template <typename T> __global__ void multiply(const T *a, const T *b, float *c)
{
    __shared__ __align__(16) T rows[24][24];
    const int lane = (int)threadIdx.x;
    for (int i = lane; i < 24 * 16; i += 32)
        rows[i / 16][i % 16] = i < 256 ? a[i] : b[i - 256];
    __syncwarp();
    unsigned from_a[4], from_b[4];
    load_matrix_x4(from_a, &rows[lane % 16][lane / 16 * 8]);
    load_matrix_x4(from_b, &rows[16 + lane % 8][lane / 8 % 2 * 8]);
    float sum[4];
    for (int i = 0; i < 4; i++)
        sum[i] = c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
    multiply_16x8x16(sum, from_a, from_b[0], from_b[1], T());
    for (int i = 0; i < 4; i++)
        c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

__global__ void load_badly(int offset, const void *elsewhere)
{
    BTX_DYNAMIC_SHARED(memory);
    unsigned fragment[4];
    load_matrix_x4(fragment, elsewhere != nullptr ? elsewhere : memory + 16 * threadIdx.x + offset);
}

__global__ void load_vector(const float *from, float *to)
{
    const float4 vector = *(const float4 *)(const void *)from;
    *to = vector.x + vector.y + vector.z + vector.w;
}

template <typename T> static void test_product(void)
{
    device_array<T> a(256), b(128);
    device_array<float> c(128);
    std::vector<float> x(256), y(128);
    for (size_t i = 0; i < 256; i++)
        a[i] = element<T>(x[i] = (float)((int)(i * 37 % 41) - 20));
    for (size_t i = 0; i < 128; i++) {
        b[i] = element<T>(y[i] = (float)((int)(i * 29 % 31) - 15) / 16.0f);
        c[i] = (float)i;
    }
    BTX_LAUNCH((multiply<T>), 1, 32, 0, stream, a.data, b.data, c.data);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    for (size_t i = 0; i < 16; i++) {
        for (size_t j = 0; j < 8; j++) {
            float sum = (float)(i * 8 + j); /* all sums are exact */
            for (size_t k = 0; k < 16; k++)
                sum += x[i * 16 + k] * y[j * 16 + k];
            CHECK(c[i * 8 + j] == sum);
        }
    }
}

static void test_matrices(void)
{
    test_product<__nv_bfloat16>();
    test_product<__half>();
    BTX_LAUNCH(load_badly, 1, 32, 512, stream, 0, nullptr);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    BTX_LAUNCH(load_badly, 1, 32, 528, stream, 8, nullptr);
    CHECK(failed_with(cudaErrorMisalignedAddress, "load_matrix_x4"));
    BTX_LAUNCH(load_badly, 1, 31, 512, stream, 0, nullptr);
    CHECK(failed_with(cudaErrorLaunchFailure, "without all 32 lanes"));
#ifndef __SANITIZE_ADDRESS__
    device_array<float> elsewhere(4);
    BTX_LAUNCH(load_badly, 1, 32, 512, stream, 0, elsewhere.data);
    CHECK(failed_with(cudaErrorIllegalAddress, "not in shared memory"));
#endif
}

static void test_alignment(void)
{
    device_array<float> memory(16);
    BTX_LAUNCH(load_vector, 1, 1, 0, stream, memory.data + 4, memory.data);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
#ifndef __SANITIZE_ADDRESS__ /* which ends the program */
    BTX_LAUNCH(load_vector, 1, 1, 0, stream, memory.data + 6, memory.data);
    CHECK(failed_with(cudaErrorMisalignedAddress, "not 16-byte aligned"));
#endif
}

/* ---- asynchronous copies ------------------------------------------------------------------------------------------
 */

/* Per thread three groups of 16 bytes; waited for all but pending of them. */
template <int pending> __global__ void copy_groups(const uint4 *from, uint4 *to)
{
    BTX_DYNAMIC_SHARED(memory);
    uint4 *own = (uint4 *)memory + 3 * threadIdx.x;
    for (unsigned i = 0; i < 3; i++) {
        own[i] = make_uint4(7, 7, 7, 7);
        copy_async_16_or_zero(&own[i], &from[3 * threadIdx.x + i], i < 2 || threadIdx.x % 2 == 0);
        copy_async_commit();
    }
    copy_async_wait<pending>();
    for (unsigned i = 0; i < 3; i++)
        to[3 * threadIdx.x + i] = own[i];
}

template <int pending> static void test_copy(void)
{
    device_array<uint4> from(3 * 40), to(3 * 40);
    for (unsigned i = 0; i < 3 * 40; i++)
        from[i] = make_uint4(i, i + 1, i + 2, i + 3);
    BTX_LAUNCH((copy_groups<pending>), 1, 40, 3 * 40 * 16, stream, from.data, to.data);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    for (unsigned i = 0; i < 3 * 40; i++) {
        const bool came = i % 3 + pending < 3, zero = i % 6 == 5;
        CHECK(to[i].x == (!came ? 0xffffffffu : zero ? 0 : i) && to[i].w == (!came ? 0xffffffffu : zero ? 0 : i + 3));
    }
}

__global__ void copy_badly(const unsigned char *from, unsigned char *to)
{
    BTX_DYNAMIC_SHARED(memory);
    copy_async_16(to != nullptr ? to : memory, from);
}

static void test_copies(void)
{
    test_copy<0>();
    test_copy<1>();
    test_copy<2>();
    device_array<unsigned char> from(64);
    BTX_LAUNCH(copy_badly, 1, 1, 16, stream, from.data + 8, nullptr);
    CHECK(failed_with(cudaErrorMisalignedAddress, "copy_async_16"));
#ifndef __SANITIZE_ADDRESS__
    BTX_LAUNCH(copy_badly, 1, 1, 16, stream, from.data, from.data + 32);
    CHECK(failed_with(cudaErrorIllegalAddress, "not in shared memory"));
    BTX_LAUNCH(copy_badly, 1, 1, 8, stream, from.data, nullptr); /* 16 bytes into 8 */
    CHECK(failed_with(cudaErrorIllegalAddress, "not in shared memory"));
#endif
}

/* ---- races: found where results are right by chance ------------------------------------------------------------- */

__global__ void exchange(int *out, int kind)
{
    __shared__ int shared[64];
    const unsigned thread = threadIdx.x;
    if (kind == 1) { /* lanes meet in a shuffle, which orders nothing */
        shared[thread] = 1;
        __shfl_xor_sync(BTX_ALL_LANES, 1, 1);
        out[thread] = shared[thread ^ 1];
    }
    else if (kind == 2) { /* another warp needs more than __syncwarp */
        shared[thread] = 1;
        __syncwarp();
        out[thread] = shared[thread ^ 32];
    }
    else if (kind == 3) { /* blocks are never ordered */
        out[thread] = (int)blockIdx.x;
    }
    else if (kind == 4) { /* the same value twice */
        out[0] = 7;
    }
    else if (kind == 5) { /* a counter that one thread looks at too early */
        if (thread == 0)
            shared[0] = 0;
        __syncthreads();
        atomicAdd(&shared[0], 1);
        if (thread == 33)
            out[0] = shared[0];
    }
    else { /* all as it should be */
        shared[thread] = 1;
        __syncwarp();
        out[thread] = shared[thread ^ 1];
        __syncthreads();
        out[64 + thread] = shared[thread ^ 32];
        __syncthreads();
        if (thread == 0)
            shared[0] = 0;
        __syncthreads();
        atomicAdd(&shared[0], 1);
        atomicMax(&out[128], 5);
        __syncthreads();
        if (thread < 32 && thread % 2 == 0) {
            shared[thread] = out[64];
            __syncwarp(0x55555555u);
            out[thread] = shared[thread ^ 2];
        }
    }
}

static void test_races(void)
{
    device_array<int> out(129);
    BTX_LAUNCH(exchange, 1, 64, 0, stream, out.data, 0);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    for (int kind = 1; kind <= 5 && sees_accesses; kind++) {
        BTX_LAUNCH(exchange, kind == 3 ? 2 : 1, 64, 0, stream, out.data, kind);
        CHECK(failed_with(cudaErrorIllegalAddress, "race: "));
    }
}

/* ---- bounds -------------------------------------------------------------------------------------------------------
 */

__global__ void write_far(unsigned char *device, int dynamic, int offset)
{
    BTX_DYNAMIC_SHARED(memory);
    (dynamic ? memory : device)[offset] = 1;
}

static void test_bounds(void)
{
#ifndef __SANITIZE_ADDRESS__ /* which would end the program */
    device_array<unsigned char> memory(100);
    BTX_LAUNCH(write_far, 1, 1, 100, stream, memory.data, 1, 99);
    BTX_LAUNCH(write_far, 1, 1, 100, stream, memory.data, 0, 99);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    BTX_LAUNCH(write_far, 1, 1, 100, stream, memory.data, 1, 100);
    CHECK(failed_with(cudaErrorIllegalAddress, "byte 100 of 100 bytes of dynamic shared"));
    BTX_LAUNCH(write_far, 1, 1, 100, stream, memory.data, 1, -1);
    CHECK(failed_with(cudaErrorIllegalAddress, "before its dynamic shared"));
    BTX_LAUNCH(write_far, 1, 1, 100, stream, memory.data, 0, 102);
    CHECK(failed_with(cudaErrorIllegalAddress, "kernel write_far: wrote to byte 102 of 100 bytes of device memory"));
    memory[102] = 0xfb; /* the guard as it was */
#endif
    unsigned char *never = nullptr;
    BTX_LAUNCH(write_far, 1, 1025, 0, stream, never, 0, 0);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
    BTX_LAUNCH(write_far, dim3(1, 65536), 1, 0, stream, never, 0, 0);
    CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
    BTX_LAUNCH(write_far, 1, 1, (48 << 10) + 1, stream, never, 1, 0);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    int most = 0;
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && most > 48 << 10);
    CHECK(cudaFuncSetAttribute(write_far, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess);
    CHECK(cudaFuncSetAttribute(write_far, cudaFuncAttributeMaxDynamicSharedMemorySize, most + 1) != cudaSuccess);
    BTX_LAUNCH(write_far, 1, 1, (size_t)most, stream, never, 1, most - 1);
    CHECK(cudaDeviceSynchronize() == cudaSuccess);
    cudaGetLastError();
}

/* ---- numbers ------------------------------------------------------------------------------------------------------
 */

static void test_numbers(void)
{
    int wrong = 0;
    for (unsigned i = 0; i < 65536; i++) {
        const __half h = __ushort_as_half((unsigned short)i);
        const __nv_bfloat16 b = __ushort_as_bfloat16((unsigned short)i);
        const unsigned exponent = i >> 10 & 31u, fraction = i & 1023u;
        const float value = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                            : exponent != 0 ? ldexpf((float)(1024 + fraction), (int)exponent - 25)
                                            : ldexpf((float)fraction, -24);
        const float x = __half2float(h), signed_value = i >> 15 ? -value : value;
        wrong += !(x == signed_value || (x != x && value != value));
        wrong += x == x && __half_as_ushort(__float2half_rn(x)) != i;
        wrong += __bfloat162float(b) == __bfloat162float(b) &&
                 __bfloat16_as_ushort(__float2bfloat16_rn(__bfloat162float(b))) != i;
        if (i < 0x7bffu) { /* halfway to the next one: to even; a little off: to the nearer one */
            const float next = __half2float(__ushort_as_half((unsigned short)(i + 1))), middle = 0.5f * (x + next);
            wrong += __half_as_ushort(__float2half_rn(middle)) != i + i % 2;
            wrong += __half_as_ushort(__float2half_rn(nextafterf(middle, 0.0f))) != i;
            wrong += __half_as_ushort(__float2half_rn(nextafterf(middle, INFINITY))) != i + 1;
        }
        if (i < 0x7f7fu) {
            const float middle = __uint_as_float(i << 16 | 0x8000u);
            wrong += __bfloat16_as_ushort(__float2bfloat16_rn(middle)) != i + i % 2;
            wrong += __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float((i << 16 | 0x8000u) - 1))) != i;
            wrong += __bfloat16_as_ushort(__float2bfloat16_rn(__uint_as_float((i << 16 | 0x8000u) + 1))) != i + 1;
        }
    }
    CHECK(wrong == 0);
    CHECK(isinf(__half2float(__float2half_rn(65520.0f))) && __half2float(__float2half_rn(65519.0f)) == 65504.0f);
    CHECK(isnan(__bfloat162float(__float2bfloat16_rn(NAN))) && isinf(__bfloat162float(__float2bfloat16_rn(3.4e38f))));
    CHECK(exp2_fast(-INFINITY) == 0.0f && exp2_fast(-127.0f) == 0.0f && exp2_fast(3.0f) == 8.0f);
    CHECK(__popc(0xf0f0u) == 8 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4 && __ffs(0) == 0 &&
          __brev(1) == 1u << 31);
    CHECK(max(3u, 5) == 5u && min(-1, 2) == -1 && max(-1L, 2L) == 2L && max(NAN, 1.0f) == 1.0f);
    CHECK(alignof(uint4) == 16 && alignof(float2) == 8 && sizeof(__nv_bfloat162) == 4);
}

/* ---- the runtime --------------------------------------------------------------------------------------------------
 */

__global__ void add_one(int *value)
{
    atomicAdd(value, 1);
}

static void test_runtime(void)
{
    const int64_t live = btx_emulation_live(), launches = btx_emulation_launches();
    int *value = nullptr, *host = nullptr, after = 0, count = 0;
    cudaStream_t own;
    cudaEvent_t begin, end;
    float milliseconds = -1.0f;
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 1);
    CHECK(cudaSetDevice(1) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
    btx_emulation_devices(2, 0);
    CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2 && cudaSetDevice(1) == cudaSuccess);
    CHECK(cudaGetDevice(&count) == cudaSuccess && count == 1 && btx_emulation_current_device() == 1);
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
    btx_emulation_devices(1, 0);
    CHECK(cudaStreamCreateWithFlags(&own, cudaStreamNonBlocking) == cudaSuccess);
    CHECK(cudaEventCreate(&begin) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
    CHECK(cudaMalloc(&value, sizeof *value) == cudaSuccess && cudaMallocHost(&host, sizeof *host) == cudaSuccess);
    CHECK(btx_emulation_live() == live + 5);
    CHECK(cudaMemcpy(value, host, 5, cudaMemcpyDefault) == cudaErrorInvalidValue && cudaGetLastError() != cudaSuccess);
    *host = 41;
    CHECK(cudaEventRecord(begin, own) == cudaSuccess);
    CHECK(cudaMemcpyAsync(value, host, sizeof *value, cudaMemcpyHostToDevice, own) == cudaSuccess);
    BTX_LAUNCH(add_one, 1, 1, 0, own, value);
    CHECK(cudaEventRecord(end, own) == cudaSuccess && cudaEventQuery(end) == cudaSuccess);
    CHECK(cudaMemcpyAsync(&after, value, sizeof after, cudaMemcpyDeviceToHost, own) == cudaSuccess && after == 42);
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end) == cudaSuccess && milliseconds >= 0.0f);

    btx_emulation_defer(1); /* nothing happens before somebody waits */
    *host = 1;
    CHECK(cudaMemcpyAsync(value, host, sizeof *value, cudaMemcpyHostToDevice, own) == cudaSuccess);
    *host = 10; /* too early: the copy sees it */
    BTX_LAUNCH(add_one, 1, 1, 0, own, value);
    CHECK(cudaEventRecord(end, own) == cudaSuccess && *value == 42);
    CHECK(cudaEventQuery(end) == cudaErrorNotReady && cudaEventQuery(end) == cudaErrorNotReady);
    CHECK(cudaEventQuery(end) == cudaErrorNotReady && cudaEventQuery(end) == cudaSuccess && *value == 11);
    btx_emulation_defer(0);

    btx_emulation_fail("cudaMalloc:2,cudaStreamCreate:1");
    int *first = nullptr, *second = nullptr;
    CHECK(cudaMalloc(&first, 4) == cudaSuccess && cudaMalloc(&second, 4) == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess);
    CHECK(cudaFree(first) == cudaSuccess && second == nullptr);
    btx_emulation_fail("cudaGetDeviceCount:1+:35");
    CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver && count == 0);
    CHECK(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver &&
          cudaGetLastError() == cudaErrorInsufficientDriver);
    btx_emulation_fail("launch:2");
    BTX_LAUNCH(add_one, 1, 1, 0, own, value);
    CHECK(cudaDeviceSynchronize() == cudaSuccess && *value == 12);
    BTX_LAUNCH(add_one, 1, 1, 0, own, value);
    CHECK(cudaPeekAtLastError() == cudaErrorIllegalAddress && cudaStreamSynchronize(own) == cudaErrorIllegalAddress);
    CHECK(cudaGetLastError() == cudaErrorIllegalAddress && cudaGetLastError() == cudaErrorIllegalAddress &&
          *value == 12);
    CHECK(strstr(cudaGetErrorString(cudaErrorIllegalAddress), "add_one") != nullptr);
    btx_emulation_reset();
    CHECK(cudaGetLastError() == cudaSuccess && btx_emulation_launches() == launches + 4);

    CHECK(cudaFree(value) == cudaSuccess && cudaFree(nullptr) == cudaSuccess && cudaFreeHost(host) == cudaSuccess);
    CHECK(cudaFree(value) == cudaErrorInvalidValue && cudaGetLastError() != cudaSuccess);
    CHECK(cudaEventDestroy(begin) == cudaSuccess && cudaEventDestroy(end) == cudaSuccess);
    CHECK(cudaStreamDestroy(own) == cudaSuccess && btx_emulation_live() == live);
}

int main(void)
{
    fprintf(stderr, "(the mistakes told from here on are meant)\n");
    test_memory();
    test_barriers();
    test_warps();
    test_matrices();
    test_alignment();
    test_copies();
    test_races();
    test_bounds();
    test_numbers();
    test_runtime();
    CHECK(btx_emulation_live() == 0);
    printf("%d checks, %d failed\n", num_checks, num_failures);
    return num_failures != 0;
}
