/* rms_norm.cu - x / sqrt(mean(x^2) + eps) * weight, row by row, as the left side of a product. */
#include "operations.cuh"
#include "rows.cuh"

/* Block: a row, a layer. */
template <typename Operand>
__global__ void __launch_bounds__(BTX_ROW_THREADS)
    rms_norm_kernel(const float *x, const int64_t dim, const int32_t layer_begin, const float *weight, const float eps,
                    Operand *out)
{
    __shared__ float storage[BTX_ROW_THREADS / BTX_WARP];
    const int64_t at = (int64_t)blockIdx.y * gridDim.x + blockIdx.x, stride = operand_stride(dim);
    float squares = 0.0f;
    x += at * dim;
    out += at * stride;
    weight += (layer_begin + blockIdx.y) * dim;
    for (int64_t i = threadIdx.x; i < dim; i += BTX_ROW_THREADS)
        squares = fmaf(x[i], x[i], squares);
    const float scale = norm_scale(block_sum(squares, storage), (float)dim, eps);
    for (int64_t i = threadIdx.x; i < stride; i += BTX_ROW_THREADS)
        out[i] = from_f32<Operand>(i < dim ? x[i] * scale * weight[i] : 0.0f);
}

btx_status cuda_rms_norm(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                         btx_dtype dtype, void *out, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const dim3 grid((unsigned)btx_pass_rows(pass), (unsigned)num_layers_of(pass));
    if (dtype == BTX_BF16)
        BTX_LAUNCH((rms_norm_kernel<__nv_bfloat16>), grid, BTX_ROW_THREADS, 0, executor->stream, x, dim,
                   pass->layer_begin, weight, eps, (__nv_bfloat16 *)out);
    else
        BTX_LAUNCH((rms_norm_kernel<float>), grid, BTX_ROW_THREADS, 0, executor->stream, x, dim, pass->layer_begin,
                   weight, eps, (float *)out);
    BTX_CUDA_CHECK("launching rms_norm_kernel");
    return BTX_OK;
}
