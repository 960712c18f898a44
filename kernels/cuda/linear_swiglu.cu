/* linear_swiglu.cu - silu(x W_gate^T) * (x W_up^T), both products and what joins them in one kernel: cuBLASLt has no
 * such epilogue, and the sums, 2 F wide in f32, would be the largest traffic of the whole Processor.
 *
 * Tiles of ROWS rows and COLUMNS columns of each of the two products; depth comes by in stages of DEPTH through
 * asynchronous copies. Four warps, two by two. */
#include "operations.cuh"

#define THREADS 128
#define COLUMNS 64
#define DEPTH 32
#define STAGES 4
#define STRIDE (DEPTH + 8) /* elements of a row in shared memory: eight rows lie in different banks */

__device__ static inline float swiglu(float gate, float up)
{
    return gate / (1.0f + exp2f(-1.44269504f * gate)) * up;
}

/* num_rows rows from row first on, columns [column, column + DEPTH), of a matrix [limit, stride]; zero beyond. */
__device__ static inline void load_stage(const __nv_bfloat16 *from, int64_t stride, int64_t first, int64_t limit,
                                         int64_t column, int num_rows, __nv_bfloat16 *shared)
{
    for (int i = threadIdx.x; i < num_rows * (DEPTH / 8); i += THREADS) {
        const int row = i / (DEPTH / 8), at = i % (DEPTH / 8) * 8;
        __nv_bfloat16 *to = shared + row * STRIDE + at;
        if (first + row < limit && column + at < stride)
            copy_async_16(to, from + (first + row) * stride + column + at);
        else
            *(uint4 *)(void *)to = make_uint4(0, 0, 0, 0);
    }
}

/* Block: columns, rows, a layer. x [layers, rows, stride], weights [2, dim, stride] a layer, out [layers, rows,
 * out_stride]. A warp has 16 TILES rows and 32 columns of both products. */
template <int TILES>
__global__ void __launch_bounds__(THREADS)
    swiglu_kernel(const __nv_bfloat16 *x, const unsigned char *weights, const int64_t layer_stride,
                  const int32_t layer_begin, const int64_t stride, const int64_t rows, const int64_t dim,
                  const int64_t out_stride, __nv_bfloat16 *out)
{
    constexpr int ROWS = 32 * TILES, STAGE = (ROWS + 2 * COLUMNS) * STRIDE;
    BTX_DYNAMIC_SHARED(shared);
    __nv_bfloat16 *tiles = (__nv_bfloat16 *)shared;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int64_t column = (int64_t)blockIdx.x * COLUMNS, row = (int64_t)blockIdx.y * ROWS;
    const __nv_bfloat16 *gate = (const __nv_bfloat16 *)(weights + (layer_begin + blockIdx.z) * layer_stride);
    const __nv_bfloat16 *up = gate + dim * stride;
    x += blockIdx.z * rows * stride;
    out += blockIdx.z * rows * out_stride;
    const int num_stages = (int)((stride + DEPTH - 1) / DEPTH);
    const int warp_row = warp / 2 * 16 * TILES, warp_column = warp % 2 * 32;
    float sum[2][TILES][4][4] = {}; /* gate, up */

    for (int stage = 0; stage < STAGES - 1; stage++) {
        __nv_bfloat16 *tile = tiles + stage * STAGE;
        if (stage < num_stages) {
            load_stage(x, stride, row, rows, stage * DEPTH, ROWS, tile);
            load_stage(gate, stride, column, dim, stage * DEPTH, COLUMNS, tile + ROWS * STRIDE);
            load_stage(up, stride, column, dim, stage * DEPTH, COLUMNS, tile + (ROWS + COLUMNS) * STRIDE);
        }
        copy_async_commit();
    }
    for (int stage = 0; stage < num_stages; stage++) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        const int ahead = stage + STAGES - 1;
        if (ahead < num_stages) {
            __nv_bfloat16 *tile = tiles + ahead % STAGES * STAGE;
            load_stage(x, stride, row, rows, ahead * DEPTH, ROWS, tile);
            load_stage(gate, stride, column, dim, ahead * DEPTH, COLUMNS, tile + ROWS * STRIDE);
            load_stage(up, stride, column, dim, ahead * DEPTH, COLUMNS, tile + (ROWS + COLUMNS) * STRIDE);
        }
        copy_async_commit();
        const __nv_bfloat16 *tile = tiles + stage % STAGES * STAGE;
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            unsigned left[TILES][4];
#pragma unroll
            for (int m = 0; m < TILES; m++)
                load_matrix_x4(left[m], tile + (warp_row + m * 16 + lane % 16) * STRIDE + k + lane / 16 * 8);
#pragma unroll
            for (int part = 0; part < 2; part++) {
#pragma unroll
                for (int n = 0; n < 4; n += 2) {
                    unsigned right[4];
                    load_matrix_x4(right, tile + (ROWS + part * COLUMNS + warp_column + n * 8 + lane % 8 + lane / 16 * 8) * STRIDE +
                                              k + lane / 8 % 2 * 8);
#pragma unroll
                    for (int m = 0; m < TILES; m++) {
                        multiply_16x8x16(sum[part][m][n], left[m], right[0], right[1], __nv_bfloat16());
                        multiply_16x8x16(sum[part][m][n + 1], left[m], right[2], right[3], __nv_bfloat16());
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int64_t r = row + warp_row + m * 16 + i / 2 * 8 + lane / 4;
                const int64_t c = column + warp_column + n * 8 + lane % 4 * 2 + i % 2;
                if (r < rows && c < out_stride)
                    out[r * out_stride + c] =
                        from_f32<__nv_bfloat16>(c < dim ? swiglu(sum[0][m][n][i], sum[1][m][n][i]) : 0.0f);
            }
        }
    }
}

