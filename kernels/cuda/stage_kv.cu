/* stage_kv.cu - what a rewrite will write: cache + gated edit, in f32, rounded once into the cache's dtype
 * (arXiv 2505.16950, section 3.2, the gated write). The key half of an edit is first turned to the cache's positions
 * when keys were unrotated.
 *
 * Where the edit is zero, of either sign, the cache's own bits are staged: old + 0 would turn -0 into +0. Whether an
 * edit is too large to be written is known with the last of its norms. */
#include "operations.cuh"
#include "rows.cuh"

/* From here on rounding to nearest gives infinity. */
template <typename T> __device__ static inline float largest_of();
template <> __device__ inline float largest_of<float>()
{
    return INFINITY;
}
template <> __device__ inline float largest_of<__half>()
{
    return 65520.0f;
}
template <> __device__ inline float largest_of<__nv_bfloat16>()
{
    return 3.3961775e38f; /* 0x1.ffp127 */
}

/* The gated edit of a piece, keys turned forth when plan.rope_inv_freq says so. */
__device__ static inline void load_edit(const device_plan &plan, const row_piece &piece, const float *delta, float gate,
                                        const float *cosines, const float *sines, float (&edit)[8])
{
    load_piece(delta + piece.column, 1, plan.head_dim % 8 == 0, piece.count, edit);
    for (int i = 0; i < 8; i++)
        edit[i] *= gate;
    if (piece.is_value || plan.rope_inv_freq == NULL)
        return;
    const int32_t half = plan.head_dim / 2;
    const float *head = delta + piece.column - piece.first;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= piece.count)
            continue;
        const int32_t at = piece.first + i, pair = at < half ? at + half : at - half, angle = at < half ? at : pair;
        const float other = head[pair] * gate;
        edit[i] = edit[i] * cosines[angle] + (at < half ? -other : other) * sines[angle];
    }
}

/* Block: a row, a layer. squares [layers, total_rows]: sums of squares of the edit and of the row before it. */
template <typename T>
__global__ void __launch_bounds__(BTX_ROW_THREADS)
    stage_kernel(const device_plan plan, const int32_t layer_begin, const int32_t *positions, const float *gate,
                 const float *delta, T *staged, float2 *squares)
{
    BTX_DYNAMIC_SHARED(rotation); /* cosines, sines */
    __shared__ float storage[2][BTX_ROW_THREADS / BTX_WARP];
    float *cosines = (float *)rotation, *sines = cosines + plan.head_dim / 2;
    const int32_t row = blockIdx.x, layer_index = layer_begin + blockIdx.y;
    const int64_t at = (int64_t)blockIdx.y * plan.total_rows + row;
    const int32_t step_index = plan.row_step[row];
    const device_step step = plan.steps[step_index];
    const device_layer &layer = plan.layers[layer_index];
    const int32_t index = positions[at] - step.sequence_begin;
    const int64_t key_offset = kv_offset(plan, step, layer.keys, index);
    const int64_t value_offset = kv_offset(plan, step, layer.values, index);
    const int64_t width = 2 * (int64_t)plan.num_kv_heads * plan.head_dim;
    const float opening = gate[layer_index];
    const bool whole_pieces = plan.head_dim % 8 == 0;
    if (plan.rope_inv_freq != NULL) {
        fill_rotation(plan, index, cosines, sines);
        __syncthreads();
    }
    delta += at * width;
    staged += at * width;
    float edit_squares = 0.0f, old_squares = 0.0f;
    bool fits = true;
    for (int32_t p = threadIdx.x; p < pieces_per_row(plan); p += BTX_ROW_THREADS) {
        const row_piece piece = find_piece(plan, p);
        float old[8], edit[8];
        T value[8];
        load_cached<T>(layer, piece, key_offset, value_offset, old);
        load_edit(plan, piece, delta, opening, cosines, sines, edit);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= piece.count)
                continue;
            /* Widening is exact: what is not edited gets its own bits back. */
            const float sum = edit[i] == 0.0f ? old[i] : old[i] + edit[i];
            fits = fits && fabsf(sum) < largest_of<T>();
            value[i] = from_f32<T>(sum);
            edit_squares = fmaf(edit[i], edit[i], edit_squares);
            old_squares = fmaf(old[i], old[i], old_squares);
        }
        store_piece(staged + piece.column, 1, whole_pieces, piece.count, value);
    }
    if (!fits && plan.max_relative_edit > 0.0f)
        edit_squares = INFINITY;
    else if (!fits)
        refuse(&plan.refused->edit, &plan.refused_host->edit, (unsigned)(layer_index * plan.num_steps + step_index));
    if (squares == NULL)
        return;
    const float edit_sum = block_sum(edit_squares, storage[0]), old_sum = block_sum(old_squares, storage[1]);
    if (threadIdx.x == 0)
        squares[at] = make_float2(edit_sum, old_sum);
}

