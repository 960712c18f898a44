/* write_kv.c - the write of a rewrite: staged values into the cache (arXiv 2505.16950, section 3.2), but for steps
 * whose edit is too large. */
#include "paging.h"

#define WRITE_ROWS 64 /* at a time */

/* Positions of a key or value view = rows [num_rows] of [num_kv_heads, head_dim] of its dtype, row_bytes apart. Where
 * the elements of a head lie apart, those of one column are written together: they share cache lines. */
static void write_rows(const btx_plan *plan, const btx_tensor *view, int64_t sequence, const int32_t *positions,
                       int64_t num_rows, int64_t row_bytes, const char *rows)
{
    const int64_t size = view->dtype == BTX_F32 ? 4 : 2, dim = plan->head_dim;
    char *to[WRITE_ROWS];
    for (int64_t row = 0; row < num_rows; row++)
        to[row] = (char *)view->data + btx_kv_offset(plan, view, sequence, positions[row]) * size;
    for (int32_t head = 0; view->stride[3] == 1 && head < plan->num_kv_heads; head++) {
        for (int64_t row = 0; row < num_rows; row++)
            memcpy(to[row] + head * view->stride[2] * size, rows + row * row_bytes + head * dim * size,
                   (size_t)(dim * size));
    }
    for (int32_t head = 0; view->stride[3] != 1 && head < plan->num_kv_heads; head++) {
        for (int64_t i = 0; i < dim; i++) {
            const int64_t shift = (head * view->stride[2] + i * view->stride[3]) * size;
            const char *from = rows + (head * dim + i) * size;
            if (size == 4) {
                for (int64_t row = 0; row < num_rows; row++)
                    memcpy(to[row] + shift, from + row * row_bytes, 4);
            }
            else {
                for (int64_t row = 0; row < num_rows; row++)
                    memcpy(to[row] + shift, from + row * row_bytes, 2);
            }
        }
    }
}

static btx_status btx_cpu_write_kv(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    const int64_t row_bytes =
        2 * (int64_t)plan->num_kv_heads * plan->head_dim * (plan->keys[0].dtype == BTX_F32 ? 4 : 2);
    const char *values = staged;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const btx_plan_step *step = &plan->steps[s];
            const int64_t num_rows = step->num_recalled + step->num_window;
            if (plan->skipped != NULL && plan->skipped[s]) {
                positions += num_rows;
                values += num_rows * row_bytes;
                continue;
            }
            for (int64_t left = num_rows, n; left > 0; left -= n, positions += n, values += n * row_bytes) {
                n = left < WRITE_ROWS ? left : WRITE_ROWS;
                write_rows(plan, &plan->keys[layer], step->sequence, positions, n, row_bytes, values);
                write_rows(plan, &plan->values[layer], step->sequence, positions, n, row_bytes, values + row_bytes / 2);
            }
        }
    }
    return BTX_OK;
}
