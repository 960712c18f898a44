/* attention_mass_sm90.cu - the two kernels of attention_mass.cu with Hopper's asynchronous products (wgmma), for head
 * sizes 64 and 128: the matrix units work on the next scores while exponentials are taken of the last.
 *
 * The right side of a product is read from shared memory, where it lies in rows of 64 elements, swizzled (hopper.cuh);
 * a head of 128 is two such tiles. The left side stays in registers.
 *
 * A block works on several splits or ranges, where there are enough for all multiprocessors: fetching the queries, and
 * waiting for the first keys, took half of the time when it had one of 512 keys. What a split or a range adds up to
 * does not depend on the block that it fell to. */
#include "hopper.cuh"
#include "operations.cuh"
#include "scores.cuh"

#define SPLIT_KEYS 128 /* of a tile: two products */
#define SPLIT_STAGES 3
#define MASS_ROWS 256 /* queries that stay in shared memory, at most */

/* Blocks of the second kernel: their warpgroups have 64 keys at a time, and so many are on a multiprocessor that some
 * take exponentials while others wait for their products. */
template <int D> struct mass_block {
    static constexpr int threads = D == 64 ? 128 : 256, keys = 128, per_processor = D == 64 ? 5 : 2;
};

static_assert(BTX_LSE_MIN_KEYS % SPLIT_KEYS == 0, "splits consist of whole tiles");
static_assert(BTX_MASS_MIN_KEYS % mass_block<128>::keys == 0, "ranges consist of whole tiles");

/* One row of D elements into the swizzled tiles [D / 64][tile_rows][64], by two threads: part is 0 or 1. */
template <typename T, int D>
__device__ static inline void load_swizzled_row(T *shared, int tile_rows, int row, const T *global, int64_t stride,
                                                int vector, int part)
{
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        const int chunk = 2 * i + part; /* of 8 elements */
        T *to = shared + (chunk / 8 * tile_rows + row) * 64 + (chunk % 8 ^ row % 8) * 8;
        if (vector) {
            copy_async_16(to, global + 8 * chunk);
        }
        else {
            for (int j = 0; j < 8; j++)
                to[j] = global[(8 * chunk + j) * stride];
        }
    }
}

/* Where a KV head's keys lie: what the tiles of a step have in common, so that it is read once. */
struct key_source {
    const unsigned char *data; /* of a lane's 16 bytes of a key */
    uint32_t unit_bytes;       /* zero: keys are fetched element by element, and nothing here is used */
    uint32_t block_units, row_units;
    int32_t first_block; /* of the sequence: in plan.blocks */
};

template <typename T, int D>
__device__ static inline key_source make_key_source(const device_step &step, const device_view &view, int32_t kv_head)
{
    const int chunk = threadIdx.x % (D / 8), log2 = view.unit != 0 ? __ffs(view.unit) - 1 : 0;
    return {(const unsigned char *)((const T *)view.data + kv_head * view.stride[2] + 8 * chunk),
            (uint32_t)view.unit * (uint32_t)sizeof(T), (uint32_t)(view.stride[0] >> log2),
            (uint32_t)(view.stride[1] >> log2), step.block_offset - step.first_block};
}

/* Keys [first, end) of a step to a tile of TILE_ROWS, swizzled or padded; rows behind them repeat the last. A lane
 * finds where one of its warp's keys lies, and then the lanes fetch 16 bytes each, a key's one after another: as few
 * requests to the second-level cache as there are lines. Of the lanes that fetch a key together, the i-th finds that of
 * their i-th turn. */
