/* scores.h - scores q . k of the window's queries with cached keys, tile by tile, for attention_mass.c.
 *
 * One step and one KV head at a time. The rows are the window's queries of all heads of the group,
 *
 *     row = (query of the window) * group + (head of the group)
 *
 * and lie in the lanes of vectors; keys are broadcast. So a key serves the whole group, a softmax over keys needs no
 * sum across lanes, and a key needs no transposition:
 *
 *     queries  [blocks][depth][vectors of the block * VL]    packed once per KV head
 *     keys     [SCORE_TILE][depth]   where they lie, if 32-bit cells can be read there, else a copy; or a copy
 *              [depth][SCORE_TILE]   of a cache whose columns are contiguous
 *     scores   [SCORE_TILE][vectors of the block * VL]       of one block
 *
 * The first copies of a KV head are kept for all blocks of its rows.
 *
 * depth is head_dim, or half of it (rounded up) where two bf16 make one 32-bit cell of a bf16 dot product.
 *
 * The score of a key and a row is one chain of depth fused multiply-adds in order of depth, whatever the tile,
 * the lane and the layout: equal keys have equal scores, bit for bit. The bf16 dot product takes subnormals as zero. */
#ifndef BTX_SCORES_H
#define BTX_SCORES_H

#include <math.h>
#include <string.h>

#include "btx.h"
#include "paging.h"
#include "simd.h"

/* Scores are computed SCORE_KEYS keys by up to SCORE_BLOCK vectors of rows at a time: these sums, the rows and a
 * key stay in registers. */
#if BTX_VL == 16
#define SCORE_KEYS 8
#define SCORE_BLOCK 3
#elif BTX_VL == 4 /* 32 registers as well, but compilers load all the keys at once */
#define SCORE_KEYS 8
#define SCORE_BLOCK 2
#else
#define SCORE_KEYS 4
#define SCORE_BLOCK 3
#endif
#define SCORE_TILE 64                         /* a multiple of SCORE_KEYS, which is a multiple of 4 */
#define SCORE_KEPT_BYTES ((int64_t)256 << 10) /* of copied tiles: half of a small second-level cache */

#ifdef BTX_BF16_DOT
#define SCORE_PAIRS 1
#else
#define SCORE_PAIRS 0
#endif

/* The rows of one step and KV head, and room to work on them. */
typedef struct score_group {
    const btx_plan *plan;
    const btx_tensor *keys; /* of the layer */
    int64_t sequence;
    int64_t end; /* of the step: no position from here on is read */
    int32_t kv_head;
    int64_t num_rows;    /* num_window * group */
    int64_t num_vectors; /* num_rows / VL, rounded up; the lanes behind the last row repeat it */
    int64_t depth;
    int pairs;                        /* cells are two bf16 */
    int by_column;                    /* copied tiles are [depth][SCORE_TILE] */
    const float *cells;               /* of the tile of keys */
    int64_t key_stride, depth_stride; /* of the tile, in cells */
    int64_t ahead, num_ahead;         /* positions [ahead, ahead + num_ahead) are the next tile, to be fetched */
    int64_t num_taken;                /* tiles of this KV head that were taken so far, by any block */
    int64_t num_kept;                 /* tiles with room of their own; the others share the room behind them */
    /* Scratch. */
    float *queries, *tiles, *scores;
    float *tile;          /* of the tile of keys, if it is a copy */
    float *rows;          /* [VL][head_dim] */
    float *probabilities; /* [prior, to whole tiles][SCORE_BLOCK * VL] */
    float *references;    /* [tiles of prior][SCORE_BLOCK * VL] */
    float *mass;          /* [prior] of one head */
} score_group;

static inline size_t score_reserve(size_t *total, int64_t count, size_t size)
{
    size_t offset = *total;
    *total += ((size_t)count * size + BTX_SCRATCH_ALIGNMENT - 1) / BTX_SCRATCH_ALIGNMENT * BTX_SCRATCH_ALIGNMENT;
    return offset;
}

static int64_t score_group_size(const btx_plan *plan)
{
    return plan->num_query_heads / plan->num_kv_heads;
}

static int64_t score_num_tiles(int64_t num_keys)
{
    return (num_keys + SCORE_TILE - 1) / SCORE_TILE;
}

