/* gather_kv.cu - selected cache rows as KV-tokens x = [keys of all KV heads | values of all KV heads], normed
 * (arXiv 2505.16950, section 3.2). x itself is not kept: stage_kv.cu reads the cache again. */
#include "operations.cuh"
#include "rows.cuh"

#define KEPT 2 /* pieces of a thread that stay in registers: rows of up to 2048 elements are read once */

/* One piece of x, keys turned back when plan.rope_inv_freq says so. */
template <typename T>
__device__ static inline void load_token(const device_plan &plan, const device_layer &layer, const row_piece &piece,
                                         int64_t key_offset, int64_t value_offset, const float *cosines,
                                         const float *sines, float (&x)[8])
{
    load_cached<T>(layer, piece, key_offset, value_offset, x);
    if (piece.is_value || plan.rope_inv_freq == NULL)
        return;
    const int32_t half = plan.head_dim / 2;
    const device_view &view = layer.keys;
    const T *head = (const T *)view.data + key_offset + piece.head * view.stride[2];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i >= piece.count)
            continue;
        const int32_t at = piece.first + i, pair = at < half ? at + half : at - half, angle = at < half ? at : pair;
        const float other = to_f32(head[pair * view.stride[3]]);
        x[i] = x[i] * cosines[angle] + (at < half ? other : -other) * sines[angle];
    }
}

template <typename Operand>
__device__ static inline void store_normed(const device_plan &plan, const row_piece &piece, const float (&x)[8],
                                           float scale, const float *weight, Operand *normed)
{
    const bool whole = plan.head_dim % 8 == 0; /* else the weight of a layer need not start on 16 bytes */
    float factor[8];
    Operand value[8];
    load_piece(weight + piece.column, 1, whole, piece.count, factor);
#pragma unroll
    for (int i = 0; i < 8; i++)
        value[i] = from_f32<Operand>(x[i] * scale * factor[i]);
    store_piece(normed + piece.column, 1, whole, piece.count, value);
}

/* Block: a row, a layer. */
template <typename T, typename Operand>
__global__ void __launch_bounds__(BTX_ROW_THREADS)
    gather_kernel(const device_plan plan, const int32_t layer_begin, const int32_t *positions, const float *weight,
                  const float eps, Operand *normed)
{
    BTX_DYNAMIC_SHARED(rotation); /* cosines, sines */
    __shared__ float storage[BTX_ROW_THREADS / BTX_WARP];
    float *cosines = (float *)rotation, *sines = cosines + plan.head_dim / 2;
    const int32_t row = blockIdx.x, layer_index = layer_begin + blockIdx.y;
    const int64_t at = (int64_t)blockIdx.y * plan.total_rows + row;
    const device_step step = plan.steps[plan.row_step[row]];
    const device_layer &layer = plan.layers[layer_index];
    const int32_t index = positions[at] - step.sequence_begin;
    const int64_t key_offset = kv_offset(plan, step, layer.keys, index);
    const int64_t value_offset = kv_offset(plan, step, layer.values, index);
    const int64_t width = 2 * (int64_t)plan.num_kv_heads * plan.head_dim, stride = operand_stride(width);
    if (plan.rope_inv_freq != NULL) {
        fill_rotation(plan, index, cosines, sines);
        __syncthreads();
    }
    const int32_t num_pieces = pieces_per_row(plan);
    float kept[KEPT][8], squares = 0.0f;
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
        const int32_t p = threadIdx.x + n * BTX_ROW_THREADS;
        if (p < num_pieces)
            load_token<T>(plan, layer, find_piece(plan, p), key_offset, value_offset, cosines, sines, kept[n]);
#pragma unroll
        for (int i = 0; i < 8; i++)
            squares = p < num_pieces ? fmaf(kept[n][i], kept[n][i], squares) : squares;
    }
    for (int32_t p = threadIdx.x + KEPT * BTX_ROW_THREADS; p < num_pieces; p += BTX_ROW_THREADS) {
        float x[8];
        load_token<T>(plan, layer, find_piece(plan, p), key_offset, value_offset, cosines, sines, x);
#pragma unroll
        for (int i = 0; i < 8; i++)
            squares = fmaf(x[i], x[i], squares);
    }
    const float scale = norm_scale(block_sum(squares, storage), (float)width, eps);
    weight += layer_index * width;
    normed += at * stride;
#pragma unroll
    for (int n = 0; n < KEPT; n++) {
        const int32_t p = threadIdx.x + n * BTX_ROW_THREADS;
        if (p < num_pieces)
            store_normed(plan, find_piece(plan, p), kept[n], scale, weight, normed);
    }
    for (int32_t p = threadIdx.x + KEPT * BTX_ROW_THREADS; p < num_pieces; p += BTX_ROW_THREADS) {
        const row_piece piece = find_piece(plan, p);
        float x[8];
        load_token<T>(plan, layer, piece, key_offset, value_offset, cosines, sines, x);
        store_normed(plan, piece, x, scale, weight, normed);
    }
    for (int64_t i = width + threadIdx.x; i < stride; i += BTX_ROW_THREADS)
        normed[i] = from_f32<Operand>(0.0f);
}

template <typename T, typename Operand>
static btx_status launch(const btx_pass *pass, const int32_t *positions, const float *weight, float eps, void *normed,
                         btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const int bytes = plan.rope_inv_freq != NULL ? plan.head_dim * (int)sizeof(float) : 0;
    BTX_LAUNCH((gather_kernel<T, Operand>), dim3((unsigned)plan.total_rows, (unsigned)num_layers_of(pass)),
               BTX_ROW_THREADS, bytes, executor->stream, plan, pass->layer_begin, positions, weight, eps,
               (Operand *)normed);
    BTX_CUDA_CHECK("launching gather_kernel");
    return BTX_OK;
}

template <typename Operand>
static btx_status launch_from(const btx_pass *pass, const int32_t *positions, const float *weight, float eps,
                              void *normed, btx_error *error)
{
    switch (pass->plan->keys[0].dtype) {
    case BTX_BF16:
        return launch<__nv_bfloat16, Operand>(pass, positions, weight, eps, normed, error);
    case BTX_F16:
        return launch<__half, Operand>(pass, positions, weight, eps, normed, error);
    default:
        return launch<float, Operand>(pass, positions, weight, eps, normed, error);
    }
}

btx_status cuda_gather_kv(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight, float eps,
                          btx_dtype dtype, void *normed, btx_error *error)
{
    (void)rows; /* not kept */
    return dtype == BTX_BF16 ? launch_from<__nv_bfloat16>(pass, positions, weight, eps, normed, error)
                             : launch_from<float>(pass, positions, weight, eps, normed, error);
}
