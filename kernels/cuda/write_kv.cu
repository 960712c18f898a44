/* write_kv.cu - the write of a rewrite: staged values into the cache (arXiv 2505.16950, section 3.2). Nothing is
 * written where the boundary was refused, nor of a step that is skipped. */
#include "operations.cuh"
#include "rows.cuh"

/* Block: a row, a layer. T: an unsigned integer of the cache's element size; values are copied as bits. */
template <typename T>
__global__ void __launch_bounds__(BTX_ROW_THREADS)
    write_kernel(const device_plan plan, const int32_t layer_begin, const int32_t *positions, const T *staged)
{
    constexpr int LANES = 16 / sizeof(T);
    if (plan.refused->mass != BTX_NOT_REFUSED || plan.refused->edit != BTX_NOT_REFUSED)
        return;
    const int32_t row = blockIdx.x, step_index = plan.row_step[row];
    if (plan.max_relative_edit > 0.0f && plan.skipped[step_index] != 0)
        return;
    const int64_t at = (int64_t)blockIdx.y * plan.total_rows + row;
    const device_step step = plan.steps[step_index];
    const device_layer &layer = plan.layers[layer_begin + blockIdx.y];
    const int32_t index = positions[at] - step.sequence_begin, half = plan.num_kv_heads * plan.head_dim;
    T *keys = (T *)layer.keys.data + kv_offset(plan, step, layer.keys, index);
    T *values = (T *)layer.values.data + kv_offset(plan, step, layer.values, index);
    staged += at * 2 * half;
    if (layer.keys.vector && layer.values.vector) {
        for (int32_t i = threadIdx.x * LANES; i < 2 * half; i += BTX_ROW_THREADS * LANES) {
            const bool is_value = i >= half;
            const int32_t column = is_value ? i - half : i, head = column / plan.head_dim;
            T *to = (is_value ? values : keys) + head * (is_value ? layer.values : layer.keys).stride[2] + column -
                    head * plan.head_dim;
            *(uint4 *)(void *)to = *(const uint4 *)(const void *)(staged + i);
        }
        return;
    }
    for (int32_t i = threadIdx.x; i < 2 * half; i += BTX_ROW_THREADS) {
        const bool is_value = i >= half;
        const int32_t column = is_value ? i - half : i, head = column / plan.head_dim;
        const device_view &view = is_value ? layer.values : layer.keys;
        (is_value ? values : keys)[head * view.stride[2] + (column - head * plan.head_dim) * view.stride[3]] =
            staged[i];
    }
}

btx_status cuda_write_kv(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const dim3 grid((unsigned)plan.total_rows, (unsigned)num_layers_of(pass));
    if (pass->plan->keys[0].dtype == BTX_F32)
        BTX_LAUNCH((write_kernel<unsigned>), grid, BTX_ROW_THREADS, 0, executor->stream, plan, pass->layer_begin,
                   positions, (const unsigned *)staged);
    else
        BTX_LAUNCH((write_kernel<unsigned short>), grid, BTX_ROW_THREADS, 0, executor->stream, plan, pass->layer_begin,
                   positions, (const unsigned short *)staged);
    BTX_CUDA_CHECK("launching write_kernel");
    return BTX_OK;
}