/* Carves the scratch of any step of the plan; with scratch NULL only counts. */
static size_t score_lay_out(const btx_plan *plan, char *scratch, score_group *group)
{
    const int64_t dim = plan->head_dim, block = SCORE_BLOCK * BTX_VL;
    int64_t rows = 0, tiles = 0, window_tiles = 0;
    for (int64_t s = 0; s < plan->num_steps; s++) {
        int64_t of_step = plan->steps[s].num_window * score_group_size(plan);
        rows = of_step > rows ? of_step : rows;
        of_step = score_num_tiles(plan->steps[s].num_prior);
        tiles = of_step > tiles ? of_step : tiles;
        of_step = score_num_tiles(plan->steps[s].num_window);
        window_tiles = of_step > window_tiles ? of_step : window_tiles;
    }
    int64_t kept = SCORE_KEPT_BYTES / (SCORE_TILE * dim * (int64_t)sizeof(float));
    kept = kept < tiles + window_tiles ? kept : tiles + window_tiles;
    size_t total = 0;
    size_t queries = score_reserve(&total, (rows + BTX_VL - 1) / BTX_VL * BTX_VL * dim, sizeof(float));
    size_t copies = score_reserve(&total, (kept + 1) * SCORE_TILE * dim, sizeof(float));
    size_t scores = score_reserve(&total, SCORE_TILE * block, sizeof(float));
    size_t lanes = score_reserve(&total, BTX_VL * dim, sizeof(float));
    size_t probabilities = score_reserve(&total, tiles * SCORE_TILE * block, sizeof(float));
    size_t references = score_reserve(&total, tiles * block, sizeof(float));
    size_t mass = score_reserve(&total, tiles * SCORE_TILE, sizeof(float));
    if (scratch != NULL) {
        group->queries = (float *)(scratch + queries);
        group->num_kept = kept;
        group->tiles = (float *)(scratch + copies);
        group->scores = (float *)(scratch + scores);
        group->rows = (float *)(scratch + lanes);
        group->probabilities = (float *)(scratch + probabilities);
        group->references = (float *)(scratch + references);
        group->mass = (float *)(scratch + mass);
    }
    return total;
}

/* Scratch of every operation of selection, gather and write. A plan of top-k alone has no heads. */
static size_t btx_cpu_selection_scratch_bytes(const btx_plan *plan)
{
    score_group group;
    size_t bytes = plan->num_kv_heads > 0 ? score_lay_out(plan, NULL, &group) : 0;
    size_t row = (size_t)plan->head_dim * sizeof(float); /* rope.h, stage_kv.c */
    for (int64_t s = 0; s < plan->num_steps; s++) {
        size_t order = (size_t)plan->steps[s].num_prior * sizeof(uint32_t); /* top_k.c */
        bytes = order > bytes ? order : bytes;
    }
    return (row > bytes ? row : bytes) + BTX_SCRATCH_ALIGNMENT;
}

/* The width of the next block: the widest, but two and two rather than three and a lone one. */
static inline int score_block_width(int64_t vectors_left)
{
    if (SCORE_BLOCK == 3 && vectors_left == 4)
        return 2;
    return (int)(vectors_left < SCORE_BLOCK ? vectors_left : SCORE_BLOCK);
}

/* One vector of lanes: to[i * stride + lane] = rows[lane][i], i < dim. */
static void score_pack_lanes(const float *const rows[BTX_VL], int64_t dim, int64_t stride, float *to)
{
    int64_t i = 0;
    for (; i + BTX_VL <= dim; i += BTX_VL) {
        vf block[BTX_VL];
        BTX_UNROLL
        for (int lane = 0; lane < BTX_VL; lane++)
            block[lane] = vf_load(rows[lane] + i);
        vf_transpose(block);
        BTX_UNROLL
        for (int k = 0; k < BTX_VL; k++)
            vf_store(to + (i + k) * stride, block[k]);
    }
    for (; i < dim; i++) {
        for (int lane = 0; lane < BTX_VL; lane++)
            to[i * stride + lane] = rows[lane][i];
    }
}

