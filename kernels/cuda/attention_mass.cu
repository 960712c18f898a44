/* attention_mass.cu - exact attention mass of the prior keys (arXiv 2505.16950, section 3.2, equation for alpha).
 *
 * Two kernels. The first takes the log-sum-exp of every window query over all keys up to its own, in splits of a step's
 * keys; the second adds up the probabilities that a KV head's queries gave each prior key. Scores live in registers: no
 * attention matrix is kept. A row r of a KV head is the query of the window's position r / group and of the head's
 * r % group-th query head. Exponentials are of base 2, with scale * log2(e) folded into their argument.
 *
 * Sums have a fixed order that depends on the step alone: equal keys get bit-equal mass, whatever the batch.
 *
 * 16-bit caches of the usual head sizes go through matrix instructions, everything else through plain arithmetic. */
#include <stdint.h>

#include "operations.cuh"
#include "scores.cuh"

#define THREADS 128
#define SPLIT_KEYS 64 /* of a tile of the first kernel */
#define MASS_KEYS 128 /* of a tile of the second: 32 a warp */
#define MASS_ROWS 256 /* queries that stay in shared memory, at most */
#define GENERAL_TILE 32

static_assert(BTX_LSE_MIN_KEYS % SPLIT_KEYS == 0, "splits consist of whole tiles");
static_assert(BTX_MASS_MIN_KEYS % MASS_KEYS == 0, "ranges consist of whole tiles");

/* ---- 16-bit caches ------------------------------------------------------------------------------------------------
 */

/* Scores of the warp's rows with SPLIT_KEYS keys from first_key on, added to the rows' sums. MASKED: a row's query may
 * see no key behind its last_key. */
template <typename T, int D, int TILES, bool MASKED>
__device__ static inline void add_tile(const unsigned (&query)[TILES][D / 16][4], const T *keys, int32_t first_key,
                                       const int32_t (&last_key)[TILES][2], float scale, partial_sum (&row)[TILES][2])
{
    const int lane = threadIdx.x % BTX_WARP;
#pragma unroll 1
    for (int first = 0; first < SPLIT_KEYS; first += 32) {
        float score[TILES][4][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            unsigned right[2][4];
            load_right<T, D>(right[0], keys, first, k * 16);
            load_right<T, D>(right[1], keys, first + 16, k * 16);
#pragma unroll
            for (int m = 0; m < TILES; m++) {
#pragma unroll
                for (int n = 0; n < 4; n++)
                    multiply_16x8x16(score[m][n], query[m][k], right[n / 2][n % 2 * 2], right[n / 2][n % 2 * 2 + 1],
                                     T());
            }
        }
#pragma unroll
        for (int m = 0; m < TILES; m++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float seen[8];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    seen[i] = score[m][i / 2][2 * h + i % 2];
                    if (MASKED && first_key + first + i / 2 * 8 + lane % 4 * 2 + i % 2 > last_key[m][h])
                        seen[i] = -INFINITY;
                }
                add_scores(row[m][h], seen, scale);
            }
        }
    }
}

/* Queries on the left, TILES times 16 rows a warp, keys on the right. Block: a split, a block of rows of a KV head, a
 * layer. */
