/* tile.h - the register-blocked product under linear.c and attention.c:
 *
 *     c = A B + bias (+ c)              or, of gated weights,
 *     c = silu(A B_gate) * (A B_up)               as an operand (operand.h)
 *
 * A tile is up to BTX_TILE_ROWS rows of A against one panel of BTX_PANEL columns of B; its sums stay in registers over
 * the whole depth:
 *
 *     a [rows][a_stride] words, row-major: each word is broadcast
 *     b [depth][BTX_PANEL] words, packed
 *
 * A word is 32 bits: one f32, or two bf16 that are neighbours in depth, the first in the low half. Products of bf16 are
 * exact in f32, so with and without AVX512-BF16 only the order of the sums differs (and that instruction takes
 * subnormals as zero). A gated panel is BTX_PANEL / 2 columns of gate, then the same of up, so that both sums of an
 * element meet in one register lane. */
#ifndef BTX_TILE_H
#define BTX_TILE_H

#include "operand.h"
#include "simd.h"

#if BTX_VL == 16
#define BTX_TILE_ROWS 10 /* 20 sums; more rows would need more addresses than there are registers for them */
#define BTX_TILE_VECTORS 2
#elif BTX_VL == 8
#define BTX_TILE_ROWS 6 /* 12 sums, 2 of B, 1 of A: 15 of 16 registers */
#define BTX_TILE_VECTORS 2
#elif BTX_VL == 4
#define BTX_TILE_ROWS 5 /* 20 sums, 4 of B, 5 of A (compilers load a column of them at once): 29 of 32 registers */
#define BTX_TILE_VECTORS 4
#else
#define BTX_TILE_ROWS 4
#define BTX_TILE_VECTORS 16
#endif
#define BTX_PANEL (BTX_TILE_VECTORS * BTX_VL)
#define BTX_LINE 64 /* bytes of a cache line */

typedef enum btx_word {
    BTX_WORD_F32,         /* a and b f32 */
    BTX_WORD_BF16_DOT,    /* a and b pairs of bf16 */
    BTX_WORD_BF16_WIDENED /* b pairs of bf16; a two f32 that are bf16 values for each word of b */
} btx_word;

#ifdef BTX_BF16_DOT
#define BTX_WORD_BF16 BTX_WORD_BF16_DOT
#else
#define BTX_WORD_BF16 BTX_WORD_BF16_WIDENED
#endif

typedef struct btx_tile {
    int rows; /* 1 ... BTX_TILE_ROWS */
    const float *a;
    int64_t a_stride;
    const float *b;
    int64_t depth;     /* words of b */
    const float *bias; /* [columns] or NULL; none when gated */
    void *c;
    int64_t c_stride; /* bytes */
    int columns;      /* 1 ... BTX_PANEL, half of that when gated; nothing behind them is touched in bias and c */
    int accumulate;   /* add what c holds; not when gated */
    int gated;
    btx_dtype c_dtype;   /* of the operand, when gated */
    const char *ahead;   /* memory to bring nearer, or NULL: BTX_PANEL words of it, */
    int64_t ahead_every; /* then, after so many words of depth, the next */
} btx_tile;

typedef void (*btx_tile_function)(const btx_tile *tile);

/* silu(gate) * up, silu(x) = x / (1 + exp(-x)). Below -87 silu(x) is taken as silu(-87), above -2e-36. */
static inline vf btx_swiglu(vf gate, vf up)
{
    gate = vf_max(vf_set1(-87.0f), gate);      /* a NaN goes through */
    vf bounded = vf_min(vf_set1(87.0f), gate); /* above, 1 + power is 1 */
    vf power = vf_exp2_normal(vf_mul(bounded, vf_set1(-1.44269504f)));
    return vf_mul(vf_div(gate, vf_add(vf_set1(1.0f), power)), up);
}

/* One row of a tile, sum [BTX_TILE_VECTORS], to its place. */
BTX_INLINE void btx_tile_finish(const btx_tile *tile, int row, const vf *sum)
{
    char *to = (char *)tile->c + row * tile->c_stride;
    if (tile->gated) {
        BTX_UNROLL
        for (int v = 0; v < BTX_TILE_VECTORS / 2; v++) {
            /* Columns behind the last are sums of zeros, so what fills an odd number of them is zero. */
            int n = tile->columns + (tile->c_dtype == BTX_BF16 ? tile->columns % 2 : 0) - v * BTX_VL;
            vf value = btx_swiglu(sum[v], sum[v + BTX_TILE_VECTORS / 2]);
            if (n > 0)
                operand_store_n(to, tile->c_dtype, v * BTX_VL, value, n < BTX_VL ? n : BTX_VL);
        }
        return;
    }
    BTX_UNROLL
    for (int v = 0; v < BTX_TILE_VECTORS; v++) {
        float *c = (float *)(void *)to + v * BTX_VL;
        int n = tile->columns - v * BTX_VL;
        vf value = sum[v];
        if (n >= BTX_VL)
            vf_store(c, tile->accumulate ? vf_add(value, vf_load(c)) : value);
        else if (n > 0)
            vf_store_n(c, tile->accumulate ? vf_add(value, vf_load_n(c, n)) : value, n);
    }
}

