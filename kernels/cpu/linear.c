/* linear.c - y = x W^T + bias, the products of the Processor (arXiv 2505.16950, section 3.3), on weights packed
 * when the Processor is created.
 *
 * Packed, one layer, in words of 32 bits (one f32, or two bf16 that are neighbours in in_dim, see tile.h), in the
 * order in which they are read:
 *
 *     for each panel of BTX_PANEL columns      its words stay near for all rows
 *         [in_dim in words][BTX_PANEL]
 *
 * Columns behind out_dim and the half word behind an odd in_dim are zero. While rows pass by a panel, what lies behind
 * it in memory is prefetched: the next panel, or the next product, which processor.c places there. The weights of a
 * layer are used once in a boundary, so they come from memory, and each tile of rows fetches its share of them: all at
 * once they would take longer than the first tile, whose own loads would wait behind them. */
#include "btx.h"
#include "tile.h"

#define BTX_ROW_BLOCK                                                                                                  \
    256 /* rows that share one pass over the weights: more would not stay in the second-level cache                    \
         */

static inline int64_t linear_min(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static inline int64_t linear_depth(int64_t in_dim, btx_dtype dtype)
{
    return dtype == BTX_BF16 ? (in_dim + 1) / 2 : in_dim;
}

/* Columns of the result that a panel makes: of gated weights it holds two for each. */
static inline int64_t linear_panel_columns(int32_t gated)
{
    return gated ? BTX_PANEL / 2 : BTX_PANEL;
}

static inline int64_t linear_num_panels(int64_t out_dim, int32_t gated)
{
    int64_t columns = gated ? out_dim / 2 : out_dim, width = linear_panel_columns(gated);
    return (columns + width - 1) / width;
}

static size_t btx_cpu_packed_bytes(int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated)
{
    return (size_t)(linear_num_panels(out_dim, gated) * BTX_PANEL) * (size_t)linear_depth(in_dim, dtype) *
           sizeof(uint32_t);
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

static void btx_cpu_pack(const float *weight, int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated,
                         void *packed)
{
    const int64_t depth = linear_depth(in_dim, dtype), width = linear_panel_columns(gated);
    const int64_t columns = gated ? out_dim / 2 : out_dim;
    char *to = packed;
    for (int64_t panel = 0; panel < linear_num_panels(out_dim, gated); panel++) {
        for (int64_t k = 0; k < depth; k++) {
            for (int64_t j = 0; j < BTX_PANEL; j++, to += sizeof(uint32_t)) {
                int64_t column = panel * width + j % width, row = column + j / width * columns;
                uint32_t word = column < columns ? linear_word(weight + row * in_dim, k, in_dim, dtype) : 0;
                memcpy(to, &word, sizeof word);
            }
        }
    }
}

/* One layer: a, operand rows of a_stride words, times all panels. tile holds what all tiles share; columns lie
 * column_size bytes apart in c. */
static void linear_layer(btx_tile tile, const btx_linear *weights, const float *packed, const char *x, int64_t rows,
                         const float *bias, int64_t column_size, char *out)
{
    const btx_tile_function(*tiles)[BTX_TILE_ROWS] = weights->dtype == BTX_BF16 ? btx_tiles_bf16 : btx_tiles_f32;
    const int64_t x_stride = operand_stride(weights->in_dim, weights->dtype), num_tiles = btx_num_tiles(rows);
    const int64_t columns = weights->gated ? weights->out_dim / 2 : weights->out_dim;
    const int64_t width = linear_panel_columns(weights->gated);
    tile.a_stride = x_stride / (int64_t)sizeof(float);
    tile.depth = linear_depth(weights->in_dim, weights->dtype);
    tile.b = packed;
    tile.ahead_every = num_tiles;
    const int64_t share = (tile.depth + num_tiles - 1) / num_tiles * BTX_PANEL; /* of the next panel, for each tile */
    for (int64_t column = 0; column < columns; column += width) {
        const float *next = tile.b + tile.depth * BTX_PANEL;
        tile.bias = bias != NULL ? bias + column : NULL;
        tile.columns = (int)linear_min(columns - column, width);
        for (int64_t t = 0; t < num_tiles; t++) {
            int64_t row = btx_tile_begin(rows, t);
            tile.rows = (int)(btx_tile_begin(rows, t + 1) - row);
            tile.a = (const float *)(const void *)(x + row * x_stride);
            tile.c = out + row * tile.c_stride + column * column_size;
            tile.ahead = (const char *)(next + t * share);
            btx_tile_run(tiles, &tile);
        }
        tile.b = next;
    }
}

/* All layers of the pass, in blocks of rows. */
static void linear_pass(const btx_pass *pass, const btx_linear *weights, const void *x, btx_tile tile,
                        int64_t column_size, void *out)
{
    const int64_t rows = btx_pass_rows(pass), x_stride = operand_stride(weights->in_dim, weights->dtype);
    const char *from = x;
    char *to = out;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        const void *packed = (const char *)weights->packed + (size_t)layer * weights->layer_stride;
        const float *bias = weights->bias != NULL ? weights->bias + layer * weights->out_dim : NULL;
        for (int64_t left = rows; left > 0;) {
            int64_t block = linear_min(left, BTX_ROW_BLOCK);
            linear_layer(tile, weights, packed, from, block, bias, column_size, to);
            from += block * x_stride;
            to += block * tile.c_stride;
            left -= block;
        }
    }
}

static btx_status btx_cpu_linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate,
                                 float *out, btx_error *error)
{
    btx_tile tile = {.accumulate = accumulate, .c_stride = weights->out_dim * (int64_t)sizeof(float)};
    (void)error;
    linear_pass(pass, weights, x, tile, sizeof(float), out);
    return BTX_OK;
}

static btx_status btx_cpu_linear_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                        btx_error *error)
{
    btx_tile tile = {.gated = 1, .c_dtype = weights->dtype};
    tile.c_stride = operand_stride(weights->out_dim / 2, weights->dtype);
    (void)error;
    linear_pass(pass, weights, x, tile, weights->dtype == BTX_BF16 ? BTX_OPERAND_BF16_SIZE : 4, out);
    return BTX_OK;
}