template <typename T, int D, int TILES>
__global__ void __launch_bounds__(THREADS)
    lse_kernel(const device_plan plan, const int32_t layer_begin, const int32_t row_blocks, partial_sum *partials)
{
    constexpr int STRIDE = padded<D>::stride, ROWS = 64 * TILES;
    BTX_DYNAMIC_SHARED(shared);
    T *tile = (T *)shared; /* first the queries, then twice SPLIT_KEYS keys */
    const device_tile split = plan.splits[blockIdx.x];
    const device_step step = plan.steps[split.step];
    const int32_t kv_head = blockIdx.y / row_blocks, first_row = blockIdx.y % row_blocks * ROWS;
    const int32_t num_rows = step.num_window * plan.group;
    if (first_row >= num_rows)
        return;
    const device_layer &layer = plan.layers[layer_begin + blockIdx.z];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;

    load_queries<T, D>(plan, step, layer.queries, kv_head, first_row, ROWS, tile);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    unsigned query[TILES][D / 16][4];
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            load_left<T, D>(query[m][k], tile, (warp * TILES + m) * 16, k * 16);
    }
    __syncthreads();

    partial_sum row[TILES][2];
    int32_t last_key[TILES][2]; /* that the row's query sees */
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            row[m][h].largest = LOWEST;
            row[m][h].sum = 0.0f;
            last_key[m][h] = step.num_prior + (first_row + (warp * TILES + m) * 16 + h * 8 + lane / 4) / plan.group;
        }
    }
    const int32_t num_keys = step.num_prior + step.num_window;
    const int32_t begin = split.index * step.keys_per_split;
    const int32_t end = begin + step.keys_per_split < num_keys ? begin + step.keys_per_split : num_keys;
    load_keys<T, D>(plan, step, layer.keys, kv_head, begin, min(begin + SPLIT_KEYS, end), tile);
    copy_async_commit();
    int stage = 0;
    for (int32_t key = begin; key < end; key += SPLIT_KEYS, stage ^= 1) {
        const int32_t next = key + SPLIT_KEYS;
        if (next < end)
            load_keys<T, D>(plan, step, layer.keys, kv_head, next, min(next + SPLIT_KEYS, end),
                            tile + (stage ^ 1) * SPLIT_KEYS * STRIDE);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        const T *keys = tile + stage * SPLIT_KEYS * STRIDE;
        if (next > step.num_prior)
            add_tile<T, D, TILES, true>(query, keys, key, last_key, plan.scale_log2, row);
        else
            add_tile<T, D, TILES, false>(query, keys, key, last_key, plan.scale_log2, row);
        __syncthreads();
    }

    partials += blockIdx.z * partials_of_layer(plan);
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            merge_lanes(row[m][h], 1);
            merge_lanes(row[m][h], 2);
            const int32_t r = first_row + (warp * TILES + m) * 16 + h * 8 + lane / 4;
            if (lane % 4 == 0 && r < num_rows)
                partials[partial_index(plan, step, split.index, kv_head, r)] = row[m][h];
        }
    }
}

/* Keys on the left, 32 a warp, the KV head's queries on the right. Block: a range of keys, a KV head, a layer. mass
 * [layers, num_kv_heads, total_prior]. capacity: rows of queries that shared memory holds, a multiple of 16. */
template <typename T, int D>
__global__ void __launch_bounds__(THREADS) mass_kernel(const device_plan plan, const int32_t layer_begin,
                                                       const int32_t capacity, const partial_sum *partials, float *mass)
{
    constexpr int STRIDE = padded<D>::stride;
    BTX_DYNAMIC_SHARED(shared);
    T *keys = (T *)shared, *queries = keys + MASS_KEYS * STRIDE;
    float *lse = (float *)(queries + capacity * STRIDE);
    const device_tile range = plan.ranges[blockIdx.x];
    const device_step step = plan.steps[range.step];
    const int32_t kv_head = blockIdx.y, layer_index = layer_begin + blockIdx.z;
    const device_layer &layer = plan.layers[layer_index];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int32_t begin = range.index * step.keys_per_range;
    const int32_t end = min(begin + step.keys_per_range, step.num_prior);
    const int32_t all_rows = step.num_window * plan.group;
    const float weight = plan.mass_scale / (float)step.num_window;
    partials += blockIdx.z * partials_of_layer(plan);
    mass += ((int64_t)blockIdx.z * plan.num_kv_heads + kv_head) * plan.total_prior + step.prior_offset;

    for (int32_t first_row = 0; first_row < all_rows; first_row += capacity) {
        const int32_t num_rows = (min(capacity, all_rows - first_row) + 15) / 16 * 16;
        load_queries<T, D>(plan, step, layer.queries, kv_head, first_row, num_rows, queries);
        load_keys<T, D>(plan, step, layer.keys, kv_head, begin, min(begin + MASS_KEYS, end), keys);
        copy_async_commit();
        load_lse(plan, step, range.step, layer_index, partials, kv_head, first_row, num_rows, lse);
        for (int32_t key = begin; key < end; key += MASS_KEYS) {
            unsigned left[2][D / 16][4];
            copy_async_wait<0>();
            __syncthreads();
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int k = 0; k < D / 16; k++)
                    load_left<T, D>(left[m][k], keys, warp * 32 + m * 16, k * 16);
            }
            __syncthreads();
            const int32_t next = key + MASS_KEYS;
            if (next < end)
                load_keys<T, D>(plan, step, layer.keys, kv_head, next, min(next + MASS_KEYS, end), keys);
            copy_async_commit();

            float total[2][2] = {};
#pragma unroll 2
            for (int32_t row = 0; row < num_rows; row += 16) {
                float score[2][2][4] = {};
#pragma unroll
                for (int k = 0; k < D / 16; k++) {
                    unsigned right[4];
                    load_right<T, D>(right, queries, row, k * 16);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        multiply_16x8x16(score[m][0], left[m][k], right[0], right[1], T());
                        multiply_16x8x16(score[m][1], left[m][k], right[2], right[3], T());
                    }
                }
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const float lse0 = lse[row + n * 8 + lane % 4 * 2], lse1 = lse[row + n * 8 + lane % 4 * 2 + 1];
#pragma unroll
                    for (int m = 0; m < 2; m++) {
#pragma unroll
                        for (int h = 0; h < 2; h++) {
                            total[m][h] += exp2_fast(fmaf(score[m][n][2 * h], plan.scale_log2, -lse0));
                            total[m][h] += exp2_fast(fmaf(score[m][n][2 * h + 1], plan.scale_log2, -lse1));
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < 2; m++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float sum = total[m][h];
                    sum += __shfl_xor_sync(BTX_ALL_LANES, sum, 1);
                    sum += __shfl_xor_sync(BTX_ALL_LANES, sum, 2);
                    const int32_t at = key + warp * 32 + m * 16 + h * 8 + lane / 4;
                    if (lane % 4 == 0 && at < end)
                        mass[at] = first_row == 0 ? sum * weight : mass[at] + sum * weight;
                }
            }
        }
        __syncthreads();
    }
}

