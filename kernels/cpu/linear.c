/* linear.c - y = x W^T + bias, the products of the Processor (arXiv 2505.16950, section 3.3), on weights packed
 * when the Processor is created.
 *
 * Packed, one layer, in words of 32 bits (one f32, or two bf16 that are neighbours in in_dim, see tile.h), in the
 * order in which they are read:
 *
 *     for each BTX_COLUMN_BLOCK of out_dim          its outputs stay in the second-level cache
 *         for each BTX_DEPTH_BLOCK words of in_dim
 *             for each panel of BTX_PANEL columns   its words stay in the first-level cache for all rows
 *                 [words][BTX_PANEL]
 *
 * Columns behind out_dim and the half word behind an odd in_dim are zero. While the first tiles of rows pass by a
 * panel, the next is prefetched, one line for each word of depth and none twice: the weights of a layer are used
 * once in a boundary, so they come from memory. */
#include "btx.h"
#include "tile.h"

#define BTX_DEPTH_BLOCK 256
#define BTX_COLUMN_BLOCK 512
#define BTX_ROW_BLOCK 256 /* rows that share one pass over the weights */
#define BTX_LINE 64       /* bytes of a cache line */
#define BTX_PANEL_LINES ((int64_t)(BTX_PANEL * sizeof(float) / BTX_LINE))

static inline int64_t linear_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t linear_round_up(int64_t n, int64_t multiple)
{
    return (n + multiple - 1) / multiple * multiple;
}

static inline int64_t linear_depth(int64_t in_dim, btx_dtype dtype)
{
    return dtype == BTX_BF16 ? (in_dim + 1) / 2 : in_dim;
}

static size_t btx_cpu_packed_bytes(int64_t out_dim, int64_t in_dim, btx_dtype dtype)
{
    return (size_t)linear_round_up(out_dim, BTX_PANEL) * (size_t)linear_depth(in_dim, dtype) * sizeof(uint32_t);
}

/* The word at depth k of a row of weights. */
static inline uint32_t linear_word(const float *row, int64_t k, int64_t in_dim, btx_dtype dtype)
{
    if (dtype == BTX_F32)
        return btx_f32_bits(row[k]);
    uint32_t low = btx_f32_to_bf16(row[2 * k]);
    uint32_t high = 2 * k + 1 < in_dim ? btx_f32_to_bf16(row[2 * k + 1]) : 0;
    return low | high << 16;
}

static void btx_cpu_pack(const float *weight, int64_t out_dim, int64_t in_dim, btx_dtype dtype, void *packed)
{
    const int64_t depth = linear_depth(in_dim, dtype), columns = linear_round_up(out_dim, BTX_PANEL);
    char *panel = packed;
    for (int64_t n0 = 0; n0 < columns; n0 += BTX_COLUMN_BLOCK) {
        int64_t n1 = linear_min(n0 + BTX_COLUMN_BLOCK, columns);
        for (int64_t k0 = 0; k0 < depth; k0 += BTX_DEPTH_BLOCK) {
            int64_t words = linear_min(depth - k0, BTX_DEPTH_BLOCK);
            for (int64_t n = n0; n < n1; n += BTX_PANEL) {
                for (int64_t j = 0; j < BTX_PANEL; j++) {
                    for (int64_t k = 0; k < words; k++) {
                        uint32_t word =
                            n + j < out_dim ? linear_word(weight + (n + j) * in_dim, k0 + k, in_dim, dtype) : 0;
                        memcpy(panel + (k * BTX_PANEL + j) * (int64_t)sizeof word, &word, sizeof word);
                    }
                }
                panel += words * BTX_PANEL * (int64_t)sizeof(uint32_t);
            }
        }
    }
}

/* Floats of A for each word of depth. */
#define BTX_BF16_A (BTX_WORD_BF16 == BTX_WORD_BF16_DOT ? 1 : 2)

static size_t btx_cpu_linear_scratch_bytes(int64_t rows, int64_t max_in_dim)
{
    size_t words = (size_t)linear_depth(max_in_dim, BTX_BF16) * BTX_BF16_A;
    return (size_t)linear_min(rows, BTX_ROW_BLOCK) * words * sizeof(float);
}