template <typename T, int D, int TILE_ROWS, int TILE_THREADS, bool SWIZZLED>
__device__ static inline void load_key_tile(const device_plan &plan, const device_step &step, const device_view &view,
                                            const key_source &source, int32_t kv_head, int32_t first, int32_t end,
                                            T *tile)
{
    constexpr int CHUNKS = D / 8, ROWS = TILE_ROWS / (TILE_THREADS / BTX_WARP); /* of a key; of a warp */
    constexpr int AT_ONCE = BTX_WARP / CHUNKS, TURNS = ROWS / AT_ONCE;          /* keys of all lanes */
    static_assert(BTX_WARP % CHUNKS == 0 && ROWS % AT_ONCE == 0 && TURNS <= CHUNKS, "lanes share evenly");
    static_assert(8 % AT_ONCE == 0 && ROWS % 8 == 0, "of a row in a swizzled tile, a turn changes some bits");
    const int lane = threadIdx.x % BTX_WARP, warp_row = threadIdx.x / BTX_WARP * ROWS;
    const int chunk = lane % CHUNKS, row = lane / CHUNKS; /* of the first turn */
    const int32_t mine = min(first + warp_row + chunk % TURNS * AT_ONCE + row, end - 1);
    const auto place = [&](int turn) {
        if (!SWIZZLED)
            return tile + (warp_row + row + turn * AT_ONCE) * padded<D>::stride + chunk * 8;
        return tile + (chunk / 8 * TILE_ROWS + warp_row + row + turn * AT_ONCE) * 64 +
               ((chunk % 8 ^ row) * 8 ^ turn * AT_ONCE % 8 * 8);
    };
    if (source.unit_bytes != 0) {
        const unsigned position = (unsigned)(step.sequence_begin + mine), size = (unsigned)plan.block_size;
        const unsigned block = find_block(plan, position);
        const uint32_t units = (uint32_t)plan.blocks[source.first_block + (int32_t)block] * source.block_units +
                               (position - block * size) * source.row_units;
#pragma unroll
        for (int turn = 0; turn < TURNS; turn++) {
            const uint32_t of_turn = __shfl_sync(BTX_ALL_LANES, units, turn, CHUNKS);
            copy_async_16(place(turn), source.data + (uint64_t)of_turn * source.unit_bytes);
        }
    }
    else {
        const int64_t offset = kv_offset(plan, step, view, mine) + kv_head * view.stride[2];
#pragma unroll 1
        for (int turn = 0; turn < TURNS; turn++) {
            const T *from = (const T *)view.data + __shfl_sync(BTX_ALL_LANES, offset, turn, CHUNKS);
            T *to = place(turn);
            for (int j = 0; j < 8; j++)
                to[j] = from[(8 * chunk + j) * view.stride[3]];
        }
    }
}

/* The products of 64 rows, in registers, with 64 rows of swizzled tiles of tile_rows; right is the first's descriptor.
 */
template <typename T, int D>
__device__ static inline void start_scores(float (&score)[32], const unsigned (&left)[D / 16][4], uint64_t right,
                                           int tile_rows)
{
    wgmma_hold(score);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        wgmma_m64n64k16_registers(score, left[k], move_descriptor(right, k / 4 * tile_rows * 64 + k % 4 * 16), T(),
                                  k > 0);
    wgmma_commit();
}

/* How a row's sum is kept from overflowing. FIRST: the reference is set from these scores; LATER: it stays; RUNNING: it
 * follows the largest score, which costs a third more. */
enum reference { FIRST, LATER, RUNNING };
template <reference REFERENCE> struct constant {
    static constexpr reference value = REFERENCE;
};

/* Adds the scores of a thread's two rows to their sums. MASKED: row h sees no key behind last_key[h]; first_key is that
 * of the thread's first column. */
template <bool MASKED, reference REFERENCE>
__device__ static inline void add_row_scores(const float (&score)[32], int32_t first_key, const int32_t (&last_key)[2],
                                             float scale, partial_sum (&row)[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float seen[16], sum[2] = {};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            seen[i] = score[i / 2 * 4 + 2 * h + i % 2];
            if (MASKED && first_key + i / 2 * 8 + i % 2 > last_key[h])
                seen[i] = -INFINITY;
        }
        if (REFERENCE != LATER) {
            float largest = seen[0];
#pragma unroll
            for (int i = 1; i < 16; i++)
                largest = fmaxf(largest, seen[i]);
            largest *= scale;
            if (largest > row[h].largest) {
                row[h].sum *= exp2_fast(row[h].largest - largest);
                row[h].largest = largest;
            }
        }
#pragma unroll
        for (int i = 0; i < 16; i++)
            sum[i % 2] += exp2_fast(fmaf(seen[i], scale, -row[h].largest));
        row[h].sum += sum[0] + sum[1];
    }
}

template <reference REFERENCE>
__device__ static inline void add_tile(const float (&score)[32], int32_t first_key, const int32_t (&last_key)[2],
                                       int32_t num_prior, float scale, partial_sum (&row)[2])
{
    if (first_key + 64 > num_prior)
        add_row_scores<true, REFERENCE>(score, first_key, last_key, scale, row);
    else
        add_row_scores<false, REFERENCE>(score, first_key, last_key, scale, row);
}

