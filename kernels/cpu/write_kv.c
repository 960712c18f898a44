/* write_kv.c - the write of a rewrite: staged values into the cache (arXiv 2505.16950, section 3.2), but for steps
 * whose edit is too large. */
#include "paging.h"

/* One position of a key or value view = values [num_kv_heads, head_dim] of its dtype. Returns what lies behind them. */
static const char *write_row(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position,
                             const char *values)
{
    const int64_t size = view->dtype == BTX_F32 ? 4 : 2, stride = view->stride[3] * size;
    char *to = (char *)view->data + btx_kv_offset(plan, view, sequence, position) * size;
    for (int32_t head = 0; head < plan->num_kv_heads; head++, to += view->stride[2] * size) {
        if (view->stride[3] == 1) {
            memcpy(to, values, (size_t)(plan->head_dim * size));
            values += plan->head_dim * size;
            continue;
        }
        for (int32_t i = 0; i < plan->head_dim; i++, values += size) {
            if (size == 4)
                memcpy(to + i * stride, values, 4);
            else
                memcpy(to + i * stride, values, 2);
        }
    }
    return values;
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
            for (int64_t i = 0; i < num_rows; i++) {
                int64_t position = *positions++;
                values = write_row(plan, &plan->keys[layer], step->sequence, position, values);
                values = write_row(plan, &plan->values[layer], step->sequence, position, values);
            }
        }
    }
    return BTX_OK;
}
