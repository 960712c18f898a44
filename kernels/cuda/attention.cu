/* attention.cu - the Processor's own attention: among the rows of a step, no mask.
 *
 * Beside bf16 products it goes through matrix instructions, each f32 as the sum of two bf16 (its 16 leading bits), of
 * whose four products the three largest are taken: errors are of 2^-16, products' own are of 2^-9. Beside f32 products
 * it is f32: a thread has one query and goes through the step's keys, which come by in shared memory. */
#include "operations.cuh"

#define THREADS 128
#define KEYS 32        /* in shared memory at a time */
#define KEYS_AT_ONCE 8 /* scores that share one look at the running maximum */

/* ---- matrix instructions --------------------------------------------------------------------------------------------
 */

#define SPLIT_KEYS 64 /* in shared memory at a time */
#define SPLIT_WARPS 8 /* at most, of 16 queries each */

/* Two neighbouring elements as sums of two bf16 each. */
typedef struct split_pair {
    unsigned high, low;
} split_pair;

__device__ static inline split_pair split(float first, float second)
{
    union {
        __nv_bfloat16 elements[2];
        unsigned word;
    } high, low;
    split_pair pair;
    high.elements[0] = from_f32<__nv_bfloat16>(first);
    high.elements[1] = from_f32<__nv_bfloat16>(second);
    low.elements[0] = from_f32<__nv_bfloat16>(first - to_f32(high.elements[0]));
    low.elements[1] = from_f32<__nv_bfloat16>(second - to_f32(high.elements[1]));
    pair.high = high.word;
    pair.low = low.word;
    return pair;
}

/* Sixteen columns from column on, of rows row ... row + 15, as two right sides: registers 0, 1 and 2, 3. */
template <int STRIDE>
__device__ static inline void load_right(unsigned (&fragment)[4], const __nv_bfloat16 (*tile)[STRIDE], int row,
                                         int column)
{
    const int lane = threadIdx.x % BTX_WARP;
    load_matrix_x4(fragment, &tile[row + lane % 8 + lane / 16 * 8][column + lane / 8 % 2 * 8]);
}

/* sum += a b with a and b each high + low, but for low * low. */
__device__ static inline void multiply_split(float (&sum)[4], const unsigned (&a_high)[4], const unsigned (&a_low)[4],
                                             unsigned b_high0, unsigned b_high1, unsigned b_low0, unsigned b_low1)
{
    multiply_16x8x16(sum, a_high, b_high0, b_high1, __nv_bfloat16());
    multiply_16x8x16(sum, a_low, b_high0, b_high1, __nv_bfloat16());
    multiply_16x8x16(sum, a_high, b_low0, b_low1, __nv_bfloat16());
}

/* Keys and values come in pieces of two keys and four columns, each on 16 bytes, since sizes are multiples of 16. A
 * warp has 8 by 4 of them: enough of a row to fill its sectors, and in shared memory stores of keys do not meet in a
 * bank, those of values, which are transposed, in pairs. */
typedef struct key_piece {
    int32_t key, column;
} key_piece;

template <int SIZE> __device__ static inline key_piece find_key_piece(int32_t index)
{
    constexpr int32_t ACROSS = SIZE / 16; /* warps */
    const int32_t warp = index / BTX_WARP, lane = index % BTX_WARP;
    return {warp / ACROSS * 16 + lane / 4 * 2, warp % ACROSS * 16 + lane % 4 * 4};
}

