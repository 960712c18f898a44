/* linear_swiglu_sm90.cu - linear_swiglu.cu's product of bf16 operands with Hopper's own means: products of whole
 * warpgroups (wgmma) of what the tensor copy engine brings into shared memory, swizzled, and takes from there.
 *
 * As many blocks as the device has processors go through the tiles of all layers. A tile has 64 rows a warpgroup and
 * COLUMNS columns of each product; a stage of its depth is DEPTH elements of its rows of x and, gate's before up's, of
 * the weights, so that one wgmma makes both products. One more warp keeps the engine busy, also while the others finish
 * their tile. */
#ifndef BTX_EMULATE
#include "hopper.cuh"
#include "operations.cuh"
#include <cudaTypedefs.h>

#define DEPTH 64 /* 128 bytes, a row of a swizzled tile */

template <int WARPGROUPS, int COLUMNS, int STAGES> struct tile_shape {
    static constexpr int ROWS = 64 * WARPGROUPS, WARPS = 4 * WARPGROUPS, THREADS = 32 * (WARPS + 1);
    static constexpr int X = ROWS * DEPTH, STAGE = X + 2 * COLUMNS * DEPTH; /* elements */
    static constexpr int OUT_BOX = 16 * 64, WARP_OUT = OUT_BOX * (COLUMNS / 64);
    static constexpr int BYTES =
        BTX_SWIZZLED_ALIGNMENT + 2 * (STAGES * STAGE + WARPS * WARP_OUT) + 2 * STAGES * (int)sizeof(uint64_t);
};

#ifdef BTX_SM90A
__device__ static inline void multiply(float (&sum)[64], uint64_t left, uint64_t right, int accumulate)
{
    wgmma_m64n128k16(sum, left, right, __nv_bfloat16(), accumulate);
}
/* Within a few units in the last place of f32, to be rounded to bf16. */
__device__ static inline float swiglu(float gate, float up)
{
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.0f + exp2_fast(-1.44269504f * gate)));
    return gate * inverse * up;
}

/* The warp's 16 rows of a tile, at out in boxes of 64 columns. */
template <int COLUMNS>
__device__ static inline void write_swiglu(const float (&sum)[COLUMNS], int lane, __nv_bfloat16 *out)
{
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n += 2) {
        unsigned words[4]; /* rows 0-7 and 8-15 of eight columns, then of eight more */
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int at = 4 * (n + i / 2) + 2 * (i % 2);
            const __nv_bfloat162 pair = __floats2bfloat162_rn(swiglu(sum[at], sum[COLUMNS / 2 + at]),
                                                              swiglu(sum[at + 1], sum[COLUMNS / 2 + at + 1]));
            words[i] = *(const unsigned *)(const void *)&pair;
        }
        store_matrix_x4(out + n / 8 * (16 * 64) + swizzled(lane % 16, n % 8 + lane / 16), words);
    }
}
#endif /* BTX_SM90A */

/* Boxes: of x [layers, rows, stride] 1 x ROWS x DEPTH, of weights [layers, 2, dim, stride] 1 x 2 x COLUMNS x DEPTH, of
 * out [layers, rows, out_stride] 1 x 16 x 64. */
template <int WARPGROUPS, int COLUMNS, int STAGES>
__global__ void __launch_bounds__(tile_shape<WARPGROUPS, COLUMNS, STAGES>::THREADS, 1)
    swiglu_sm90_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weights,
                       const __grid_constant__ CUtensorMap out, const int depth, const int rows, const int dim,
                       const int out_stride, const int row_tiles, const int column_tiles, const int num_tiles)
{
#ifdef BTX_SM90A
    using shape = tile_shape<WARPGROUPS, COLUMNS, STAGES>;
    BTX_DYNAMIC_SHARED(shared);
    __nv_bfloat16 *stages = (__nv_bfloat16 *)(shared + (0u - shared_address(shared)) % BTX_SWIZZLED_ALIGNMENT);
    __nv_bfloat16 *staged = stages + STAGES * shape::STAGE;
    uint64_t *full = (uint64_t *)(staged + shape::WARPS * shape::WARP_OUT), *empty = full + STAGES;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    int stage = 0;
    unsigned parity = 0;

    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&full[i], 1);
            barrier_init(&empty[i], shape::WARPS);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (warp == shape::WARPS) {
        if (lane > 0)
            return;
        for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
            const int row = tile % row_tiles * shape::ROWS, column = tile / row_tiles % column_tiles * COLUMNS;
            const int layer = tile / row_tiles / column_tiles;
            for (int begin = 0; begin < depth; begin += DEPTH) {
                __nv_bfloat16 *to = stages + stage * shape::STAGE;
                barrier_wait(&empty[stage], parity ^ 1);
                barrier_arrive_expect(&full[stage], 2 * shape::STAGE);
                copy_box(to + shape::X, &weights, &full[stage], begin, column, 0, layer);
                copy_box(to, &x, &full[stage], begin, row, layer);
                stage = stage == STAGES - 1 ? 0 : stage + 1;
                parity ^= stage == 0;
            }
        }
        return;
    }
    const int group = __shfl_sync(BTX_ALL_LANES, warp / 4, 0);
    __nv_bfloat16 *warp_out = staged + warp * shape::WARP_OUT;
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        float sum[COLUMNS]; /* gate, up */
        int previous = 0;