/* x [rows, in_dim] rounded to bf16, as the tiles want it: [rows, depth * BTX_BF16_A]. */
static void linear_round(const float *x, int64_t rows, int64_t in_dim, float *out)
{
    const int64_t width = linear_depth(in_dim, BTX_BF16) * BTX_BF16_A, tail = in_dim % BTX_VL;
    for (int64_t i = 0; i < rows; i++, x += in_dim, out += width) {
        int64_t k = 0;
        out[width - 1] = 0.0f; /* the half word behind an odd in_dim */
#ifdef BTX_BF16_DOT
        uint16_t *halves = (uint16_t *)(void *)out;
        for (; k < in_dim - tail; k += BTX_VL)
            vf_store_bf16(halves + k, vf_load(x + k));
        vf_store_bf16_n(halves + k, vf_load_n(x + k, (int)tail), (int)tail);
#else
        for (; k < in_dim - tail; k += BTX_VL)
            vf_store(out + k, vf_from_bf16(vf_to_bf16(vf_load(x + k))));
        vf_store_n(out + k, vf_from_bf16(vf_to_bf16(vf_load_n(x + k, (int)tail))), (int)tail);
#endif
    }
}

/* out [rows, out_dim] of one layer, at most BTX_ROW_BLOCK rows; a [rows, a_stride], a_per_word floats for each
 * word of depth. */
static void linear_rows(const btx_tile_function *tiles, const float *a, int64_t a_stride, int64_t a_per_word,
                        const float *packed, const float *bias, int64_t depth, int64_t rows, int64_t out_dim,
                        int accumulate, float *out)
{
    const int64_t columns = linear_round_up(out_dim, BTX_PANEL), num_tiles = btx_num_tiles(rows);
    const float *end = packed + columns * depth;
    btx_tile tile = {.a_stride = a_stride, .b = packed, .c_stride = out_dim};
    for (int64_t n0 = 0; n0 < columns; n0 += BTX_COLUMN_BLOCK) {
        int64_t n1 = linear_min(n0 + BTX_COLUMN_BLOCK, columns);
        for (int64_t k0 = 0; k0 < depth; k0 += BTX_DEPTH_BLOCK) {
            tile.depth = linear_min(depth - k0, BTX_DEPTH_BLOCK);
            tile.accumulate = accumulate || k0 > 0;
            for (int64_t n = n0; n < n1; n += BTX_PANEL) {
                const float *next = tile.b + tile.depth * BTX_PANEL;
                const char *ahead = (const char *)(next < end ? next : packed);
                tile.bias = bias != NULL && k0 == 0 ? bias + n : NULL;
                tile.columns = (int)linear_min(out_dim - n, BTX_PANEL);
                for (int64_t t = 0; t < num_tiles; t++) {
                    int64_t row = btx_tile_begin(rows, t);
                    tile.rows = (int)(btx_tile_begin(rows, t + 1) - row);
                    tile.a = a + row * a_stride + k0 * a_per_word;
                    tile.c = out + row * out_dim + n;
                    tile.ahead_step = t < BTX_PANEL_LINES ? BTX_LINE : 0;
                    tile.ahead = t < BTX_PANEL_LINES ? ahead + t * tile.depth * BTX_LINE : (const char *)tile.b;
                    btx_tile_run(tiles, &tile);
                }
                tile.b = next;
            }
        }
    }
}

static btx_status btx_cpu_linear(const btx_pass *pass, const btx_linear *weights, const float *x, int64_t rows,
                                 int accumulate, float *out, btx_error *error)
{
    const int64_t in_dim = weights->in_dim, out_dim = weights->out_dim;
    const int64_t depth = linear_depth(in_dim, weights->dtype);
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        const float *packed =
            (const float *)(const void *)((const char *)weights->packed + (size_t)layer * weights->layer_bytes);
        const float *bias = weights->bias != NULL ? weights->bias + layer * out_dim : NULL;
        for (int64_t left = rows; left > 0;) {
            int64_t block = linear_min(left, BTX_ROW_BLOCK);
            if (weights->dtype == BTX_BF16) {
                linear_round(x, block, in_dim, pass->scratch);
                linear_rows(btx_tiles_bf16, pass->scratch, depth * BTX_BF16_A, BTX_BF16_A, packed, bias, depth, block,
                            out_dim, accumulate, out);
            }
            else {
                linear_rows(btx_tiles_f32, x, in_dim, 1, packed, bias, depth, block, out_dim, accumulate, out);
            }
            x += block * in_dim;
            out += block * out_dim;
            left -= block;
        }
    }
    return BTX_OK;
}
