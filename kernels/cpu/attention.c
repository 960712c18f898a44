/* attention.c - the Processor's own attention (arXiv 2505.16950, section 3.3): all rows of a step see each other,
 * no mask, no positions.
 *
 * One step, head and block of keys at a time, as two products on packed panels (tile.h):
 *
 *     scores [rows of a tile, keys] = q k^T       k packed [panels of keys][d][BTX_PANEL]
 *     out    [rows of a tile, d]   += p v         v packed [panels of d][keys][BTX_PANEL]
 *
 * with the running maximum and sum of each row, so scratch does not grow with the square of the rows. Most
 * steps fit in one block. */
#include <float.h>
#include <math.h>

#include "btx.h"
#include "operand.h"
#include "tile.h"

#define BTX_KEY_BLOCK 256                /* keys at most */
#define BTX_KEY_WORDS ((int64_t)1 << 16) /* of packed k and v, where a panel of keys is less */

static inline int64_t attention_panels(int64_t n)
{
    return (n + BTX_PANEL - 1) / BTX_PANEL;
}

/* Keys of a block: whole panels. */
static int64_t attention_key_block(int64_t head_dim)
{
    int64_t width = head_dim + attention_panels(head_dim) * BTX_PANEL;
    int64_t keys = BTX_KEY_WORDS / width / BTX_PANEL * BTX_PANEL;
    return keys < BTX_PANEL ? BTX_PANEL : keys > BTX_KEY_BLOCK ? BTX_KEY_BLOCK : keys;
}

/* For steps of up to max_rows rows, and any head_dim up to max_dim. */
static size_t btx_cpu_attention_scratch_bytes(int64_t max_rows, int64_t max_dim)
{
    int64_t panel_words = BTX_PANEL * (max_dim + attention_panels(max_dim) * BTX_PANEL);
    int64_t words = panel_words > BTX_KEY_WORDS ? panel_words : BTX_KEY_WORDS;
    return (size_t)(words + BTX_TILE_ROWS * BTX_KEY_BLOCK + (2 + max_dim) * max_rows) * sizeof(float);
}

/* One step and head: rows of q, k, v [num_rows, stride], each head_dim wide. */
typedef struct attention_head {
    const float *q, *k, *v;
    int64_t num_rows, head_dim, stride, key_block;
    float scale;
    /* Scratch. */
    float *packed_k, *packed_v, *scores;
    float *max, *sum; /* [num_rows], of the blocks so far */
    float *out;       /* [num_rows, head_dim] */
} attention_head;

static void attention_pack(const attention_head *head, int64_t key_begin, int64_t num_keys)
{
    const float *k = head->k + key_begin * head->stride, *v = head->v + key_begin * head->stride;
    for (int64_t j = 0; j < attention_panels(num_keys) * BTX_PANEL; j++) {
        float *to = head->packed_k + j / BTX_PANEL * head->head_dim * BTX_PANEL + j % BTX_PANEL;
        for (int64_t i = 0; i < head->head_dim; i++)
            to[i * BTX_PANEL] = j < num_keys ? k[j * head->stride + i] : 0.0f;
    }
    for (int64_t begin = 0; begin < head->head_dim; begin += BTX_PANEL) {
        float *to = head->packed_v + begin * num_keys;
        for (int64_t j = 0; j < num_keys; j++) {
            for (int64_t i = 0; i < BTX_PANEL; i += BTX_VL) {
                int64_t n = head->head_dim - begin - i;
                vf value =
                    n <= 0 ? vf_zero() : vf_load_n(v + j * head->stride + begin + i, n < BTX_VL ? (int)n : BTX_VL);
                vf_store(to + j * BTX_PANEL + i, value);
            }
        }
    }
}

/* scores [num_keys, to whole vectors] become 2^(scale * (score - max)), and *max and *sum go on to include those of the
 * keys. Behind them stands the score of one of them, which is not summed. Returns what the sum so far, and so the
 * output, was multiplied by. scale includes log2(e). */
static float attention_softmax(float *scores, int64_t num_keys, float scale, float *max, float *sum)
{
    for (int64_t j = num_keys; j % BTX_VL != 0; j++)
        scores[j] = scores[0];
    vf largest = vf_set1(*max);
    for (int64_t j = 0; j < num_keys; j += BTX_VL)
        largest = vf_max(largest, vf_load(scores + j));
    float new_max = vf_reduce_max(largest), factor = 1.0f;
    if (*sum > 0.0f && new_max > *max)
        factor = vf_reduce_max(vf_exp2_from(vf_set1((*max - new_max) * scale), vf_zero()));
    vf total = vf_zero();
    for (int64_t j = 0; j < num_keys; j += BTX_VL) {
        vf value = vf_exp2_from(vf_mul(vf_sub(vf_load(scores + j), vf_set1(new_max)), vf_set1(scale)), vf_zero());
        vf_store(scores + j, value);
        total = vf_add(total, num_keys - j < BTX_VL ? vf_load_n(scores + j, (int)(num_keys - j)) : value);
    }
    *max = new_max;
    *sum = *sum * factor + vf_reduce_add(total);
    return factor;
}