#ifdef BTX_SM90A
/* Makes the sum one of [1, 2), so that it can be compared and merged whatever its reference was. */
__device__ static inline void normalize(partial_sum &row)
{
    const unsigned bits = __float_as_uint(row.sum), exponent = bits >> 23;
    if (exponent == 0 || exponent == 255)
        return;
    row.largest += (float)((int)exponent - 127);
    row.sum = __uint_as_float((bits & 0x7fffffu) | 127u << 23);
}
#endif

/* Blocks of the first kernel: a warpgroup has 64 queries. Shared memory has room for two with tiles of 128 elements. */
template <int D, int GROUPS> struct split_block {
    static constexpr int rows = 64 * GROUPS, threads = BTX_WARPGROUP * GROUPS;
    static constexpr int per_processor = D == 64 && GROUPS == 1 ? 4 : 2;
};

/* Queries on the left. Block: per_block splits, some rows of a KV head, a layer. */
template <typename T, int D, int GROUPS>
__global__ void __launch_bounds__(split_block<D, GROUPS>::threads, split_block<D, GROUPS>::per_processor)
    lse_sm90_kernel(const device_plan plan, const int32_t layer_begin, const int32_t row_blocks,
                    const int32_t per_block, partial_sum *partials)
{
#ifdef BTX_SM90A
    constexpr int TILE = SPLIT_KEYS * D, ROWS = split_block<D, GROUPS>::rows;
    BTX_SWIZZLED_SHARED(shared);
    T *tiles = (T *)shared; /* first the queries, padded, then SPLIT_STAGES tiles of keys */
    const int32_t kv_head = blockIdx.y / row_blocks, first_row = blockIdx.y % row_blocks * ROWS;
    const device_layer &layer = plan.layers[layer_begin + blockIdx.z];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const int32_t r = first_row + warp * 16 + lane / 4; /* and r + 8 */
    partials += blockIdx.z * partials_of_layer(plan);

    int32_t next_split = blockIdx.x * per_block;
    const int32_t last_split = min(next_split + per_block, plan.num_splits);
    while (next_split < last_split) {
        /* All that are of one step. */
        const device_tile split = plan.splits[next_split];
        const device_step step = plan.steps[split.step];
        const int32_t num_splits = min(last_split - next_split, step.num_splits - split.index);
        const int32_t num_rows = step.num_window * plan.group;
        next_split += num_splits;
        if (first_row >= num_rows)
            continue;
        __syncthreads(); /* everyone is done with the tiles */
        load_queries<T, D>(plan, step, layer.queries, kv_head, first_row, ROWS, tiles);
        copy_async_commit();
        copy_async_wait<0>();
        __syncthreads();
        unsigned query[D / 16][4];
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            load_left<T, D>(query[k], tiles, warp * 16, k * 16);
        __syncthreads();

        const int32_t num_keys = step.num_prior + step.num_window; /* rows behind the window's see no more either */
        const int32_t last_key[2] = {min(step.num_prior + r / plan.group, num_keys - 1),
                                     min(step.num_prior + (r + 8) / plan.group, num_keys - 1)};
        const key_source source = make_key_source<T, D>(step, layer.keys, kv_head);
        const uint64_t first_tile = make_descriptor(tiles);
        partial_sum row[2];
        /* Scores of what lies behind end are masked. */
        const auto load = [&](int32_t key, int32_t end, int stage) {
            if (key < end)
                load_key_tile<T, D, SPLIT_KEYS, split_block<D, GROUPS>::threads, true>(
                    plan, step, layer.keys, source, kv_head, key, end, tiles + stage * TILE);
            copy_async_commit();
        };
        const auto add = [&](auto reference, const float (&score)[32], int32_t key) {
            add_tile<decltype(reference)::value>(score, key + lane % 4 * 2, last_key, step.num_prior, plan.scale_log2,
                                                 row);
        };
        /* Keys from begin on, of count splits. A split's later tiles keep its first one's reference; true where that
         * overflowed. */
        const auto pass = [&](int32_t index, int32_t count, auto first, auto later) {
            const int32_t begin = index * step.keys_per_split;
            const int32_t end = min(begin + count * step.keys_per_split, num_keys);
            int32_t split_begin = begin;
            bool overflowed = false;
            load(begin, end, 0);
            load(begin + SPLIT_KEYS, end, 1);
            int stage = 0;
            for (int32_t key = begin; key < end; key += SPLIT_KEYS) {
                float score[32];
                const uint64_t tile = uniform_descriptor(move_descriptor(first_tile, stage * TILE));
                copy_async_wait<1>();
                fence_async_proxy();
                __syncthreads();
                start_scores<T, D>(score, query, tile, SPLIT_KEYS);
                /* The stage that was read last turn is free: everyone has passed the barrier. */
                load(key + 2 * SPLIT_KEYS, end, stage == 0 ? SPLIT_STAGES - 1 : stage - 1);
                stage = stage == SPLIT_STAGES - 1 ? 0 : stage + 1;
                wgmma_wait<0>();
                wgmma_hold(score);
                if (key == split_begin) {
                    row[0].largest = row[1].largest = LOWEST;
                    row[0].sum = row[1].sum = 0.0f;
                    add(first, score, key);
                }
                else {
                    add(later, score, key);
                }
                if (key + 64 < end) {
                    start_scores<T, D>(score, query, move_descriptor(tile, 64 * 64), SPLIT_KEYS);
                    wgmma_wait<0>();
                    wgmma_hold(score);
                    add(later, score, key + 64);
                }
                if (key + SPLIT_KEYS < split_begin + step.keys_per_split && key + SPLIT_KEYS < end)
                    continue;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    overflowed |= !(row[h].sum < INFINITY);
                    normalize(row[h]);
                    merge_lanes(row[h], 1);
                    merge_lanes(row[h], 2);
                    if (lane % 4 == 0 && r + h * 8 < num_rows)
                        partials[partial_index(plan, step, index, kv_head, r + h * 8)] = row[h];
                }
                split_begin += step.keys_per_split;
                index++;
            }
            copy_async_wait<0>();
            return overflowed;
        };
        const bool overflowed = pass(split.index, num_splits, constant<FIRST>(), constant<LATER>());
        if (__syncthreads_or(overflowed))
            pass(split.index, num_splits, constant<RUNNING>(), constant<RUNNING>());
    }