__device__ static inline float4 load_or_zero(const float *from, bool wanted)
{
    return wanted ? *(const float4 *)(const void *)from : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

/* Block: a step, a head, a layer. qkv [layers, rows, 3 * dim]; SIZE of a head. A warp has 16 queries at a time. */
template <int SIZE>
__global__ void __launch_bounds__(SPLIT_WARPS *BTX_WARP)
    attention_split_kernel(const device_plan plan, const float *qkv, const int32_t dim, __nv_bfloat16 *out)
{
    constexpr int KEY_STRIDE = SIZE + 8, VALUE_STRIDE = SPLIT_KEYS + 8, PIECES = SPLIT_KEYS / 2 * (SIZE / 4);
    __shared__ __align__(16) __nv_bfloat16 keys[2][SPLIT_KEYS][KEY_STRIDE]; /* high, low */
    __shared__ __align__(16) __nv_bfloat16 values[2][SIZE][VALUE_STRIDE];   /* transposed */
    const device_step step = plan.steps[blockIdx.x];
    const int32_t num_rows = step.num_recalled + step.num_window, head = blockIdx.y;
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP, num_warps = blockDim.x / BTX_WARP;
    const int64_t first = (int64_t)blockIdx.z * plan.total_rows + step.row_offset, stride = operand_stride(dim);
    const float scale = 1.44269504f / sqrtf((float)SIZE); /* scores in base 2 */
    qkv += first * 3 * dim + head * SIZE;
    out += first * stride + head * SIZE;
    for (int32_t begin = 0; begin < num_rows; begin += num_warps * 16) {
        const int32_t row = begin + warp * 16 + lane / 4; /* and row + 8 */
        unsigned query[SIZE / 16][2][4];                  /* high, low */
#pragma unroll
        for (int k = 0; k < SIZE / 16; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int32_t r = row + i % 2 * 8, column = k * 16 + i / 2 * 8 + lane % 4 * 2;
                const float *from = qkv + (int64_t)r * 3 * dim + column;
                const bool inside = r < num_rows;
                const split_pair pair = split(inside ? from[0] * scale : 0.0f, inside ? from[1] * scale : 0.0f);
                query[k][0][i] = pair.high;
                query[k][1][i] = pair.low;
            }
        }
        float sum[SIZE / 8][4] = {}, largest[2] = {-1e30f, -1e30f}, total[2] = {};
        for (int32_t key = 0; key < num_rows; key += SPLIT_KEYS) {
            __syncthreads();
            for (int32_t i = threadIdx.x; i < PIECES; i += blockDim.x) {
                const key_piece piece = find_key_piece<SIZE>(i);
                float4 key_of[2], value_of[2]; /* all on their way before the first is looked at */
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const bool inside = key + piece.key + h < num_rows;
                    const float *from = qkv + (int64_t)(key + piece.key + h) * 3 * dim + piece.column;
                    key_of[h] = load_or_zero(from + dim, inside);
                    value_of[h] = load_or_zero(from + 2 * dim, inside);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const split_pair left = split(key_of[h].x, key_of[h].y), right = split(key_of[h].z, key_of[h].w);
                    *(uint2 *)(void *)&keys[0][piece.key + h][piece.column] = make_uint2(left.high, right.high);
                    *(uint2 *)(void *)&keys[1][piece.key + h][piece.column] = make_uint2(left.low, right.low);
                }
                const float4 one = value_of[0], two = value_of[1];
                const split_pair of_column[4] = {split(one.x, two.x), split(one.y, two.y), split(one.z, two.z),
                                                 split(one.w, two.w)};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    *(unsigned *)(void *)&values[0][piece.column + j][piece.key] = of_column[j].high;
                    *(unsigned *)(void *)&values[1][piece.column + j][piece.key] = of_column[j].low;
                }
            }
            __syncthreads();
            float score[SPLIT_KEYS / 8][4] = {};
#pragma unroll
            for (int k = 0; k < SIZE / 16; k++) {
#pragma unroll
                for (int n = 0; n < SPLIT_KEYS / 8; n += 2) {
                    unsigned high[4], low[4];
                    load_right<KEY_STRIDE>(high, keys[0], n * 8, k * 16);
                    load_right<KEY_STRIDE>(low, keys[1], n * 8, k * 16);
                    multiply_split(score[n], query[k][0], query[k][1], high[0], high[1], low[0], low[1]);
                    multiply_split(score[n + 1], query[k][0], query[k][1], high[2], high[3], low[2], low[3]);
                }
            }
            float peak[2] = {largest[0], largest[1]};
#pragma unroll
            for (int n = 0; n < SPLIT_KEYS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    if (key + n * 8 + lane % 4 * 2 + i % 2 >= num_rows)
                        score[n][i] = -INFINITY;
                    peak[i / 2] = fmaxf(peak[i / 2], score[n][i]);
                }
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                peak[h] = fmaxf(peak[h], __shfl_xor_sync(BTX_ALL_LANES, peak[h], 1));
                peak[h] = fmaxf(peak[h], __shfl_xor_sync(BTX_ALL_LANES, peak[h], 2));
                const float shrink = exp2_fast(largest[h] - peak[h]);
                largest[h] = peak[h];
                total[h] *= shrink;
#pragma unroll
                for (int n = 0; n < SIZE / 8; n++) {
                    sum[n][2 * h] *= shrink;
                    sum[n][2 * h + 1] *= shrink;
                }
            }
