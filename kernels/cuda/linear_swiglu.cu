/* linear_swiglu.cu - silu(x W_gate^T) * (x W_up^T), both products and what joins them in one kernel: cuBLASLt has no
 * such epilogue, and the sums, 2 F wide in f32, would be the largest traffic of the whole Processor.
 *
 * A block has ROWS rows and COLUMNS columns of each of the two products; depth comes by in stages of DEPTH through
 * asynchronous copies. A warp has half of the rows and 32 columns. */
#include "operations.cuh"

#define DEPTH 64
#define STRIDE (DEPTH + 8) /* elements of a row in shared memory: eight rows lie in different banks */

__device__ static inline float swiglu(float gate, float up)
{
    return gate / (1.0f + exp2f(-1.44269504f * gate)) * up;
}

/* What one thread copies of a matrix: of every PASS-th row the same 16 bytes. */
template <int NUM_ROWS, int THREADS> struct stage_part {
    static constexpr int PASS = THREADS / (DEPTH / 8), PASSES = NUM_ROWS / PASS;
    const __nv_bfloat16 *from;
    int64_t step;
    int rows_left; /* of the matrix, from this thread's first on */

    /* Rows [first, first + NUM_ROWS) of a matrix [limit, stride]. */
    __device__ stage_part(const __nv_bfloat16 *matrix, int64_t stride, int64_t first, int64_t limit)
    {
        const int64_t row = first + threadIdx.x / (DEPTH / 8);
        from = matrix + (row < limit ? row : 0) * stride + threadIdx.x % (DEPTH / 8) * 8;
        step = PASS * stride;
        rows_left = (int)min(limit - row, (int64_t)NUM_ROWS);
    }

    /* Columns [column, column + DEPTH), zero behind the matrix. */
    __device__ void load(int column, bool inside, __nv_bfloat16 *shared) const
    {
        __nv_bfloat16 *to = shared + threadIdx.x / (DEPTH / 8) * STRIDE + threadIdx.x % (DEPTH / 8) * 8;
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
            const bool wanted = inside && i * PASS < rows_left;
            copy_async_16_or_zero(to + i * PASS * STRIDE, wanted ? from + i * step + column : from, wanted);
        }
    }
};

/* Block: columns, rows, a layer. x [layers, rows, stride], weights [2, dim, stride] a layer, out [layers, rows,
 * out_stride]. TILES: sixteen rows each, of a warp; WARPS: side by side; STAGES: on the way. */
template <int TILES, int WARPS, int STAGES>
__global__ void __launch_bounds__(64 * WARPS)
    swiglu_kernel(const __nv_bfloat16 *x, const unsigned char *weights, const int64_t layer_stride,
                  const int32_t layer_begin, const int64_t stride, const int64_t rows, const int64_t dim,
                  const int64_t out_stride, __nv_bfloat16 *out)
{
    constexpr int THREADS = 64 * WARPS, ROWS = 32 * TILES, COLUMNS = 32 * WARPS;
    constexpr int STAGE = (ROWS + 2 * COLUMNS) * STRIDE;
    BTX_DYNAMIC_SHARED(shared);
    __nv_bfloat16 *tiles = (__nv_bfloat16 *)shared;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int64_t column = (int64_t)blockIdx.x * COLUMNS, row = (int64_t)blockIdx.y * ROWS;
    const __nv_bfloat16 *gate = (const __nv_bfloat16 *)(weights + (layer_begin + blockIdx.z) * layer_stride);
    out += blockIdx.z * rows * out_stride;
    const stage_part<ROWS, THREADS> x_part(x + blockIdx.z * rows * stride, stride, row, rows);
    const stage_part<COLUMNS, THREADS> gate_part(gate, stride, column, dim);
    const stage_part<COLUMNS, THREADS> up_part(gate + dim * stride, stride, column, dim);
    const int depth = (int)stride, at = threadIdx.x % (DEPTH / 8) * 8;
    const int warp_row = warp / WARPS * 16 * TILES, warp_column = warp % WARPS * 32;
    float sum[2][TILES][4][4] = {}; /* gate, up */

#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) {
        __nv_bfloat16 *tile = tiles + stage * STAGE;
        const int begin = stage * DEPTH;
        if (begin < depth) {
            x_part.load(begin, begin + at < depth, tile);
            gate_part.load(begin, begin + at < depth, tile + ROWS * STRIDE);
            up_part.load(begin, begin + at < depth, tile + (ROWS + COLUMNS) * STRIDE);
        }
        copy_async_commit();
    }
    int current = 0, ahead = STAGES - 1;