#if BTX_VL == 1

/* As separate sums of four rows, a form that compilers vectorise; rows that are not there repeat the first.
 * word is a constant where this is inlined. */
BTX_INLINE void btx_tile_multiply(btx_word word, const btx_tile *tile)
{
    const int rows = tile->rows;
    const float *a0 = tile->a, *a1 = rows > 1 ? a0 + tile->a_stride : a0;
    const float *a2 = rows > 2 ? a0 + 2 * tile->a_stride : a0, *a3 = rows > 3 ? a0 + 3 * tile->a_stride : a0;
    float sum[BTX_TILE_ROWS][BTX_PANEL];
    float sum0[BTX_PANEL], sum1[BTX_PANEL], sum2[BTX_PANEL], sum3[BTX_PANEL];
    for (int j = 0; j < BTX_PANEL; j++)
        sum0[j] = sum1[j] = sum2[j] = sum3[j] = tile->bias != NULL && j < tile->columns ? tile->bias[j] : 0.0f;
    for (int64_t k = 0; k < tile->depth; k++) {
        const float *b = tile->b + k * BTX_PANEL;
        if (word == BTX_WORD_F32) {
            float x0 = a0[k], x1 = a1[k], x2 = a2[k], x3 = a3[k];
            for (int j = 0; j < BTX_PANEL; j++) {
                sum0[j] += x0 * b[j];
                sum1[j] += x1 * b[j];
                sum2[j] += x2 * b[j];
                sum3[j] += x3 * b[j];
            }
        }
        else {
            const float *x0 = a0 + 2 * k, *x1 = a1 + 2 * k, *x2 = a2 + 2 * k, *x3 = a3 + 2 * k;
            for (int j = 0; j < BTX_PANEL; j++) {
                float low = vf_bf16_low(b[j]), high = vf_bf16_high(b[j]);
                sum0[j] = sum0[j] + x0[0] * low + x0[1] * high;
                sum1[j] = sum1[j] + x1[0] * low + x1[1] * high;
                sum2[j] = sum2[j] + x2[0] * low + x2[1] * high;
                sum3[j] = sum3[j] + x3[0] * low + x3[1] * high;
            }
        }
    }
    memcpy(sum[0], sum0, sizeof sum0);
    memcpy(sum[1], sum1, sizeof sum1);
    memcpy(sum[2], sum2, sizeof sum2);
    memcpy(sum[3], sum3, sizeof sum3);
    for (int i = 0; i < rows; i++)
        btx_tile_finish(tile, i, sum[i]);
}

static void btx_tile_f32(const btx_tile *tile)
{
    btx_tile_multiply(BTX_WORD_F32, tile);
}

static void btx_tile_bf16(const btx_tile *tile)
{
    btx_tile_multiply(BTX_WORD_BF16, tile);
}

/* [ahead or not][rows - 1] */
static const btx_tile_function btx_tiles_f32[2][BTX_TILE_ROWS] = {
    {btx_tile_f32, btx_tile_f32, btx_tile_f32, btx_tile_f32}, {btx_tile_f32, btx_tile_f32, btx_tile_f32, btx_tile_f32}};
static const btx_tile_function btx_tiles_bf16[2][BTX_TILE_ROWS] = {
    {btx_tile_bf16, btx_tile_bf16, btx_tile_bf16, btx_tile_bf16},
    {btx_tile_bf16, btx_tile_bf16, btx_tile_bf16, btx_tile_bf16}};

#else

/* sum + a b of one word. */
BTX_INLINE vf btx_word_fma(btx_word word, vf a, vf b, vf sum)
{
#ifdef BTX_BF16_DOT
    if (word == BTX_WORD_BF16_DOT)
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
    (void)word;
    return vf_fma(a, b, sum);
}