#pragma unroll
            for (int k = 0; k < SPLIT_KEYS / 16; k++) {
                unsigned weight[2][4]; /* high, low */
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int n = 2 * k + i / 2, h = i % 2;
                    const float one = exp2_fast(score[n][2 * h] - largest[h]);
                    const float two = exp2_fast(score[n][2 * h + 1] - largest[h]);
                    const split_pair pair = split(one, two);
                    total[h] += one + two;
                    weight[0][i] = pair.high;
                    weight[1][i] = pair.low;
                }
#pragma unroll
                for (int n = 0; n < SIZE / 8; n += 2) {
                    unsigned high[4], low[4];
                    load_right<VALUE_STRIDE>(high, values[0], n * 8, k * 16);
                    load_right<VALUE_STRIDE>(low, values[1], n * 8, k * 16);
                    multiply_split(sum[n], weight[0], weight[1], high[0], high[1], low[0], low[1]);
                    multiply_split(sum[n + 1], weight[0], weight[1], high[2], high[3], low[2], low[3]);
                }
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(BTX_ALL_LANES, total[h], 1);
            total[h] += __shfl_xor_sync(BTX_ALL_LANES, total[h], 2);
            const float inverse = 1.0f / total[h];
            if (row + h * 8 >= num_rows)
                continue;
#pragma unroll
            for (int n = 0; n < SIZE / 8; n++) {
                union {
                    __nv_bfloat16 elements[2];
                    unsigned word;
                } pair;
                pair.elements[0] = from_f32<__nv_bfloat16>(sum[n][2 * h] * inverse);
                pair.elements[1] = from_f32<__nv_bfloat16>(sum[n][2 * h + 1] * inverse);
                *(unsigned *)(void *)(out + (row + h * 8) * stride + n * 8 + lane % 4 * 2) = pair.word;
            }
        }
    }
}

/* ---- plain f32
 * ------------------------------------------------------------------------------------------------------- */

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
                                                                    const int32_t dim, const int32_t size, Operand *out)
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

static int64_t most_rows(const btx_pass *pass)
{
    int64_t most = 0;
    for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
        const btx_plan_step *step = &pass->plan->steps[s];
        most = step->num_recalled + step->num_window > most ? step->num_recalled + step->num_window : most;
    }
    return most;
}

btx_status cuda_attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                          void *out, btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const int32_t width = (int32_t)dim, size = width / heads;
    const dim3 grid((unsigned)plan.num_steps, (unsigned)heads, (unsigned)num_layers_of(pass));
    const int64_t warps = (most_rows(pass) + 15) / 16;
    const unsigned threads = (unsigned)(warps < SPLIT_WARPS ? warps : SPLIT_WARPS) * BTX_WARP;
    if (dtype == BTX_BF16 && size == 16)
        BTX_LAUNCH((attention_split_kernel<16>), grid, threads, 0, executor->stream, plan, qkv, width,
                   (__nv_bfloat16 *)out);
    else if (dtype == BTX_BF16 && size == 32)
        BTX_LAUNCH((attention_split_kernel<32>), grid, threads, 0, executor->stream, plan, qkv, width,
                   (__nv_bfloat16 *)out);
    else if (dtype == BTX_BF16 && size == 64)
        BTX_LAUNCH((attention_split_kernel<64>), grid, threads, 0, executor->stream, plan, qkv, width,
                   (__nv_bfloat16 *)out);
    else if (dtype == BTX_BF16)
        BTX_LAUNCH((attention_general_kernel<__nv_bfloat16>), grid, THREADS, 0, executor->stream, plan, qkv, width,
                   size, (__nv_bfloat16 *)out);
    else if (size == 16)
        BTX_LAUNCH((attention_kernel<16, float>), grid, THREADS, 0, executor->stream, plan, qkv, width, (float *)out);
    else if (size == 32)
        BTX_LAUNCH((attention_kernel<32, float>), grid, THREADS, 0, executor->stream, plan, qkv, width, (float *)out);
    else
        BTX_LAUNCH((attention_general_kernel<float>), grid, THREADS, 0, executor->stream, plan, qkv, width, size,
                   (float *)out);
    BTX_CUDA_CHECK("launching the attention");
    return BTX_OK;
}