#pragma unroll 1
    for (int begin = 0; begin < depth; begin += DEPTH) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        const int next = begin + (STAGES - 1) * DEPTH;
        if (next < depth) {
            __nv_bfloat16 *tile = tiles + ahead * STAGE;
            x_part.load(next, next + at < depth, tile);
            gate_part.load(next, next + at < depth, tile + ROWS * STRIDE);
            up_part.load(next, next + at < depth, tile + (ROWS + COLUMNS) * STRIDE);
        }
        copy_async_commit();
        const __nv_bfloat16 *tile = tiles + current * STAGE;
        current = current == STAGES - 1 ? 0 : current + 1;
        ahead = ahead == STAGES - 1 ? 0 : ahead + 1;
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
                    const int first = ROWS + part * COLUMNS + warp_column + n * 8;
                    unsigned right[4];
                    load_matrix_x4(right, tile + (first + lane % 8 + lane / 16 * 8) * STRIDE + k + lane / 8 % 2 * 8);
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
            for (int h = 0; h < 2; h++) {
                const int64_t r = row + warp_row + m * 16 + h * 8 + lane / 4;
                const int64_t c = column + warp_column + n * 8 + lane % 4 * 2; /* out_stride is even */
                if (r >= rows || c >= out_stride)
                    continue;
                const float first = c < dim ? swiglu(sum[0][m][n][2 * h], sum[1][m][n][2 * h]) : 0.0f;
                const float second = c + 1 < dim ? swiglu(sum[0][m][n][2 * h + 1], sum[1][m][n][2 * h + 1]) : 0.0f;
                union {
                    __nv_bfloat16 elements[2];
                    unsigned word;
                } pair;
                pair.elements[0] = from_f32<__nv_bfloat16>(first);
                pair.elements[1] = from_f32<__nv_bfloat16>(second);
                *(unsigned *)(void *)(out + r * out_stride + c) = pair.word;
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

/* Of shared memory. */
static int tile_bytes(int tiles, int warps, int stages)
{
    return stages * (32 * tiles + 64 * warps) * STRIDE * 2;
}

template <int TILES, int WARPS, int STAGES>
static btx_status launch(const btx_pass *pass, const btx_linear *weights, const void *x, void *out, btx_error *error)
{
    cuda_executor *executor = executor_of(pass);
    const int64_t rows = btx_pass_rows(pass), dim = weights->out_dim / 2, out_stride = operand_stride(dim);
    const int bytes = tile_bytes(TILES, WARPS, STAGES);
    btx_status status = cuda_prepare(executor, (const void *)swiglu_kernel<TILES, WARPS, STAGES>, bytes, error);
    if (status != BTX_OK)
        return status;
    BTX_LAUNCH((swiglu_kernel<TILES, WARPS, STAGES>),
               dim3(divide_up(out_stride, 32 * WARPS), divide_up(rows, 32 * TILES), (unsigned)num_layers_of(pass)),
               64 * WARPS, bytes, executor->stream, (const __nv_bfloat16 *)x, (const unsigned char *)weights->packed,
               (int64_t)weights->layer_stride, pass->layer_begin, operand_stride(weights->in_dim), rows, dim,
               out_stride, (__nv_bfloat16 *)out);
    BTX_CUDA_CHECK("launching swiglu_kernel");
    return BTX_OK;
}

/* Of fewer rows than the largest tile is for. */
template <int STAGES>
static btx_status launch_smaller(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                 btx_error *error)
{
    const int64_t rows = btx_pass_rows(pass);
    if (divide_up(rows, 128) * 128 == divide_up(rows, 64) * 64)
        return launch<4, 2, STAGES>(pass, weights, x, out, error);
    return launch<2, 2, STAGES>(pass, weights, x, out, error);
}

/* Larger tiles read less for what they compute; of few rows more of a tile is in vain. The largest, of three stages,
 * takes 162 KiB: an A100's blocks may have 163. Smaller ones have three where two blocks of them fit a multiprocessor,
 * which an A100's has no room for. */
static btx_status launch_best(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                              btx_error *error)
{
    const int limit = executor_of(pass)->shared_limit;
    if (btx_pass_rows(pass) >= 512 && limit >= tile_bytes(4, 4, 3))
        return launch<4, 4, 3>(pass, weights, x, out, error);
    return limit >= 2 * tile_bytes(4, 2, 3) ? launch_smaller<3>(pass, weights, x, out, error)
                                            : launch_smaller<2>(pass, weights, x, out, error);
}

btx_status cuda_linear_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                              btx_error *error)
{
    cuda_executor *executor = executor_of(pass);
    const int64_t rows = btx_pass_rows(pass), dim = weights->out_dim / 2, out_stride = operand_stride(dim);
#ifndef BTX_EMULATE
    if (weights->dtype == BTX_BF16 && executor->encode_tensor_map != NULL)
        return cuda_linear_swiglu_sm90(pass, weights, x, out, error);
#endif
    if (weights->dtype == BTX_BF16)
        return launch_best(pass, weights, x, out, error);
    BTX_LAUNCH(swiglu_f32_kernel,
               dim3(divide_up(out_stride, F32_COLUMNS), divide_up(rows, F32_ROWS), (unsigned)num_layers_of(pass)), 256,
               0, executor->stream, (const float *)x, (const unsigned char *)weights->packed,
               (int64_t)weights->layer_stride, pass->layer_begin, operand_stride(weights->in_dim), rows, dim,
               out_stride, (float *)out);
    BTX_CUDA_CHECK("launching swiglu_f32_kernel");
    return BTX_OK;
}