#if SCORE_PAIRS
/* The same of one lane, whose row of bf16 lies at from, as pairs. */
static void score_pack_pairs(const uint16_t *from, int64_t from_stride, int64_t dim, int64_t stride, float *to)
{
    if (from_stride == 1 && dim % 2 == 0) {
        for (int64_t i = 0; i < dim / 2; i++)
            memcpy(&to[i * stride], from + 2 * i, sizeof *to);
        return;
    }
    for (int64_t i = 0; i < dim; i += 2) {
        uint32_t low = from[i * from_stride], high = i + 1 < dim ? from[(i + 1) * from_stride] : 0;
        to[i / 2 * stride] = btx_f32_from_bits(low | high << 16);
    }
}
#endif

/* Packs the queries of a step's window and a KV head. */
static void score_pack_queries(score_group *group, const btx_pass *pass, int32_t layer, const btx_plan_step *step,
                               int32_t kv_head)
{
    const btx_plan *plan = pass->plan;
    const btx_tensor *queries = &plan->queries[layer];
    int64_t group_size = score_group_size(plan), dim = plan->head_dim;
    group->plan = plan;
    group->keys = &plan->keys[layer];
    group->sequence = step->sequence;
    group->end = step->step_end;
    group->kv_head = kv_head;
    group->num_rows = step->num_window * group_size;
    group->num_vectors = (group->num_rows + BTX_VL - 1) / BTX_VL;
    group->pairs = SCORE_PAIRS && queries->dtype == BTX_BF16;
    group->depth = group->pairs ? (dim + 1) / 2 : dim;
    group->by_column = group->keys->stride[3] != 1 && group->keys->stride[1] == 1;
    group->num_taken = 0;

    const int is_plain = queries->dtype == BTX_F32 && queries->stride[3] == 1;
    float *block = group->queries;
    int64_t row = 0, offset = 0;
    for (int64_t left = group->num_vectors; left > 0;) {
        int width = score_block_width(left);
        for (int v = 0; v < width; v++) {
            const float *rows[BTX_VL];
            for (int lane = 0; lane < BTX_VL; lane++, row++) {
                if (row < group->num_rows && row % group_size == 0)
                    offset = btx_query_offset(plan, queries, step->sequence, step->window_begin + row / group_size) +
                             kv_head * group_size * queries->stride[2];
                else if (row < group->num_rows)
                    offset += queries->stride[2];
#if SCORE_PAIRS
                if (group->pairs) {
                    score_pack_pairs((const uint16_t *)queries->data + offset, queries->stride[3], dim, width * BTX_VL,
                                     block + v * BTX_VL + lane);
                    continue;
                }
#endif
                rows[lane] = (const float *)queries->data + offset;
                if (!is_plain) {
                    btx_load_elements(queries, offset, queries->stride[3], dim, group->rows + lane * dim);
                    rows[lane] = group->rows + lane * dim;
                }
            }
            if (!group->pairs)
                score_pack_lanes(rows, dim, width * BTX_VL, block + v * BTX_VL);
        }
        block += group->depth * width * BTX_VL;
        left -= width;
    }
}

/* Packs a run of keys of one block, from offset on, as keys [first, first + n) of the tile. */
static void score_pack_run(const score_group *group, int64_t offset, int64_t first, int64_t n)
{
    const btx_tensor *keys = group->keys;
    int64_t dim = group->plan->head_dim, depth_stride = keys->stride[3];
    if (group->pairs) {
        const uint16_t *from = (const uint16_t *)keys->data + offset;
        if (group->by_column) {
            for (int64_t i = 0; i < dim; i += 2, from += 2 * depth_stride) {
                uint32_t *cells = (uint32_t *)group->tile + i / 2 * SCORE_TILE + first;
                for (int64_t key = 0; key < n; key++)
                    cells[key] = from[key] | (i + 1 < dim ? (uint32_t)from[depth_stride + key] << 16 : 0);
            }
            return;
        }
        for (int64_t key = 0; key < n; key++, from += keys->stride[1]) {
            uint16_t *cells = (uint16_t *)(group->tile + (first + key) * group->depth);
            if (depth_stride == 1) {
                memcpy(cells, from, (size_t)dim * sizeof *cells);
            }
            else {
                for (int64_t i = 0; i < dim; i++)
                    cells[i] = from[i * depth_stride];
            }
            if (dim % 2 != 0)
                cells[dim] = 0;
        }
    }
    else if (group->by_column) {
        for (int64_t i = 0; i < dim; i++)
            btx_load_elements(keys, offset + i * depth_stride, 1, n, group->tile + i * SCORE_TILE + first);
    }
    else {
        for (int64_t key = 0; key < n; key++)
            btx_load_elements(keys, offset + key * keys->stride[1], depth_stride, dim,
                              group->tile + (first + key) * dim);
    }
}

