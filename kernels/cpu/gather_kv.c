/* gather_kv.c - selected cache rows as KV-tokens x = [keys of all KV heads | values of all KV heads], f32, and normed
 * as the left side of a product (arXiv 2505.16950, section 3.2). */
#include "paging.h"
#include "rope.h"

#define GATHER_ROWS 64    /* at a time */
#define GATHER_COLUMNS 16 /* at a time, where the elements of a head lie apart: a cache line of f32 */

/* Column i of rows [num_rows, stride] = elements of one dtype at offsets [num_rows] + shift. */
static inline void gather_column(const btx_tensor *view, const int64_t *offsets, int64_t shift, int64_t num_rows,
                                 int64_t stride, float *to)
{
    const float *single = (const float *)view->data + shift;
    const uint16_t *half = (const uint16_t *)view->data + shift;
    if (view->dtype == BTX_F32) {
        for (int64_t row = 0; row < num_rows; row++)
            to[row * stride] = single[offsets[row]];
    }
    else if (view->dtype == BTX_BF16) {
        for (int64_t row = 0; row < num_rows; row++)
            to[row * stride] = btx_bf16_to_f32(half[offsets[row]]);
    }
    else {
        for (int64_t row = 0; row < num_rows; row++)
            to[row * stride] = btx_f16_to_f32(half[offsets[row]]);
    }
}

/* to [num_rows, stride], of which [num_columns] are written = elements at offsets [num_rows] + shift, stride[3] of the
 * view apart. Those of one column are read together, as they share cache lines, and go through a tile: the rows of `to`
 * lie a multiple of 4096 bytes apart in many models, so that few of their lines fit into the first-level cache. */
static void gather_columns(const btx_tensor *view, const int64_t *offsets, int64_t shift, int64_t num_columns,
                           int64_t num_rows, int64_t stride, float *to)
{
    float tile[GATHER_ROWS * GATHER_COLUMNS];
    for (int64_t i = 0; i < num_columns; i++)
        gather_column(view, offsets, shift + i * view->stride[3], num_rows, GATHER_COLUMNS, tile + i);
    for (int64_t row = 0; row < num_rows; row++)
        memcpy(to + row * stride, tile + row * GATHER_COLUMNS, (size_t)num_columns * sizeof *to);
}

/* to [num_rows, stride], of which [num_kv_heads, head_dim] are written = positions of a key or value view. */
static void gather_rows(const btx_plan *plan, const btx_tensor *view, int64_t sequence, const int32_t *positions,
                        int64_t num_rows, int64_t stride, float *to)
{
    const int64_t dim = plan->head_dim;
    int64_t offsets[GATHER_ROWS];
    for (int64_t row = 0; row < num_rows; row++)
        offsets[row] = btx_kv_offset(plan, view, sequence, positions[row]);
    for (int64_t row = 0; view->stride[3] == 1 && row < num_rows; row++) {
        for (int32_t head = 0; head < plan->num_kv_heads; head++)
            btx_load_elements(view, offsets[row] + head * view->stride[2], 1, dim, to + row * stride + head * dim);
    }
    for (int32_t head = 0; view->stride[3] != 1 && head < plan->num_kv_heads; head++) {
        for (int64_t i = 0; i < dim; i += GATHER_COLUMNS)
            gather_columns(view, offsets, head * view->stride[2] + i * view->stride[3],
                           dim - i < GATHER_COLUMNS ? dim - i : GATHER_COLUMNS, num_rows, stride, to + head * dim + i);
    }
}

static btx_status btx_cpu_gather_kv(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight,
                                    float eps, btx_dtype dtype, void *normed, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    const int64_t half_width = (int64_t)plan->num_kv_heads * plan->head_dim;
    const int64_t stride = operand_stride(2 * half_width, dtype);
    float *cosines = (float *)btx_scratch(pass), *sines = cosines + plan->head_dim / 2;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const btx_plan_step *step = &plan->steps[s];
            const int64_t num_rows = step->num_recalled + step->num_window;
            for (int64_t done = 0, n; done < num_rows; done += n, positions += n) {
                n = num_rows - done < GATHER_ROWS ? num_rows - done : GATHER_ROWS;
                gather_rows(plan, &plan->keys[layer], step->sequence, positions, n, 2 * half_width, rows);
                gather_rows(plan, &plan->values[layer], step->sequence, positions, n, 2 * half_width,
                            rows + half_width);
                for (int64_t row = 0; row < n; row++, rows += 2 * half_width) {
                    if (plan->rope_inv_freq != NULL) {
                        btx_rope_table(plan, positions[row] - step->sequence_begin, -1.0f, cosines, sines);
                        btx_rope_turn(plan, cosines, sines, rows);
                    }
                    norm_row(rows, 2 * half_width, weight + layer * 2 * half_width, eps, dtype, normed);
                    normed = (char *)normed + stride;
                }
            }
        }
    }
    return BTX_OK;
}