/* rows, word and ahead are constants where this is inlined; the loops over them unroll and sum lives in registers. */
BTX_INLINE void btx_tile_multiply(int rows, btx_word word, int ahead, const btx_tile *shared)
{
    const btx_tile own = *shared, *tile = &own; /* of which stores to c can change nothing */
    const float *a = tile->a, *b = tile->b;
    const int64_t a_stride = tile->a_stride, depth = tile->depth;
    const int parts = word == BTX_WORD_BF16_WIDENED ? 2 : 1; /* one after the other, to save registers */
    vf sum[BTX_TILE_ROWS][BTX_TILE_VECTORS];
    BTX_UNROLL
    for (int v = 0; v < BTX_TILE_VECTORS; v++) {
        int n = tile->columns - v * BTX_VL;
        n = n < 0 ? 0 : n > BTX_VL ? BTX_VL : n;
        vf start = tile->bias && n > 0 ? vf_load_n(tile->bias + v * BTX_VL, n) : vf_zero();
        BTX_UNROLL
        for (int i = 0; i < rows; i++)
            sum[i][v] = start;
    }
    const char *next = tile->ahead;
    for (int64_t k = 0, end = depth; k < depth; end = depth) {
        if (ahead) {
            BTX_UNROLL
            for (int line = 0; line < (BTX_PANEL * 4 + BTX_LINE - 1) / BTX_LINE; line++)
                vf_prefetch(next + line * BTX_LINE);
            next += BTX_PANEL * 4;
            end = depth - k < tile->ahead_every ? depth : k + tile->ahead_every;
        }
        for (; k < end; k++) {
            BTX_UNROLL
            for (int part = 0; part < parts; part++) {
                vf values[BTX_TILE_VECTORS];
                BTX_UNROLL
                for (int v = 0; v < BTX_TILE_VECTORS; v++) {
                    vf words = vf_load(b + k * BTX_PANEL + v * BTX_VL);
                    values[v] = parts == 1 ? words : part == 0 ? vf_bf16_low(words) : vf_bf16_high(words);
                }
                BTX_UNROLL
                for (int i = 0; i < rows; i++) {
                    vf value = vf_set1(a[i * a_stride + k * parts + part]);
                    BTX_UNROLL
                    for (int v = 0; v < BTX_TILE_VECTORS; v++)
                        sum[i][v] = btx_word_fma(word, value, values[v], sum[i][v]);
                }
            }
        }
    }
    BTX_UNROLL
    for (int i = 0; i < rows; i++)
        btx_tile_finish(tile, i, sum[i]);
}

#define BTX_TILE_FUNCTIONS(rows)                                                                                       \
    static void btx_tile_f32_##rows(const btx_tile *tile)                                                              \
    {                                                                                                                  \
        btx_tile_multiply(rows, BTX_WORD_F32, 0, tile);                                                                \
    }                                                                                                                  \
    static void btx_tile_f32_ahead_##rows(const btx_tile *tile)                                                        \
    {                                                                                                                  \
        btx_tile_multiply(rows, BTX_WORD_F32, 1, tile);                                                                \
    }                                                                                                                  \
    static void btx_tile_bf16_##rows(const btx_tile *tile)                                                             \
    {                                                                                                                  \
        btx_tile_multiply(rows, BTX_WORD_BF16, 0, tile);                                                               \
    }                                                                                                                  \
    static void btx_tile_bf16_ahead_##rows(const btx_tile *tile)                                                       \
    {                                                                                                                  \
        btx_tile_multiply(rows, BTX_WORD_BF16, 1, tile);                                                               \
    }

BTX_TILE_FUNCTIONS(1)
BTX_TILE_FUNCTIONS(2)
BTX_TILE_FUNCTIONS(3)
BTX_TILE_FUNCTIONS(4)
BTX_TILE_FUNCTIONS(5)
#if BTX_TILE_ROWS > 5
BTX_TILE_FUNCTIONS(6)
#endif
#if BTX_TILE_ROWS > 6
BTX_TILE_FUNCTIONS(7)
BTX_TILE_FUNCTIONS(8)
BTX_TILE_FUNCTIONS(9)
BTX_TILE_FUNCTIONS(10)
#endif
#undef BTX_TILE_FUNCTIONS

#if BTX_TILE_ROWS == 10
#define BTX_TILE_TABLE(name) {name##1, name##2, name##3, name##4, name##5, name##6, name##7, name##8, name##9, name##10}
#elif BTX_TILE_ROWS == 6
#define BTX_TILE_TABLE(name) {name##1, name##2, name##3, name##4, name##5, name##6}
#else
#define BTX_TILE_TABLE(name) {name##1, name##2, name##3, name##4, name##5}
#endif

/* [ahead or not][rows - 1] */
static const btx_tile_function btx_tiles_f32[2][BTX_TILE_ROWS] = {BTX_TILE_TABLE(btx_tile_f32_),
                                                                  BTX_TILE_TABLE(btx_tile_f32_ahead_)};
static const btx_tile_function btx_tiles_bf16[2][BTX_TILE_ROWS] = {BTX_TILE_TABLE(btx_tile_bf16_),
                                                                   BTX_TILE_TABLE(btx_tile_bf16_ahead_)};
#undef BTX_TILE_TABLE

#endif

/* rows in tiles of nearly one height: a lone last row would cost as much as several. */
static inline int64_t btx_num_tiles(int64_t rows)
{
    return (rows + BTX_TILE_ROWS - 1) / BTX_TILE_ROWS;
}
static inline int64_t btx_tile_begin(int64_t rows, int64_t tile)
{
    return rows * tile / btx_num_tiles(rows);
}

static inline void btx_tile_run(const btx_tile_function tiles[2][BTX_TILE_ROWS], const btx_tile *tile)
{
    tiles[tile->ahead != NULL][tile->rows - 1](tile);
}

#endif /* BTX_TILE_H */