/* The run of positions [position, position + n) that one block holds, at *offset. */
static inline int64_t score_run(const score_group *group, int64_t position, int64_t n, int64_t *offset)
{
    int64_t block_size = group->plan->block_size, run = block_size - position % block_size;
    *offset =
        btx_kv_offset(group->plan, group->keys, group->sequence, position) + group->kv_head * group->keys->stride[2];
    return run < n ? run : n;
}

/* Can the cells of n keys from an offset on, a run of one block, be read where they lie? */
static inline int score_in_place(const score_group *group, int64_t offset, int64_t n)
{
    const btx_tensor *keys = group->keys;
    if (keys->stride[3] != 1 || n % SCORE_KEYS != 0)
        return 0;
    if (group->pairs)
        return group->plan->head_dim % 2 == 0 && offset % 2 == 0 && keys->stride[1] % 2 == 0 &&
               (uintptr_t)keys->data % sizeof(float) == 0;
    return keys->dtype == BTX_F32;
}

/* Zeros behind the n keys of a copied tile, up to whole SCORE_KEYS. */
static void score_clear_keys(const score_group *group, int64_t n)
{
    const int64_t missing = (SCORE_KEYS - n % SCORE_KEYS) % SCORE_KEYS;
    for (int64_t i = 0; missing > 0 && group->by_column && i < group->depth; i++)
        memset(group->tile + i * SCORE_TILE + n, 0, (size_t)missing * sizeof *group->tile);
    if (missing > 0 && !group->by_column)
        memset(group->tile + n * group->depth, 0, (size_t)(missing * group->depth) * sizeof *group->tile);
}

/* Takes a tile of the step's keys: positions [position, position + SCORE_TILE) up to end, zeros behind them. Returns
 * how many they are. Each block of rows takes the tiles of a KV head in order, from tile 0 on. */
static int64_t score_take_keys(score_group *group, int64_t tile, int64_t position, int64_t end)
{
    int64_t n = end - position < SCORE_TILE ? end - position : SCORE_TILE, offset;
    const int was_taken = tile < group->num_taken, next_was_taken = tile + 1 < group->num_taken;
    group->num_taken = was_taken ? group->num_taken : tile + 1;
    group->ahead = position + n;
    group->num_ahead = group->end - group->ahead < SCORE_TILE ? group->end - group->ahead : SCORE_TILE;
    if (group->keys->stride[3] == 1 && group->keys->stride[1] == group->plan->head_dim)
        group->num_ahead = 0; /* keys in a row: the machine fetches ahead by itself */
    if (next_was_taken && tile + 1 < group->num_kept)
        group->num_ahead = 0; /* it is near */
    if (score_run(group, position, n, &offset) == n && score_in_place(group, offset, n)) {
        int64_t cell = group->pairs ? 2 : 1, size = (int64_t)sizeof(float) / cell;
        group->cells = (const float *)(const void *)((const char *)group->keys->data + offset * size);
        group->key_stride = group->keys->stride[1] / cell;
        group->depth_stride = 1;
        return n;
    }
    group->tile = group->tiles + (tile < group->num_kept ? tile : group->num_kept) * SCORE_TILE * group->plan->head_dim;
    group->cells = group->tile;
    group->key_stride = group->by_column ? 1 : group->depth;
    group->depth_stride = group->by_column ? SCORE_TILE : 1;
    if (was_taken && tile < group->num_kept)
        return n;
    score_clear_keys(group, n);
    for (int64_t packed = 0, run; packed < n; packed += run) {
        run = score_run(group, position + packed, n - packed, &offset);
        score_pack_run(group, offset, packed, run);
    }
    return n;
}

static inline void score_prefetch_bytes(const char *from, int64_t bytes)
{
    const char *end = from + bytes;
    for (; from < end; from += 64)
        vf_prefetch(from);
}

/* Brings keys [first, first + SCORE_KEYS) of the next tile nearer, or as large a part of its columns: in small
 * portions, for only so many lines can be on their way at once. */