#endif
}

/* What the four lanes of a row have, added up: a lane gets that of row lane % 2 of part lane / 2 % 2, if there are two
 * parts, and the same in pairs of lanes if there is one. */
template <int PARTS> __device__ static inline float add_lanes(const float (&total)[PARTS][2])
{
    const bool second_row = threadIdx.x % 2 != 0, second_part = threadIdx.x / 2 % 2 != 0;
    float sum[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        sum[p] = second_row ? total[p][1] : total[p][0];
        sum[p] += __shfl_xor_sync(BTX_ALL_LANES, second_row ? total[p][0] : total[p][1], 1);
    }
    static_assert(PARTS <= 2, "a bit of the lane says which part");
    const float kept = PARTS == 2 && second_part ? sum[PARTS - 1] : sum[0];
    return kept + __shfl_xor_sync(BTX_ALL_LANES, PARTS == 2 && !second_part ? sum[PARTS - 1] : sum[0], 2);
}

/* Keys on the left, the KV head's queries on the right. Block: per_block ranges of keys, a KV head, a layer. mass
 * [layers, num_kv_heads, total_prior]. capacity: rows of queries that shared memory holds, a multiple of 64. */
template <typename T, int D>
__global__ void __launch_bounds__(mass_block<D>::threads, mass_block<D>::per_processor)
    mass_sm90_kernel(const device_plan plan, const int32_t layer_begin, const int32_t capacity, const int32_t per_block,
                     const partial_sum *partials, float *mass)
{
#ifdef BTX_SM90A
    constexpr int STRIDE = padded<D>::stride, MASS_KEYS = mass_block<D>::keys;
    BTX_SWIZZLED_SHARED(shared);
    T *queries = (T *)shared, *keys = queries + capacity * D;
    float *lse = (float *)(keys + MASS_KEYS * STRIDE);
    const int32_t kv_head = blockIdx.y, layer_index = layer_begin + blockIdx.z;
    const device_layer &layer = plan.layers[layer_index];
    const int warp = threadIdx.x / BTX_WARP, lane = threadIdx.x % BTX_WARP;
    const uint64_t first_query = make_descriptor(queries);
    constexpr int PARTS = MASS_KEYS * 2 / mass_block<D>::threads; /* of 64 keys, that a warpgroup has */
    /* Of a tile's keys, the one whose sum add_lanes gives the lane. */
    const int32_t key_of_lane =
        (PARTS == 1 ? warp : lane / 2 % 2 * (mass_block<D>::threads / 32) + warp) * 16 + lane % 2 * 8 + lane / 4;
    const bool stores = PARTS == 2 || lane % 4 < 2;
    partials += blockIdx.z * partials_of_layer(plan);
    mass += ((int64_t)blockIdx.z * plan.num_kv_heads + kv_head) * plan.total_prior;

    int32_t next_range = blockIdx.x * per_block;
    const int32_t last_range = min(next_range + per_block, plan.num_ranges);
    while (next_range < last_range) {
        /* All that are of one step: their keys follow one another. */
        const device_tile range = plan.ranges[next_range];
        const device_step step = plan.steps[range.step];
        const int32_t begin = range.index * step.keys_per_range;
        const int32_t num_ranges =
            min(last_range - next_range, (step.num_prior - begin + step.keys_per_range - 1) / step.keys_per_range);
        const int32_t end = min(begin + num_ranges * step.keys_per_range, step.num_prior);
        const int32_t all_rows = step.num_window * plan.group;
        const float weight = plan.mass_scale / (float)step.num_window;
        float *of_step = mass + step.prior_offset;
        const key_source source = make_key_source<T, D>(step, layer.keys, kv_head);
        const auto load = [&](int32_t key) {
            load_key_tile<T, D, MASS_KEYS, mass_block<D>::threads, false>(plan, step, layer.keys, source, kv_head, key,
                                                                          end, keys);
        };
        next_range += num_ranges;
        for (int32_t first_row = 0; first_row < all_rows; first_row += capacity) {
            const int32_t num_rows = (min(capacity, all_rows - first_row) + 63) / 64 * 64, num_blocks = num_rows / 64;
            for (int32_t row = threadIdx.x / 2; row < num_rows; row += mass_block<D>::threads / 2) {
                const device_view &view = layer.queries;
                const int32_t r = first_row + row, part = threadIdx.x % 2;
                if (r < all_rows) {
                    const int32_t head = kv_head * plan.group + r % plan.group;
                    const T *from =
                        (const T *)view.data + query_offset(plan, step, view, r / plan.group) + head * view.stride[2];
                    load_swizzled_row<T, D>(queries, num_rows, row, from, view.stride[3], view.vector, part);
                }
                else {
                    for (int i = part; i < D; i += 2)
                        queries[(i / 64 * num_rows + row) * 64 + i % 64] = from_f32<T>(0.0f);
                }
            }
            load(begin);
            copy_async_commit();
            load_lse(plan, step, range.step, layer_index, partials, kv_head, first_row, num_rows, lse);
            for (int32_t key = begin; key < end; key += MASS_KEYS) {
                unsigned left[PARTS][D / 16][4];
                copy_async_wait<0>();
                if (key == begin)
                    fence_async_proxy(); /* for the queries; keys are read by threads */
                __syncthreads();
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
#pragma unroll
                    for (int k = 0; k < D / 16; k++)
                        load_left<T, D>(left[p][k], keys, (p * mass_block<D>::threads / 32 + warp) * 16, k * 16);
                }
                __syncthreads();
                const int32_t next = key + MASS_KEYS;
                if (next < end)
                    load(next);
                copy_async_commit();

                float total[PARTS][2] = {};
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    /* While one warpgroup waits for its products, others of the multiprocessor take exponentials. */
#pragma unroll 1
                    for (int block = 0; block < num_blocks; block++) {
                        const float *of_block = lse + block * 64 + lane % 4 * 2;
                        float score[32];
                        start_scores<T, D>(score, left[p], move_descriptor(first_query, block * 64 * 64), num_rows);
                        wgmma_wait<0>();
                        wgmma_hold(score);
#pragma unroll
                        for (int n = 0; n < 8; n++) {
                            const float2 of_columns = *(const float2 *)(const void *)(of_block + n * 8);
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                total[p][h] += exp2_fast(fmaf(score[n * 4 + 2 * h], plan.scale_log2, -of_columns.x));
                                total[p][h] +=
                                    exp2_fast(fmaf(score[n * 4 + 2 * h + 1], plan.scale_log2, -of_columns.y));
                            }
                        }
                    }
                }
                const float sum = add_lanes(total) * weight;
                const int32_t at = key + key_of_lane;
                if (stores && at < end)
                    of_step[at] = first_row == 0 ? sum : of_step[at] + sum;
            }
            __syncthreads();
        }
    }
