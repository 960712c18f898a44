/* linear_general.cu - a product by plain arithmetic: what cuBLASLt has no algorithm for (a few rows of a few columns),
 * what the tests without a GPU run, and every product under BOTTLENECKED_CUDA_PRODUCTS=general. */
#include "operations.cuh"

#define THREADS 256
#define ROWS 64
#define COLUMNS 32
#define DEPTH 16

/* A thread has 4 x 2 elements of a tile. Block: columns, rows, a layer. x [layers, rows, stride], weights
 * [out_dim, stride] a layer, bias [layers, out_dim] or NULL, out [layers, rows, out_dim]. */
template <typename T>
__global__ void __launch_bounds__(THREADS)
    product_kernel(const T *x, const unsigned char *weights, const int64_t layer_stride, const float *bias,
                   const int64_t stride, const int64_t rows, const int64_t out_dim, const int32_t accumulate,
                   float *out)
{
    __shared__ float left[DEPTH][ROWS + 1], right[DEPTH][COLUMNS + 1];
    const int64_t column = (int64_t)blockIdx.x * COLUMNS, row = (int64_t)blockIdx.y * ROWS;
    const T *weight = (const T *)(const void *)(weights + blockIdx.z * layer_stride);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[4][2] = {};
    x += blockIdx.z * rows * stride;
    out += blockIdx.z * rows * out_dim;
    for (int64_t k = 0; k < stride; k += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS * DEPTH; i += THREADS) {
            const int r = i / DEPTH, d = i % DEPTH;
            left[d][r] = row + r < rows && k + d < stride ? to_f32(x[(row + r) * stride + k + d]) : 0.0f;
        }
        for (int i = threadIdx.x; i < COLUMNS * DEPTH; i += THREADS) {
            const int c = i / DEPTH, d = i % DEPTH;
            right[d][c] = column + c < out_dim && k + d < stride ? to_f32(weight[(column + c) * stride + k + d]) : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < DEPTH; d++) {
            for (int i = 0; i < 4; i++) {
                for (int j = 0; j < 2; j++)
                    sum[i][j] = fmaf(left[d][ty + 16 * i], right[d][tx + 16 * j], sum[i][j]);
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) {
            const int64_t r = row + ty + 16 * i, c = column + tx + 16 * j;
            if (r >= rows || c >= out_dim)
                continue;
            const float value = bias != NULL ? sum[i][j] + bias[blockIdx.z * out_dim + c] : sum[i][j];
            out[r * out_dim + c] = accumulate ? out[r * out_dim + c] + value : value;
        }
    }
}

template <typename T>
static btx_status launch(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                         btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const int64_t rows = btx_pass_rows(pass), out_dim = weights->out_dim;
    const float *bias = weights->bias != NULL ? weights->bias + pass->layer_begin * out_dim : NULL;
    const dim3 grid((unsigned)((out_dim + COLUMNS - 1) / COLUMNS), (unsigned)((rows + ROWS - 1) / ROWS),
                    (unsigned)num_layers_of(pass));
    BTX_LAUNCH((product_kernel<T>), grid, THREADS, 0, executor->stream, (const T *)x,
               (const unsigned char *)weights->packed + (size_t)pass->layer_begin * weights->layer_stride,
               (int64_t)weights->layer_stride, bias, operand_stride(weights->in_dim), rows, out_dim,
               (int32_t)accumulate, out);
    BTX_CUDA_CHECK("launching product_kernel");
    return BTX_OK;
}

btx_status cuda_linear_general(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate,
                               float *out, btx_error *error)
{
    return weights->dtype == BTX_BF16 ? launch<__nv_bfloat16>(pass, weights, x, accumulate, out, error)
                                      : launch<float>(pass, weights, x, accumulate, out, error);
}