static void attention_multiply(float *x, int64_t n, float factor)
{
    int64_t i = 0;
    for (; i + BTX_VL <= n; i += BTX_VL)
        vf_store(x + i, vf_mul(vf_load(x + i), vf_set1(factor)));
    vf_store_n(x + i, vf_mul(vf_load_n(x + i, (int)(n - i)), vf_set1(factor)), (int)(n - i));
}

/* Rows [row_begin, row_end), a tile, with the packed keys. */
static void attention_tile(const attention_head *head, int64_t row_begin, int64_t row_end, int64_t num_keys,
                           int first_block)
{
    btx_tile tile = {.rows = (int)(row_end - row_begin),
                     .a = head->q + row_begin * head->stride,
                     .a_stride = head->stride,
                     .b = head->packed_k};
    tile.depth = head->head_dim;
    tile.c_stride = head->key_block * (int64_t)sizeof(float);
    tile.columns = BTX_PANEL;
    for (int64_t begin = 0; begin < num_keys; begin += BTX_PANEL) {
        tile.c = head->scores + begin;
        btx_tile_run(btx_tiles_f32, &tile);
        tile.b += tile.depth * BTX_PANEL;
    }

    for (int64_t row = row_begin; row < row_end; row++) {
        float *scores = head->scores + (row - row_begin) * head->key_block;
        float factor = attention_softmax(scores, num_keys, head->scale, &head->max[row], &head->sum[row]);
        if (!first_block && factor != 1.0f)
            attention_multiply(head->out + row * head->head_dim, head->head_dim, factor);
    }

    tile = (btx_tile){
        .rows = (int)(row_end - row_begin), .a = head->scores, .a_stride = head->key_block, .b = head->packed_v};
    tile.depth = num_keys;
    tile.c_stride = head->head_dim * (int64_t)sizeof(float);
    tile.accumulate = !first_block;
    for (int64_t begin = 0; begin < head->head_dim; begin += BTX_PANEL) {
        int64_t n = head->head_dim - begin;
        tile.c = head->out + row_begin * head->head_dim + begin;
        tile.columns = n < BTX_PANEL ? (int)n : BTX_PANEL;
        btx_tile_run(btx_tiles_f32, &tile);
        tile.b += tile.depth * BTX_PANEL;
    }
}

static void attention_run(const attention_head *head)
{
    for (int64_t row = 0; row < head->num_rows; row++) {
        head->max[row] = -FLT_MAX; /* finite, for differences are taken of it */
        head->sum[row] = 0.0f;
    }
    for (int64_t key = 0; key < head->num_rows; key += head->key_block) {
        int64_t left = head->num_rows - key, num_keys = left < head->key_block ? left : head->key_block;
        attention_pack(head, key, num_keys);
        for (int64_t t = 0; t < btx_num_tiles(head->num_rows); t++)
            attention_tile(head, btx_tile_begin(head->num_rows, t), btx_tile_begin(head->num_rows, t + 1), num_keys,
                           key == 0);
    }
}

/* The finished rows of a head as columns [column, column + head_dim) of an operand of width dim. */
static void attention_store(const attention_head *head, void *out, int64_t column, int64_t dim, btx_dtype dtype)
{
    const float *from = head->out;
    for (int64_t row = 0; row < head->num_rows; row++, out = (char *)out + operand_stride(dim, dtype)) {
        const vf factor = vf_set1(1.0f / head->sum[row]);
        for (int64_t i = 0; i < head->head_dim; i += BTX_VL) {
            int n = (int)(head->head_dim - i < BTX_VL ? head->head_dim - i : BTX_VL);
            operand_store_n(out, dtype, column + i, vf_mul(vf_load_n(from + i, n), factor), n);
        }
        if (column + head->head_dim == dim)
            operand_end(out, dtype, dim);
        from += head->head_dim;
    }
}

static btx_status btx_cpu_attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                                    void *out, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    attention_head head = {.head_dim = dim / heads, .stride = 3 * dim};
    head.key_block = attention_key_block(head.head_dim);
    head.scale = (float)(1.44269504088896340736 / sqrt((double)head.head_dim));
    head.packed_k = pass->scratch;
    head.packed_v = head.packed_k + head.key_block * head.head_dim;
    head.scores = head.packed_v + head.key_block * attention_panels(head.head_dim) * BTX_PANEL;
    head.max = head.scores + BTX_TILE_ROWS * head.key_block;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            head.num_rows = plan->steps[s].num_recalled + plan->steps[s].num_window;
            head.sum = head.max + head.num_rows;
            head.out = head.sum + head.num_rows;
            for (int32_t h = 0; h < heads; h++) {
                head.q = qkv + h * head.head_dim;
                head.k = head.q + dim;
                head.v = head.k + dim;
                attention_run(&head);
                attention_store(&head, out, h * head.head_dim, dim, dtype);
            }
            qkv += head.num_rows * head.stride;
            out = (char *)out + head.num_rows * operand_stride(dim, dtype);
        }
    }
    return BTX_OK;
}
