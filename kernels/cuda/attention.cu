/* attention.cu - the Processor's own attention: among the rows of a step, no mask, in f32.
 *
 * A thread has one query and goes through the step's keys, which come by in shared memory. */
#include "operations.cuh"

#define THREADS 128
#define KEYS 32     /* in shared memory at a time */
#define KEYS_AT_ONCE 8 /* scores that share one look at the running maximum */

/* Block: a step, a head, a layer. qkv [layers, rows, 3 * dim]; SIZE of a head. */
template <int SIZE, typename Operand>
__global__ void __launch_bounds__(THREADS)
    attention_kernel(const device_plan plan, const float *qkv, const int32_t dim, Operand *out)
{
    __shared__ __align__(16) float keys[KEYS][SIZE], values[KEYS][SIZE];
    const device_step step = plan.steps[blockIdx.x];
    const int32_t num_rows = step.num_recalled + step.num_window, head = blockIdx.y;
    const int64_t first = (int64_t)blockIdx.z * plan.total_rows + step.row_offset, stride = operand_stride(dim);
    /* scores in base 2 */
    const float scale = 1.44269504f / sqrtf((float)SIZE);
    qkv += first * 3 * dim + head * SIZE;
    out += first * stride + head * SIZE;
    for (int32_t begin = 0; begin < num_rows; begin += THREADS) {
        const int32_t row = begin + threadIdx.x;
        float query[SIZE], sum[SIZE], largest = -1e30f, total = 0.0f;
#pragma unroll
        for (int i = 0; i < SIZE; i++) {
            query[i] = row < num_rows ? qkv[(int64_t)row * 3 * dim + i] * scale : 0.0f;
            sum[i] = 0.0f;
        }
        for (int32_t key = 0; key < num_rows; key += KEYS) {
            __syncthreads();
            for (int32_t i = threadIdx.x; i < KEYS * SIZE; i += THREADS) {
                const int32_t k = i / SIZE, column = i % SIZE;
                const float *from = qkv + (int64_t)(key + k) * 3 * dim + column;
                keys[k][column] = key + k < num_rows ? from[dim] : 0.0f;
                values[k][column] = key + k < num_rows ? from[2 * dim] : 0.0f;
            }
            __syncthreads();
#pragma unroll 1
            for (int k = 0; k < KEYS && key + k < num_rows; k += KEYS_AT_ONCE) {
                float score[KEYS_AT_ONCE], peak = largest;
#pragma unroll
                for (int j = 0; j < KEYS_AT_ONCE; j++) {
                    float dot[4] = {};
#pragma unroll
                    for (int i = 0; i < SIZE; i++)
                        dot[i % 4] = fmaf(query[i], keys[k + j][i], dot[i % 4]);
                    score[j] = key + k + j < num_rows ? (dot[0] + dot[1]) + (dot[2] + dot[3]) : -INFINITY;
                    peak = fmaxf(peak, score[j]);
                }
                if (peak > largest) {
                    const float shrink = exp2_fast(largest - peak);
                    largest = peak;
                    total *= shrink;
#pragma unroll
                    for (int i = 0; i < SIZE; i++)
                        sum[i] *= shrink;
                }
#pragma unroll
                for (int j = 0; j < KEYS_AT_ONCE; j++) {
                    const float weight = exp2_fast(score[j] - largest);
                    total += weight;
#pragma unroll
                    for (int i = 0; i < SIZE; i++)
                        sum[i] = fmaf(weight, values[k + j][i], sum[i]);
                }
            }
        }
        if (row < num_rows) {
            const float inverse = 1.0f / total;
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                out[row * stride + i] = from_f32<Operand>(sum[i] * inverse);
        }
    }
    for (int64_t row = threadIdx.x; head == 0 && row < num_rows; row += THREADS) {
        for (int64_t i = dim; i < stride; i++)
            out[row * stride + i] = from_f32<Operand>(0.0f);
    }
}

/* Any size of head: a warp has one query, its lanes the columns; keys are read from the cache as often as needed.
 * Block: warps of rows of a step, a head, a layer. */
template <typename Operand>
__global__ void __launch_bounds__(THREADS) attention_general_kernel(const device_plan plan, const float *qkv,
                                                                    const int32_t dim, const int32_t size,
                                                                    Operand *out)
{
    const device_step step = plan.steps[blockIdx.x];
    const int32_t num_rows = step.num_recalled + step.num_window, head = blockIdx.y;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int64_t first = (int64_t)blockIdx.z * plan.total_rows + step.row_offset, stride = operand_stride(dim);
    const float scale = 1.44269504f / sqrtf((float)size);
    qkv += first * 3 * dim + head * size;
    out += first * stride + head * size;
    for (int32_t row = warp; row < num_rows; row += THREADS / BTX_WARP) {
        const float *query = qkv + (int64_t)row * 3 * dim;
        float largest = -1e30f, total = 0.0f;
        for (int32_t key = 0; key < num_rows; key++) {
            float score = 0.0f;
            for (int32_t i = lane; i < size; i += BTX_WARP)
                score = fmaf(query[i], qkv[(int64_t)key * 3 * dim + dim + i], score);
            score = warp_sum(score) * scale;
            const float peak = fmaxf(largest, score);
            total = total * exp2f(largest - peak) + exp2f(score - peak);
            largest = peak;
        }
        for (int32_t begin = 0; begin < size; begin += BTX_WARP) {
            float sum = 0.0f;
            for (int32_t key = 0; key < num_rows; key++) {
                const float *other = qkv + (int64_t)key * 3 * dim;
                float score = 0.0f;
                for (int32_t i = lane; i < size; i += BTX_WARP)
                    score = fmaf(query[i], other[dim + i], score);
                score = warp_sum(score) * scale;
                if (begin + lane < size)
                    sum = fmaf(exp2f(score - largest), other[2 * dim + begin + lane], sum);
            }
            if (begin + lane < size)
                out[row * stride + begin + lane] = from_f32<Operand>(sum / total);
        }
        for (int64_t i = dim + lane; head == 0 && i < stride; i += BTX_WARP)
            out[row * stride + i] = from_f32<Operand>(0.0f);
    }
}

template <typename Operand>
static btx_status launch(const btx_pass *pass, const float *qkv, int32_t dim, int32_t heads, Operand *out,
                         btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const dim3 grid((unsigned)plan.num_steps, (unsigned)heads, (unsigned)num_layers_of(pass));
    switch (dim / heads) {
    case 16:
        BTX_LAUNCH((attention_kernel<16, Operand>), grid, THREADS, 0, executor->stream, plan, qkv, dim, out);
        break;
    case 32:
        BTX_LAUNCH((attention_kernel<32, Operand>), grid, THREADS, 0, executor->stream, plan, qkv, dim, out);
        break;
    case 64:
        BTX_LAUNCH((attention_kernel<64, Operand>), grid, THREADS, 0, executor->stream, plan, qkv, dim, out);
        break;
    default:
        BTX_LAUNCH((attention_general_kernel<Operand>), grid, THREADS, 0, executor->stream, plan, qkv, dim, dim / heads,
                   out);
    }
    BTX_CUDA_CHECK("launching attention_kernel");
    return BTX_OK;
}

btx_status cuda_attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                          void *out, btx_error *error)
{
    return dtype == BTX_BF16 ? launch(pass, qkv, (int32_t)dim, heads, (__nv_bfloat16 *)out, error)
                             : launch(pass, qkv, (int32_t)dim, heads, (float *)out, error);
}
