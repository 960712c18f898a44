/* scores.cuh - what the kernels of the attention mass share: partial log-sum-exps, tiles of keys and queries in shared
 * memory, running sums. See attention_mass.cu. */
#ifndef BTX_SCORES_CUH
#define BTX_SCORES_CUH

#include "plan.cuh"

#define LOWEST -1e30f /* below any score, and finite */

typedef struct partial_sum {
    float largest; /* score times scale_log2 */
    float sum;     /* of 2^(score - largest) */
} partial_sum;

/* Of one layer, all its window rows: [step][split][kv_head][row]. */
__device__ static inline int64_t partial_index(const device_plan &plan, const device_step &step, int32_t split,
                                               int32_t kv_head, int32_t row)
{
    const int64_t heads = (int64_t)plan.num_kv_heads * plan.group, rows = (int64_t)step.num_window * plan.group;
    return step.split_offset * heads + ((int64_t)split * plan.num_kv_heads + kv_head) * rows + row;
}

__device__ static inline int64_t partials_of_layer(const device_plan &plan)
{
    return (int64_t)plan.split_rows * plan.num_kv_heads * plan.group;
}

/* The log-sum-exp, base 2, of one row, from all its splits in order. */
__device__ static float combine_splits(const device_plan &plan, const device_step &step, const partial_sum *partials,
                                       int32_t kv_head, int32_t row)
{
    float largest = LOWEST, sum = 0.0f;
    for (int32_t split = 0; split < step.num_splits; split++)
        largest = fmaxf(largest, partials[partial_index(plan, step, split, kv_head, row)].largest);
    for (int32_t split = 0; split < step.num_splits; split++) {
        const partial_sum part = partials[partial_index(plan, step, split, kv_head, row)];
        sum += part.sum * exp2_fast(part.largest - largest);
    }
    return largest + log2f(sum);
}

__device__ static inline bool is_finite(float x)
{
    return fabsf(x) < INFINITY;
}

/* Rows in shared memory are D elements and a pad of 16 bytes, so that eight of them lie in different banks. */
template <int D> struct padded {
    static constexpr int stride = D + 8;
};

/* One row of D elements, by two threads: part is 0 or 1. */
template <typename T, int D>
__device__ static inline void load_row(T *shared, const T *global, int64_t stride, int vector, int part)
{
    if (vector) {
        for (int i = part; i < D / 8; i += 2)
            copy_async_16(shared + 8 * i, global + 8 * i);
    }
    else {
        for (int i = part; i < D; i += 2)
            shared[i] = global[i * stride];
    }
}

/* Keys [begin, end) of a step; what lies behind them in the tile is left as it is. */
template <typename T, int D>
__device__ static inline void load_keys(const device_plan &plan, const device_step &step, const device_view &view,
                                        int32_t kv_head, int32_t begin, int32_t end, T *shared)
{
    for (int32_t row = threadIdx.x / 2; row < end - begin; row += blockDim.x / 2) {
        const T *from = (const T *)view.data + kv_offset(plan, step, view, begin + row) + kv_head * view.stride[2];
        load_row<T, D>(shared + row * padded<D>::stride, from, view.stride[3], view.vector, threadIdx.x % 2);
    }
}

/* num_rows rows from first on; those behind the window's are zero. */
template <typename T, int D>
__device__ static inline void load_queries(const device_plan &plan, const device_step &step, const device_view &view,
                                           int32_t kv_head, int32_t first, int32_t num_rows, T *shared)
{
    const int32_t all = step.num_window * plan.group;
    for (int32_t row = threadIdx.x / 2; row < num_rows; row += blockDim.x / 2) {
        const int32_t r = first + row, part = threadIdx.x % 2;
        T *to = shared + row * padded<D>::stride;
        if (r >= all) {
            for (int i = part; i < D; i += 2)
                to[i] = from_f32<T>(0.0f);
            continue;
        }
        const int32_t head = kv_head * plan.group + r % plan.group;
        const T *from = (const T *)view.data + query_offset(plan, step, view, r / plan.group) + head * view.stride[2];
        load_row<T, D>(to, from, view.stride[3], view.vector, part);
    }
}

/* Rows [row, row + 16) and columns [column, column + 16) as the left side of a product. */
template <typename T, int D>
__device__ static inline void load_left(unsigned (&fragment)[4], const T *tile, int row, int column)
{
    const int lane = threadIdx.x % BTX_WARP;
    load_matrix_x4(fragment, tile + (row + lane % 16) * padded<D>::stride + column + lane / 16 * 8);
}

/* The same as two right sides of 8 rows: registers 0, 1 and 2, 3. */
template <typename T, int D>
__device__ static inline void load_right(unsigned (&fragment)[4], const T *tile, int row, int column)
{
    const int lane = threadIdx.x % BTX_WARP;
    load_matrix_x4(fragment, tile + (row + lane % 8 + lane / 16 * 8) * padded<D>::stride + column + lane / 8 % 2 * 8);
}

/* Running largest score and sum of one row over the columns that this lane sees. */
__device__ static inline void add_scores(partial_sum &row, const float (&score)[8], float scale)
{
    float largest = score[0];
#pragma unroll
    for (int i = 1; i < 8; i++)
        largest = fmaxf(largest, score[i]);
    largest *= scale;
    if (largest > row.largest) {
        row.sum *= exp2_fast(row.largest - largest);
        row.largest = largest;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        row.sum += exp2_fast(fmaf(score[i], scale, -row.largest));
}

__device__ static inline void merge_lanes(partial_sum &row, int mask)
{
    const float largest = __shfl_xor_sync(BTX_ALL_LANES, row.largest, mask);
    const float sum = __shfl_xor_sync(BTX_ALL_LANES, row.sum, mask);
    const float both = fmaxf(row.largest, largest);
    row.sum = row.sum * exp2_fast(row.largest - both) + sum * exp2_fast(largest - both);
    row.largest = both;
}

/* The log-sum-exps of rows [first, first + num_rows) to shared memory; infinite, which makes every probability zero,
 * behind the window's rows. Refuses the boundary where one is not finite. */
__device__ static void load_lse(const device_plan &plan, const device_step &step, int32_t step_index, int32_t layer,
                                const partial_sum *partials, int32_t kv_head, int32_t first, int32_t num_rows,
                                float *lse)
{
    const int32_t all = step.num_window * plan.group;
    for (int32_t row = threadIdx.x; row < num_rows; row += blockDim.x) {
        float value = INFINITY;
        if (first + row < all) {
            value = combine_splits(plan, step, partials, kv_head, first + row);
            if (!is_finite(value))
                refuse(&plan.refused->mass, &plan.refused_host->mass, (unsigned)(layer * plan.num_steps + step_index));
        }
        lse[row] = value;
    }
}

#endif /* BTX_SCORES_CUH */