#endif
}

/* ---- launches -----------------------------------------------------------------------------------------------------
 */

/* How many of a step's splits or ranges a block works on: as many as leave every place on the device some blocks in
 * turn, so that all end at about the same time; but of a step's 16, say, four times 4 rather than 5, 5, 5 and 1, which
 * need as many turns of 5. blocks: of one each; most: of a step. */
static int32_t per_block_of(const cuda_executor *executor, int64_t blocks, int per_processor, int64_t most)
{
    int64_t per_block = blocks / ((int64_t)executor->num_processors * per_processor * 3);
    per_block = per_block < 1 ? 1 : per_block < most ? per_block : most;
    const int64_t blocks_of_step = (most + per_block - 1) / per_block;
    return (int32_t)((most + blocks_of_step - 1) / blocks_of_step);
}

template <typename T, int D, int GROUPS>
static btx_status launch_lse(cuda_executor *executor, int32_t layer_begin, int32_t num_layers, partial_sum *partials,
                             btx_error *error)
{
    const device_plan &plan = executor->plan;
    const int64_t rows = (int64_t)plan.max_window * plan.group;
    const int32_t row_blocks = (int32_t)((rows + split_block<D, GROUPS>::rows - 1) / split_block<D, GROUPS>::rows);
    const int query_bytes = split_block<D, GROUPS>::rows * padded<D>::stride * 2;
    const int key_bytes = SPLIT_STAGES * SPLIT_KEYS * D * 2, bytes = query_bytes > key_bytes ? query_bytes : key_bytes;
    btx_status status = cuda_prepare(executor, (const void *)lse_sm90_kernel<T, D, GROUPS>, bytes, error);
    if (status != BTX_OK)
        return status;
    const int32_t head_blocks = plan.num_kv_heads * row_blocks;
    const int32_t per_block = per_block_of(executor, (int64_t)plan.num_splits * head_blocks * num_layers,
                                           split_block<D, GROUPS>::per_processor, plan.most_splits);
    const int32_t blocks = (plan.num_splits + per_block - 1) / per_block;
    BTX_LAUNCH((lse_sm90_kernel<T, D, GROUPS>), dim3(blocks, head_blocks, num_layers),
               (split_block<D, GROUPS>::threads), bytes, executor->stream, plan, layer_begin, row_blocks, per_block,
               partials);
    BTX_CUDA_CHECK("launching lse_sm90_kernel");
    return BTX_OK;
}