/* ---- everything else ----------------------------------------------------------------------------------------------
 */

/* Scores of 32 keys (one a lane) with 32 rows (eight a warp), before scaling; zero behind either end. */
template <typename T>
__device__ static void general_scores(const device_plan &plan, const device_step &step, const device_layer &layer,
                                      int32_t kv_head, int32_t key_begin, int32_t key_end, int32_t row_begin,
                                      float (*keys)[GENERAL_TILE + 1], float (*queries)[GENERAL_TILE + 1],
                                      float (&score)[8])
{
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int32_t all_rows = step.num_window * plan.group;
#pragma unroll
    for (int i = 0; i < 8; i++)
        score[i] = 0.0f;
    for (int32_t d = 0; d < plan.head_dim; d += GENERAL_TILE) {
        __syncthreads();
        for (int32_t i = warp; i < GENERAL_TILE; i += THREADS / BTX_WARP) {
            const int32_t key = key_begin + i, r = row_begin + i, column = d + lane;
            float k = 0.0f, q = 0.0f;
            if (key < key_end && column < plan.head_dim) {
                const device_view &view = layer.keys;
                k = to_f32(((const T *)view.data)[kv_offset(plan, step, view, key) + kv_head * view.stride[2] +
                                                  column * view.stride[3]]);
            }
            if (r < all_rows && column < plan.head_dim) {
                const device_view &view = layer.queries;
                const int32_t head = kv_head * plan.group + r % plan.group;
                q = to_f32(((const T *)view.data)[query_offset(plan, step, view, r / plan.group) +
                                                  head * view.stride[2] + column * view.stride[3]]);
            }
            keys[i][lane] = k;
            queries[i][lane] = q;
        }
        __syncthreads();
        for (int column = 0; column < GENERAL_TILE; column++) {
            const float k = keys[lane][column];
#pragma unroll
            for (int i = 0; i < 8; i++)
                score[i] = fmaf(queries[warp * 8 + i][column], k, score[i]);
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS) lse_general_kernel(const device_plan plan, const int32_t layer_begin,
                                                              const int32_t row_blocks, partial_sum *partials)
{
    __shared__ float keys[GENERAL_TILE][GENERAL_TILE + 1], queries[GENERAL_TILE][GENERAL_TILE + 1];
    const device_tile split = plan.splits[blockIdx.x];
    const device_step step = plan.steps[split.step];
    const int32_t kv_head = blockIdx.y / row_blocks, first_row = blockIdx.y % row_blocks * GENERAL_TILE;
    const int32_t num_rows = step.num_window * plan.group;
    if (first_row >= num_rows)
        return;
    const device_layer &layer = plan.layers[layer_begin + blockIdx.z];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int32_t begin = split.index * step.keys_per_split;
    const int32_t end = min(begin + step.keys_per_split, step.num_prior + step.num_window);
    partial_sum row[8];
#pragma unroll
    for (int i = 0; i < 8; i++)
        row[i].largest = LOWEST, row[i].sum = 0.0f;
    for (int32_t key = begin; key < end; key += GENERAL_TILE) {
        float score[8];
        general_scores<T>(plan, step, layer, kv_head, key, end, first_row, keys, queries, score);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int32_t at = key + lane, last = step.num_prior + (first_row + warp * 8 + i) / plan.group;
            if (at >= end || at > last)
                continue;
            const float scaled = score[i] * plan.scale_log2;
            if (scaled > row[i].largest) {
                row[i].sum *= exp2f(row[i].largest - scaled);
                row[i].largest = scaled;
            }
            row[i].sum += exp2f(fmaf(score[i], plan.scale_log2, -row[i].largest));
        }
    }
    partials += blockIdx.z * partials_of_layer(plan);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        for (int mask = 16; mask > 0; mask /= 2)
            merge_lanes(row[i], mask);
        const int32_t r = first_row + warp * 8 + i;
        if (lane == 0 && r < num_rows)
            partials[partial_index(plan, step, split.index, kv_head, r)] = row[i];
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    mass_general_kernel(const device_plan plan, const int32_t layer_begin, const partial_sum *partials, float *mass)
{
    __shared__ float keys[GENERAL_TILE][GENERAL_TILE + 1], queries[GENERAL_TILE][GENERAL_TILE + 1];
    __shared__ float lse[GENERAL_TILE], part[THREADS / BTX_WARP][GENERAL_TILE];
    const device_tile range = plan.ranges[blockIdx.x];
    const device_step step = plan.steps[range.step];
    const int32_t kv_head = blockIdx.y, layer_index = layer_begin + blockIdx.z;
    const device_layer &layer = plan.layers[layer_index];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int32_t begin = range.index * step.keys_per_range;
    const int32_t end = min(begin + step.keys_per_range, step.num_prior);
    const float weight = plan.mass_scale / (float)step.num_window;
    partials += blockIdx.z * partials_of_layer(plan);
    mass += ((int64_t)blockIdx.z * plan.num_kv_heads + kv_head) * plan.total_prior + step.prior_offset;
    for (int32_t row = 0; row < step.num_window * plan.group; row += GENERAL_TILE) {
        __syncthreads();
        load_lse(plan, step, range.step, layer_index, partials, kv_head, row, GENERAL_TILE, lse);
        for (int32_t key = begin; key < end; key += GENERAL_TILE) {
            float score[8], total = 0.0f;
            general_scores<T>(plan, step, layer, kv_head, key, end, row, keys, queries, score);
#pragma unroll
            for (int i = 0; i < 8; i++)
                total += exp2f(fmaf(score[i], plan.scale_log2, -lse[warp * 8 + i]));
            part[warp][lane] = total;
            __syncthreads();
            if (warp == 0 && key + lane < end) {
                const float sum = (part[0][lane] + part[1][lane]) + (part[2][lane] + part[3][lane]);
                mass[key + lane] = row == 0 ? sum * weight : mass[key + lane] + sum * weight;
            }
        }
    }
}

/* ---- launches -----------------------------------------------------------------------------------------------------
 */

static int32_t divide_up(int64_t a, int64_t b)
{
    return (int32_t)((a + b - 1) / b);
}

template <typename T>
static btx_status launch_general(cuda_executor *executor, int32_t layer_begin, int32_t num_layers,
                                 partial_sum *partials, float *mass, btx_error *error)
{
    const device_plan &plan = executor->plan;
    const int32_t row_blocks = divide_up((int64_t)plan.max_window * plan.group, GENERAL_TILE);
    BTX_LAUNCH((lse_general_kernel<T>), dim3(plan.num_splits, plan.num_kv_heads * row_blocks, num_layers), THREADS, 0,
               executor->stream, plan, layer_begin, row_blocks, partials);
    BTX_CUDA_CHECK("launching lse_general_kernel");
    BTX_LAUNCH((mass_general_kernel<T>), dim3(plan.num_ranges, plan.num_kv_heads, num_layers), THREADS, 0,
               executor->stream, plan, layer_begin, partials, mass);
    BTX_CUDA_CHECK("launching mass_general_kernel");
    return BTX_OK;
}

template <typename T, int D, int TILES>
static btx_status launch_lse(cuda_executor *executor, int32_t layer_begin, int32_t num_layers, partial_sum *partials,
                             btx_error *error)
{
    const device_plan &plan = executor->plan;
    const int32_t row_blocks = divide_up((int64_t)plan.max_window * plan.group, 64 * TILES);
    const int query_bytes = 64 * TILES * padded<D>::stride * 2, key_bytes = 2 * SPLIT_KEYS * padded<D>::stride * 2;
    const int bytes = query_bytes > key_bytes ? query_bytes : key_bytes;
    btx_status status = cuda_prepare(executor, (const void *)lse_kernel<T, D, TILES>, bytes, error);
    if (status != BTX_OK)
        return status;
    BTX_LAUNCH((lse_kernel<T, D, TILES>), dim3(plan.num_splits, plan.num_kv_heads * row_blocks, num_layers), THREADS,
               bytes, executor->stream, plan, layer_begin, row_blocks, partials);
    BTX_CUDA_CHECK("launching lse_kernel");
    return BTX_OK;
}

template <typename T, int D>
static btx_status launch_fast(cuda_executor *executor, int32_t layer_begin, int32_t num_layers, partial_sum *partials,
                              float *mass, btx_error *error)
{
    const device_plan &plan = executor->plan;
    const int64_t rows = (int64_t)plan.max_window * plan.group;
    btx_status status;
    /* More rows a warp read the keys' tiles less often; of few rows they would be idle. */
    if (D <= 128 && rows > 64)
        status = launch_lse<T, D, (D <= 128 ? 2 : 1)>(executor, layer_begin, num_layers, partials, error);
    else
        status = launch_lse<T, D, 1>(executor, layer_begin, num_layers, partials, error);
    if (status != BTX_OK)
        return status;
    const int key_bytes = MASS_KEYS * padded<D>::stride * 2, row_bytes = padded<D>::stride * 2 + 4;
    int64_t capacity = MASS_ROWS;
    if (key_bytes + capacity * row_bytes > executor->shared_limit)
        capacity = (executor->shared_limit - key_bytes) / row_bytes / 16 * 16;
    status = cuda_prepare(executor, (const void *)mass_kernel<T, D>, key_bytes + (int)capacity * row_bytes, error);
    if (status != BTX_OK)
        return status;
    const int64_t all_rows = (rows + 15) / 16 * 16;
    capacity = all_rows < capacity ? all_rows : capacity;
    const int bytes = key_bytes + (int)capacity * row_bytes;
    BTX_LAUNCH((mass_kernel<T, D>), dim3(plan.num_ranges, plan.num_kv_heads, num_layers), THREADS, bytes,
               executor->stream, plan, layer_begin, (int32_t)capacity, partials, mass);
    BTX_CUDA_CHECK("launching mass_kernel");
    return BTX_OK;
}

template <typename T>
static btx_status launch_16_bit(cuda_executor *executor, int32_t layer_begin, int32_t num_layers, partial_sum *partials,
                                float *mass, btx_error *error)
{
    switch (executor->plan.head_dim) {
    case 64:
        return launch_fast<T, 64>(executor, layer_begin, num_layers, partials, mass, error);
    case 96:
        return launch_fast<T, 96>(executor, layer_begin, num_layers, partials, mass, error);
    case 128:
        return launch_fast<T, 128>(executor, layer_begin, num_layers, partials, mass, error);
    default:
        return launch_general<T>(executor, layer_begin, num_layers, partials, mass, error);
    }
}

size_t cuda_selection_scratch_bytes(const btx_plan *plan, int32_t max_layers, int64_t max_rows)
{
    int64_t keys = 0;
    for (int64_t s = 0; s < plan->num_steps; s++) {
        const int64_t of_step = plan->steps[s].num_prior + plan->steps[s].num_window;
        keys = of_step > keys ? of_step : keys;
    }
    int64_t splits = divide_up(keys, BTX_LSE_MIN_KEYS);
    splits = splits < BTX_LSE_MAX_SPLITS ? splits : BTX_LSE_MAX_SPLITS;
    return (size_t)max_layers * (size_t)max_rows * (size_t)splits * (size_t)plan->num_query_heads * sizeof(partial_sum);
}

btx_status cuda_attention_mass(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                               btx_error *error)
{
    cuda_executor *executor = executor_of(pass);
    partial_sum *partials = (partial_sum *)pass->scratch;
    const int32_t num_layers = num_layers_of(pass);
    (void)head_begin, (void)head_end; /* all of them: mass_by_head */
    if (executor->plan.num_ranges == 0)
        return BTX_OK;
    if (executor->sm90a && pass->plan->keys[0].dtype != BTX_F32 &&
        (executor->plan.head_dim == 64 || executor->plan.head_dim == 128))
        return cuda_attention_mass_sm90(pass, mass, error);
    switch (pass->plan->keys[0].dtype) {
    case BTX_BF16:
        return launch_16_bit<__nv_bfloat16>(executor, pass->layer_begin, num_layers, partials, mass, error);
    case BTX_F16:
        return launch_16_bit<__half>(executor, pass->layer_begin, num_layers, partials, mass, error);
    default:
        return launch_general<float>(executor, pass->layer_begin, num_layers, partials, mass, error);
    }
}
