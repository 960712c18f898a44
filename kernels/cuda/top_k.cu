/* top_k.cu - the prior positions of largest attention mass, then the window: the rows of a rewrite
 * (arXiv 2505.16950, section 3.2, the set I).
 *
 * A radix select, one block for a step of a layer, all of them in one launch: bytes from the most significant on, each
 * pass counting the values that share the bytes found so far. Exact; among equal values the smaller positions are
 * taken. */
#include "operations.cuh"

#define THREADS 1024
#define WARPS (THREADS / BTX_WARP)
#define BINS 256
#define RESIDENT 49152 /* values that are kept in shared memory, at most */
#define PARTS_AT_ONCE 8 /* loads on their way */

/* An integer that orders as the value does. NaN counts as zero, and so does -0. */
__device__ static inline unsigned order_of(float value)
{
    const unsigned bits = value < 0.0f || value > 0.0f ? __float_as_uint(value) : 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* Block: a step, a layer. mass [layers, num_parts, total_prior]: the sum replaces the first part, as orders. */
__global__ void __launch_bounds__(THREADS) top_k_kernel(const device_plan plan, const int32_t num_parts,
                                                        const int32_t resident, float *mass, int32_t *positions)
{
    BTX_DYNAMIC_SHARED(shared);
    __shared__ unsigned histogram[BINS], found, wanted;
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

    mass += (int64_t)blockIdx.y * num_parts * plan.total_prior + step.prior_offset;
    unsigned *orders = n <= resident ? (unsigned *)shared : (unsigned *)mass;
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
        orders[i] = order_of(sum);
    }
    if (threadIdx.x == 0)
        found = 0, wanted = (unsigned)count;
    unsigned mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            histogram[i] = 0;
        __syncthreads();
        const unsigned prefix = found;
        for (int32_t i = threadIdx.x; i < n; i += THREADS) {
            const unsigned order = orders[i];
            if ((order & mask) == prefix)
                atomicAdd(&histogram[order >> shift & 255], 1u);
        }
        __syncthreads();
        if (warp == 0) {
            /* Lane l has the bins [8 l, 8 l + 8), counted from the largest. */
            unsigned own = 0, before, left = wanted;
            for (int i = 0; i < BINS / BTX_WARP; i++)
                own += histogram[BINS - 1 - (lane * (BINS / BTX_WARP) + i)];
            before = own;
            for (int distance = 1; distance < BTX_WARP; distance *= 2) {
                const unsigned other = __shfl_up_sync(BTX_ALL_LANES, before, distance);
                before += lane >= distance ? other : 0;
            }
            before -= own;
            __syncwarp();
            if (before < left && left <= before + own) {
                left -= before;
                int i = 0;
                unsigned bin;
                for (;; i++) {
                    bin = BINS - 1 - (lane * (BINS / BTX_WARP) + i);
                    if (histogram[bin] >= left)
                        break;
                    left -= histogram[bin];
                }
                found = prefix | bin << shift;
                wanted = left;
            }
        }
        mask |= 255u << shift;
        __syncthreads();
    }

    /* Each warp has a run of positions; how many it takes comes after how many the warps before it take. */
    const unsigned threshold = found, ties = wanted;
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
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    int32_t resident = plan.max_prior < RESIDENT ? plan.max_prior : RESIDENT;
    const int32_t room = (executor->shared_limit - 4096) / (int32_t)sizeof(unsigned);
    resident = resident < room ? resident : room;
    const int bytes = resident * (int)sizeof(unsigned);
    BTX_CUDA_TRY(cudaFuncSetAttribute(top_k_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                 "preparing top_k_kernel");
    BTX_LAUNCH(top_k_kernel, dim3((unsigned)plan.num_steps, (unsigned)num_layers_of(pass)), THREADS, bytes,
               executor->stream, plan, num_parts, resident, mass, positions);
    BTX_CUDA_CHECK("launching top_k_kernel");
    return BTX_OK;
}