template <typename T, int D>
static btx_status launch(cuda_executor *executor, int32_t layer_begin, int32_t num_layers, partial_sum *partials,
                         float *mass, btx_error *error)
{
    const device_plan &plan = executor->plan;
    const int64_t rows = (int64_t)plan.max_window * plan.group;
    btx_status status = rows <= split_block<D, 1>::rows
                            ? launch_lse<T, D, 1>(executor, layer_begin, num_layers, partials, error)
                            : launch_lse<T, D, 2>(executor, layer_begin, num_layers, partials, error);
    if (status != BTX_OK)
        return status;
    int32_t capacity = (int32_t)((rows + 63) / 64 * 64);
    capacity = capacity < MASS_ROWS ? capacity : MASS_ROWS;
    const int row_bytes = D * 2 + 4, mass_key_bytes = mass_block<D>::keys * padded<D>::stride * 2;
    const int mass_bytes = capacity * row_bytes + mass_key_bytes;
    status =
        cuda_prepare(executor, (const void *)mass_sm90_kernel<T, D>, MASS_ROWS * row_bytes + mass_key_bytes, error);
    if (status != BTX_OK)
        return status;
    const int32_t per_block = per_block_of(executor, (int64_t)plan.num_ranges * plan.num_kv_heads * num_layers,
                                           mass_block<D>::per_processor, plan.most_ranges);
    const int32_t blocks = (plan.num_ranges + per_block - 1) / per_block;
    BTX_LAUNCH((mass_sm90_kernel<T, D>), dim3(blocks, plan.num_kv_heads, num_layers), mass_block<D>::threads,
               mass_bytes, executor->stream, plan, layer_begin, capacity, per_block, partials, mass);
    BTX_CUDA_CHECK("launching mass_sm90_kernel");
    return BTX_OK;
}

btx_status cuda_attention_mass_sm90(const btx_pass *pass, float *mass, btx_error *error)
{
    cuda_executor *executor = executor_of(pass);
    partial_sum *partials = (partial_sum *)pass->scratch;
    const int32_t begin = pass->layer_begin, count = num_layers_of(pass);
    const int wide = executor->plan.head_dim == 128;
    if (pass->plan->keys[0].dtype == BTX_BF16)
        return wide ? launch<__nv_bfloat16, 128>(executor, begin, count, partials, mass, error)
                    : launch<__nv_bfloat16, 64>(executor, begin, count, partials, mass, error);
    return wide ? launch<__half, 128>(executor, begin, count, partials, mass, error)
                : launch<__half, 64>(executor, begin, count, partials, mass, error);
}
