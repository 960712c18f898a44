/* round.cu - rows as the left side of a product. */
#include "operations.cuh"
#include "rows.cuh"

/* Block: a row of a layer. */
template <typename Operand>
__global__ void __launch_bounds__(BTX_ROW_THREADS) round_kernel(const float *x, const int64_t dim, Operand *out)
{
    const int64_t at = (int64_t)blockIdx.y * gridDim.x + blockIdx.x, stride = operand_stride(dim);
    for (int64_t i = threadIdx.x; i < stride; i += BTX_ROW_THREADS)
        out[at * stride + i] = from_f32<Operand>(i < dim ? x[at * dim + i] : 0.0f);
}

btx_status cuda_round(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const dim3 grid((unsigned)btx_pass_rows(pass), (unsigned)num_layers_of(pass));
    if (dtype == BTX_BF16)
        BTX_LAUNCH((round_kernel<__nv_bfloat16>), grid, BTX_ROW_THREADS, 0, executor->stream, x, dim,
                   (__nv_bfloat16 *)out);
    else
        BTX_LAUNCH((round_kernel<float>), grid, BTX_ROW_THREADS, 0, executor->stream, x, dim, (float *)out);
    BTX_CUDA_CHECK("launching round_kernel");
    return BTX_OK;
}