/* f32 operands: a thread has 4 x 2 elements of a tile of 64 rows and 32 columns. Block: columns, rows, a layer. */
#define F32_ROWS 64
#define F32_COLUMNS 32
#define F32_DEPTH 16

__global__ void __launch_bounds__(256)
    swiglu_f32_kernel(const float *x, const unsigned char *weights, const int64_t layer_stride,
                      const int32_t layer_begin, const int64_t stride, const int64_t rows, const int64_t dim,
                      const int64_t out_stride, float *out)
{
    __shared__ float left[F32_DEPTH][F32_ROWS + 1], right[2][F32_DEPTH][F32_COLUMNS + 1];
    const int64_t column = (int64_t)blockIdx.x * F32_COLUMNS, row = (int64_t)blockIdx.y * F32_ROWS;
    const float *gate = (const float *)(const void *)(weights + (layer_begin + blockIdx.z) * layer_stride);
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[2][4][2] = {};
    x += blockIdx.z * rows * stride;
    out += blockIdx.z * rows * out_stride;
    for (int64_t k = 0; k < stride; k += F32_DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < F32_ROWS * F32_DEPTH; i += 256) {
            const int r = i / F32_DEPTH, d = i % F32_DEPTH;
            left[d][r] = row + r < rows && k + d < stride ? x[(row + r) * stride + k + d] : 0.0f;
        }
        for (int i = threadIdx.x; i < 2 * F32_COLUMNS * F32_DEPTH; i += 256) {
            const int part = i / (F32_COLUMNS * F32_DEPTH), c = i / F32_DEPTH % F32_COLUMNS, d = i % F32_DEPTH;
            right[part][d][c] =
                column + c < dim && k + d < stride ? gate[(part * dim + column + c) * stride + k + d] : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < F32_DEPTH; d++) {
            for (int part = 0; part < 2; part++) {
                for (int i = 0; i < 4; i++) {
                    for (int j = 0; j < 2; j++)
                        sum[part][i][j] = fmaf(left[d][ty + 16 * i], right[part][d][tx + 16 * j], sum[part][i][j]);
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        for (int j = 0; j < 2; j++) {
            const int64_t r = row + ty + 16 * i, c = column + tx + 16 * j;
            if (r < rows && c < out_stride)
                out[r * out_stride + c] = c < dim ? swiglu(sum[0][i][j], sum[1][i][j]) : 0.0f;
        }
    }
}

static unsigned divide_up(int64_t a, int64_t b)
{
    return (unsigned)((a + b - 1) / b);
}

template <int TILES>
static btx_status launch(const btx_pass *pass, const btx_linear *weights, const void *x, void *out, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const int64_t rows = btx_pass_rows(pass), dim = weights->out_dim / 2, out_stride = operand_stride(dim);
    const int bytes = STAGES * (32 * TILES + 2 * COLUMNS) * STRIDE * 2;
    BTX_CUDA_TRY(cudaFuncSetAttribute(swiglu_kernel<TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                 "preparing swiglu_kernel");
    BTX_LAUNCH((swiglu_kernel<TILES>),
               dim3(divide_up(out_stride, COLUMNS), divide_up(rows, 32 * TILES), (unsigned)num_layers_of(pass)),
               THREADS, bytes, executor->stream, (const __nv_bfloat16 *)x, (const unsigned char *)weights->packed,
               (int64_t)weights->layer_stride, pass->layer_begin, operand_stride(weights->in_dim), rows, dim,
               out_stride, (__nv_bfloat16 *)out);
    BTX_CUDA_CHECK("launching swiglu_kernel");
    return BTX_OK;
}

btx_status cuda_linear_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                              btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const int64_t rows = btx_pass_rows(pass), dim = weights->out_dim / 2, out_stride = operand_stride(dim);
    if (weights->dtype == BTX_BF16) {
        /* Of the two sizes the one that computes fewer rows in vain; of equals the larger. */
        const int64_t large = divide_up(rows, 128) * 128, small = divide_up(rows, 64) * 64;
        return large == small ? launch<4>(pass, weights, x, out, error) : launch<2>(pass, weights, x, out, error);
    }
    BTX_LAUNCH(swiglu_f32_kernel,
               dim3(divide_up(out_stride, F32_COLUMNS), divide_up(rows, F32_ROWS), (unsigned)num_layers_of(pass)), 256,
               0, executor->stream, (const float *)x, (const unsigned char *)weights->packed,
               (int64_t)weights->layer_stride, pass->layer_begin, operand_stride(weights->in_dim), rows, dim,
               out_stride, (float *)out);
    BTX_CUDA_CHECK("launching swiglu_f32_kernel");
    return BTX_OK;
}