static void score_prefetch(const score_group *group, int64_t first)
{
    const btx_tensor *keys = group->keys;
    const char *data = keys->data;
    int64_t size = keys->dtype == BTX_F32 ? 4 : 2, dim = group->plan->head_dim, offset;
    for (int64_t seen = 0, run; seen < group->num_ahead; seen += run) {
        run = score_run(group, group->ahead + seen, group->num_ahead - seen, &offset);
        if (group->by_column) {
            int64_t column = dim * first / SCORE_TILE, end = dim * (first + SCORE_KEYS) / SCORE_TILE;
            for (; column < end; column++)
                score_prefetch_bytes(data + (offset + column * keys->stride[3]) * size, run * size);
        }
        else if (keys->stride[3] == 1) {
            int64_t key = first > seen ? first - seen : 0;
            for (; key < run && seen + key < first + SCORE_KEYS; key++)
                score_prefetch_bytes(data + (offset + key * keys->stride[1]) * size, dim * size);
        }
    }
}

/* One step of a dot product: sum + query * key in every lane, key one cell broadcast. */
static inline vf score_step(int pairs, vf query, const float *key, vf sum)
{
#if SCORE_PAIRS
    if (pairs) {
        int32_t cell;
        memcpy(&cell, key, sizeof cell);
        return _mm512_dpbf16_ps(sum, (__m512bh)query, (__m512bh)_mm512_set1_epi32(cell));
    }
#else
    (void)pairs;
#endif
    return vf_fma(query, vf_set1(*key), sum);
}

/* width and pairs are constants where this is inlined: the loops over them unroll and sum lives in registers. */
BTX_INLINE void score_block_of(int width, int pairs, const score_group *group, const float *queries, int64_t num_keys,
                               vf *largest)
{
    int64_t key_stride = group->key_stride, depth_stride = group->depth_stride;
    float *scores = group->scores;
    vf top[SCORE_BLOCK];
    BTX_UNROLL
    for (int v = 0; v < width; v++)
        top[v] = vf_set1(-INFINITY);
    for (int64_t first = 0; first < num_keys; first += SCORE_KEYS) {
        const float *query = queries, *key = group->cells + first * key_stride;
        vf sum[SCORE_KEYS][SCORE_BLOCK], q[SCORE_BLOCK];
        score_prefetch(group, first);
        BTX_UNROLL
        for (int k = 0; k < SCORE_KEYS; k++) {
            BTX_UNROLL
            for (int v = 0; v < width; v++)
                sum[k][v] = vf_zero();
        }
        for (int64_t i = 0; i < group->depth; i++) {
            BTX_UNROLL
            for (int v = 0; v < width; v++)
                q[v] = vf_load(query + v * BTX_VL);
            BTX_UNROLL
            for (int k = 0; k < SCORE_KEYS; k++) {
                BTX_UNROLL
                for (int v = 0; v < width; v++)
                    sum[k][v] = score_step(pairs, q[v], key + k * key_stride, sum[k][v]);
            }
            query += width * BTX_VL;
            key += depth_stride;
        }
        BTX_UNROLL
        for (int k = 0; k < SCORE_KEYS; k++) {
            BTX_UNROLL
            for (int v = 0; v < width; v++) {
                vf_store(scores + v * BTX_VL, sum[k][v]);
                top[v] = vf_max(top[v], sum[k][v]);
            }
            scores += width * BTX_VL;
        }
    }
    BTX_UNROLL
    for (int v = 0; v < width; v++)
        largest[v] = top[v];
}

/* scores [num_keys rounded up to SCORE_KEYS][width * VL] of the taken tile with one block of queries, and the largest
 * of every row, [width]. */
static void score_block(const score_group *group, int width, const float *queries, int64_t num_keys, vf *largest)
{
#if SCORE_PAIRS
    if (group->pairs) {
        if (width == SCORE_BLOCK)
            score_block_of(SCORE_BLOCK, 1, group, queries, num_keys, largest);
        else if (width == 2)
            score_block_of(2, 1, group, queries, num_keys, largest);
        else
            score_block_of(1, 1, group, queries, num_keys, largest);
        return;
    }
#endif
    if (width == SCORE_BLOCK)
        score_block_of(SCORE_BLOCK, 0, group, queries, num_keys, largest);
    else if (width == 2)
        score_block_of(2, 0, group, queries, num_keys, largest);
    else
        score_block_of(1, 0, group, queries, num_keys, largest);
}

#endif /* BTX_SCORES_H */