#pragma unroll 1
        for (int begin = 0; begin < depth; begin += DEPTH) {
            const __nv_bfloat16 *left = stages + stage * shape::STAGE + group * 64 * DEPTH;
            const __nv_bfloat16 *right = stages + stage * shape::STAGE + shape::X;
            barrier_wait(&full[stage], parity);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < DEPTH; k += 16)
                multiply(sum, make_descriptor(left + k), make_descriptor(right + k), begin + k > 0);
            wgmma_commit();
            wgmma_wait<1>();
            if (begin > 0 && lane == 0)
                barrier_arrive(&empty[previous]);
            previous = stage;
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            parity ^= stage == 0;
        }
        wgmma_wait<0>();
        wgmma_hold(sum);
        if (lane == 0) {
            barrier_arrive(&empty[previous]);
            store_wait_read(); /* of the tile before */
        }
        __syncwarp();
        const int row = tile % row_tiles * shape::ROWS + warp * 16, layer = tile / row_tiles / column_tiles;
        const int column = tile / row_tiles % column_tiles * COLUMNS;
        write_swiglu<COLUMNS>(sum, lane, warp_out);
        if (column + COLUMNS > dim) { /* zeros behind dim, also where x is not finite */
            __syncwarp();
            for (int c = dim - column; lane < 16 && c < out_stride - column; c++)
                warp_out[c / 64 * shape::OUT_BOX + swizzled(lane, c % 64 / 8) + c % 8] = from_f32<__nv_bfloat16>(0.0f);
        }
        fence_async_proxy();
        __syncwarp();
        if (lane == 0 && row < rows) {
            for (int i = 0; i < COLUMNS / 64; i++) {
                if (column + i * 64 < out_stride)
                    store_box(&out, warp_out + i * shape::OUT_BOX, column + i * 64, row, layer);
            }
            store_commit();
        }
    }
    if (lane == 0)
        store_wait_read();
#endif /* BTX_SM90A */
}

/* A map of a bf16 tensor of these sizes, the innermost first, strides in elements but for the first, which is 1. */
static btx_status encode(cuda_executor *executor, const void *data, int dims, const int64_t *sizes,
                         const int64_t *strides, const int *box, CUtensorMap *map, btx_error *error)
{
    cuuint64_t size[4], stride[3];
    cuuint32_t length[4], step[4] = {1, 1, 1, 1};
    for (int i = 0; i < dims; i++) {
        size[i] = (cuuint64_t)sizes[i];
        length[i] = (cuuint32_t)box[i];
        if (i > 0)
            stride[i - 1] = (cuuint64_t)strides[i] * sizeof(__nv_bfloat16);
    }
    const CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)executor->encode_tensor_map)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (cuuint32_t)dims, (void *)data, size, stride, length, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? BTX_OK : cuda_fail((cudaError_t)result, "making a tensor map", error);
}

static int64_t divide_up(int64_t a, int64_t b)
{
    return (a + b - 1) / b;
}

template <int WARPGROUPS, int COLUMNS, int STAGES>
static btx_status launch(const btx_pass *pass, const btx_linear *weights, const void *x, void *out, btx_error *error)
{
    using shape = tile_shape<WARPGROUPS, COLUMNS, STAGES>;
    cuda_executor *executor = executor_of(pass);
    const int64_t layers = num_layers_of(pass), rows = btx_pass_rows(pass), dim = weights->out_dim / 2;
    const int64_t depth = operand_stride(weights->in_dim), out_stride = operand_stride(dim);
    const int64_t layer_stride = (int64_t)(weights->layer_stride / sizeof(__nv_bfloat16));
    const int64_t x_size[] = {depth, rows, layers}, x_stride[] = {1, depth, rows * depth};
    const int64_t weight_size[] = {depth, dim, 2, layers}, weight_stride[] = {1, depth, dim * depth, layer_stride};
    const int64_t out_size[] = {out_stride, rows, layers}, out_strides[] = {1, out_stride, rows * out_stride};
    const int x_box[] = {DEPTH, shape::ROWS, 1}, weight_box[] = {DEPTH, COLUMNS, 2, 1}, out_box[] = {64, 16, 1};
    const unsigned char *first = (const unsigned char *)weights->packed + pass->layer_begin * weights->layer_stride;
    const int64_t row_tiles = divide_up(rows, shape::ROWS), column_tiles = divide_up(dim, COLUMNS);
    const int64_t num_tiles = row_tiles * column_tiles * layers;
    CUtensorMap x_map, weight_map, out_map;
    btx_status status = encode(executor, x, 3, x_size, x_stride, x_box, &x_map, error);
    if (status == BTX_OK)
        status = encode(executor, first, 4, weight_size, weight_stride, weight_box, &weight_map, error);
    if (status == BTX_OK)
        status = encode(executor, out, 3, out_size, out_strides, out_box, &out_map, error);
    if (status != BTX_OK)
        return status;
    status = cuda_prepare(executor, (const void *)swiglu_sm90_kernel<WARPGROUPS, COLUMNS, STAGES>, shape::BYTES, error);
    if (status != BTX_OK)
        return status;
    BTX_LAUNCH((swiglu_sm90_kernel<WARPGROUPS, COLUMNS, STAGES>),
               (unsigned)(num_tiles < executor->num_processors ? num_tiles : executor->num_processors), shape::THREADS,
               shape::BYTES, executor->stream, x_map, weight_map, out_map, (int)depth, (int)rows, (int)dim,
               (int)out_stride, (int)row_tiles, (int)column_tiles, (int)num_tiles);
    BTX_CUDA_CHECK("launching swiglu_sm90_kernel");
    return BTX_OK;
}

/* Small tiles for few rows, of which large ones would compute many in vain and leave processors without one; measured
 * on an H200. */
btx_status cuda_linear_swiglu_sm90(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                   btx_error *error)
{
    return btx_pass_rows(pass) <= 192 ? launch<1, 64, 8>(pass, weights, x, out, error)
                                      : launch<2, 64, 6>(pass, weights, x, out, error);
}
#endif /* BTX_EMULATE */
