/* top_k.cu - the prior positions of largest attention mass, then the window: the rows of a rewrite
 * (arXiv 2505.16950, section 3.2, the set I).
 *
 * A radix select, one block for a step of a layer, all of them in one launch. Values are counted by their distance from
 * the smallest, 11 bits at a time from the highest that any distance has: masses lie within few powers of two, whose
 * exponents alone would crowd a few bins. Exact; among equal values the smaller positions are taken. */
#include "operations.cuh"

#define THREADS 1024
#define WARPS (THREADS / BTX_WARP)
#define DIGIT_BITS 11
#define BINS (1 << DIGIT_BITS) /* two a thread */
#define RESIDENT 49152         /* values that are kept in shared memory, at most */
#define PARTS_AT_ONCE 8        /* loads on their way */

/* An integer that orders as the value does. NaN counts as zero, and so does -0. */
__device__ static inline unsigned order_of(float value)
{
    const unsigned bits = value < 0.0f || value > 0.0f ? __float_as_uint(value) : 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

static_assert(BINS == 2 * THREADS, "a thread has two bins");

/* Sum over the warps of lower index, and over this warp's lanes up to this one. totals [WARPS] of shared memory. */
__device__ static inline unsigned scan_block(unsigned value, unsigned *totals)
{
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    unsigned sum = value;
    for (int distance = 1; distance < BTX_WARP; distance *= 2) {
        const unsigned other = __shfl_up_sync(BTX_ALL_LANES, sum, distance);
        sum += lane >= distance ? other : 0;
    }
    if (lane == BTX_WARP - 1)
        totals[warp] = sum;
    __syncthreads();
    for (int w = 0; w < warp; w++)
        sum += totals[w];
    return sum;
}

/* Block: a step, a layer. mass [layers, num_parts, total_prior]: the sum replaces the first part, as orders. */
__global__ void __launch_bounds__(THREADS) top_k_kernel(const device_plan plan, const int32_t num_parts,
                                                        const int32_t resident, float *mass, int32_t *positions)
{
    BTX_DYNAMIC_SHARED(shared);
    __shared__ unsigned histogram[BINS], found, wanted, smallest, largest;
    __shared__ unsigned above[WARPS], equal[WARPS];
    const device_step step = plan.steps[blockIdx.x];
    const int32_t n = step.num_prior, count = step.num_recalled;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    positions += (int64_t)blockIdx.y * plan.total_rows + step.row_offset;
    for (int32_t j = threadIdx.x; j < step.num_window; j += THREADS)
        positions[count + j] = step.sequence_begin + n + j;
    if (count == n) {
        for (int32_t i = threadIdx.x; i < n; i += THREADS)
            positions[i] = step.sequence_begin + i;
        return;
    }
    if (count == 0)
        return;

    if (threadIdx.x == 0)
        found = 0, wanted = (unsigned)count, smallest = 0xffffffffu, largest = 0;
    __syncthreads();
    mass += (int64_t)blockIdx.y * num_parts * plan.total_prior + step.prior_offset;
    unsigned *orders = n <= resident ? (unsigned *)shared : (unsigned *)mass;
    unsigned low = 0xffffffffu, high = 0;
    for (int32_t i = threadIdx.x; i < n; i += THREADS) {
        float sum = 0.0f;
        for (int32_t first = 0; first < num_parts; first += PARTS_AT_ONCE) {
            float value[PARTS_AT_ONCE];
#pragma unroll
            for (int part = 0; part < PARTS_AT_ONCE; part++)
                value[part] = first + part < num_parts ? mass[(first + part) * plan.total_prior + i] : 0.0f;
#pragma unroll
            for (int part = 0; part < PARTS_AT_ONCE; part++)
                sum += value[part];
        }
        const unsigned order = order_of(sum);
        orders[i] = order;
        low = min(low, order);
        high = max(high, order);
    }
    for (int distance = BTX_WARP / 2; distance > 0; distance /= 2) {
        low = min(low, __shfl_xor_sync(BTX_ALL_LANES, low, distance));
        high = max(high, __shfl_xor_sync(BTX_ALL_LANES, high, distance));
    }
    if (lane == 0) {
        atomicMin(&smallest, low);
        atomicMax(&largest, high);
    }
    __syncthreads();
    const unsigned base = smallest, range = largest - base;
    int shift = (range == 0 ? 1 : 32 - __clz((int)range)) - DIGIT_BITS; /* below 0: the digit is the value */
    unsigned mask = 0;
    for (shift = shift > 0 ? shift : 0;; shift = shift > DIGIT_BITS ? shift - DIGIT_BITS : 0) {
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            histogram[i] = 0;
        __syncthreads();
        const unsigned prefix = found, left = wanted;
        for (int32_t i = threadIdx.x; i < n; i += THREADS) {
            const unsigned distance = orders[i] - base;
            if ((distance & mask) == prefix)
                atomicAdd(&histogram[distance >> shift & (BINS - 1)], 1u);
        }
        __syncthreads();
        /* Counted from the largest: how many are in the bins up to this thread's second. */
        const int bin = BINS - 1 - 2 * threadIdx.x;
        const unsigned first = histogram[bin], second = histogram[bin - 1];
        const unsigned up_to = scan_block(first + second, above), before = up_to - first - second;
        if (before < left && left <= up_to) {
            const bool in_first = left <= before + first;
            found = prefix | (unsigned)(in_first ? bin : bin - 1) << shift;
            wanted = left - before - (in_first ? 0 : first);
        }
        mask |= (BINS - 1u) << shift;
        __syncthreads();
        if (shift == 0)
            break;
    }
    const unsigned threshold = base + found, ties = wanted;

    /* Each warp has a run of positions; how many it takes comes after how many the warps before it take. */
    const int32_t run = (n + THREADS - 1) / THREADS * BTX_WARP, begin = warp * run, end = min(begin + run, n);
    unsigned num_above = 0, num_equal = 0;
    for (int32_t i = begin; i < end; i += BTX_WARP) {
        const unsigned order = i + lane < end ? orders[i + lane] : 0;
        num_above += __popc(__ballot_sync(BTX_ALL_LANES, i + lane < end && order > threshold));
        num_equal += __popc(__ballot_sync(BTX_ALL_LANES, i + lane < end && order == threshold));
    }
    if (lane == 0)
        above[warp] = num_above, equal[warp] = num_equal;
    __syncthreads();
    num_above = num_equal = 0;
    for (int w = 0; w < warp; w++)
        num_above += above[w], num_equal += equal[w];
    const unsigned below = (1u << lane) - 1;
    for (int32_t i = begin; i < end; i += BTX_WARP) {
        const unsigned order = i + lane < end ? orders[i + lane] : 0;
        const bool is_above = i + lane < end && order > threshold, is_equal = i + lane < end && order == threshold;
        const unsigned lanes_above = __ballot_sync(BTX_ALL_LANES, is_above);
        const unsigned lanes_equal = __ballot_sync(BTX_ALL_LANES, is_equal);
        const unsigned rank_equal = num_equal + __popc(lanes_equal & below);
        const unsigned taken = num_above + __popc(lanes_above & below) + (rank_equal < ties ? rank_equal : ties);
        if (is_above || (is_equal && rank_equal < ties))
            positions[taken] = step.sequence_begin + i + lane;
        num_above += __popc(lanes_above);
        num_equal += __popc(lanes_equal);
    }
}

btx_status cuda_top_k(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions, btx_error *error)
{
    cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const int32_t room = (executor->shared_limit - 12288) / (int32_t)sizeof(unsigned);
    const int32_t most = RESIDENT < room ? RESIDENT : room, resident = plan.max_prior < most ? plan.max_prior : most;
    const int bytes = resident * (int)sizeof(unsigned);
    btx_status status = cuda_prepare(executor, (const void *)top_k_kernel, most * (int)sizeof(unsigned), error);
    if (status != BTX_OK)
        return status;
    BTX_LAUNCH(top_k_kernel, dim3((unsigned)plan.num_steps, (unsigned)num_layers_of(pass)), THREADS, bytes,
               executor->stream, plan, num_parts, resident, mass, positions);
    BTX_CUDA_CHECK("launching top_k_kernel");
    return BTX_OK;
}