/* Block: a step, a layer. */
__global__ void __launch_bounds__(BTX_ROW_THREADS)
    norm_kernel(const device_plan plan, const float2 *squares, float *delta_norm, float *row_norm)
{
    __shared__ float storage[2][BTX_ROW_THREADS / BTX_WARP];
    const device_step step = plan.steps[blockIdx.x];
    squares += (int64_t)blockIdx.y * plan.total_rows + step.row_offset;
    float edit_squares = 0.0f, old_squares = 0.0f;
    for (int32_t row = threadIdx.x; row < step.num_recalled + step.num_window; row += BTX_ROW_THREADS) {
        edit_squares += squares[row].x;
        old_squares += squares[row].y;
    }
    edit_squares = block_sum(edit_squares, storage[0]);
    old_squares = block_sum(old_squares, storage[1]);
    if (threadIdx.x == 0) {
        const float delta = sqrtf(edit_squares), row = sqrtf(old_squares);
        delta_norm[(int64_t)blockIdx.y * plan.num_steps + blockIdx.x] = delta;
        row_norm[(int64_t)blockIdx.y * plan.num_steps + blockIdx.x] = row;
        /* As btx_edit_is_within. */
        if (plan.max_relative_edit > 0.0f && !(delta <= plan.max_relative_edit * row && delta <= 3.40282347e+38f))
            skip(plan, (int32_t)blockIdx.x);
    }
}

template <typename T>
static btx_status launch(const btx_pass *pass, const int32_t *positions, const float *gate, const float *delta,
                         void *staged, float2 *squares, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const int bytes = plan.rope_inv_freq != NULL ? plan.head_dim * (int)sizeof(float) : 0;
    BTX_LAUNCH((stage_kernel<T>), dim3((unsigned)plan.total_rows, (unsigned)num_layers_of(pass)), BTX_ROW_THREADS,
               bytes, executor->stream, plan, pass->layer_begin, positions, gate, delta, (T *)staged, squares);
    BTX_CUDA_CHECK("launching stage_kernel");
    return BTX_OK;
}

btx_status cuda_stage_kv(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                         float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    float2 *squares = delta_norm != NULL ? (float2 *)pass->scratch : NULL;
    btx_status status;
    (void)rows;
    switch (pass->plan->keys[0].dtype) {
    case BTX_BF16:
        status = launch<__nv_bfloat16>(pass, positions, gate, delta, staged, squares, error);
        break;
    case BTX_F16:
        status = launch<__half>(pass, positions, gate, delta, staged, squares, error);
        break;
    default:
        status = launch<float>(pass, positions, gate, delta, staged, squares, error);
    }
    if (status != BTX_OK || squares == NULL)
        return status;
    BTX_LAUNCH(norm_kernel, dim3((unsigned)plan.num_steps, (unsigned)num_layers_of(pass)), BTX_ROW_THREADS, 0,
               executor->stream, plan, squares, delta_norm, row_norm);
    BTX_CUDA_CHECK("launching norm_kernel");
    return BTX_OK;
}
