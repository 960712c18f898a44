/* gather_kv.c - selected cache rows as KV-tokens x = [keys of all KV heads | values of all KV heads], f32, and normed
 * as the left side of a product (arXiv 2505.16950, section 3.2). */
#include "paging.h"
#include "rope.h"

/* to [num_kv_heads, head_dim] = one position of a key or value view. */
static void gather_row(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position, float *to)
{
    int64_t offset = btx_kv_offset(plan, view, sequence, position);
    for (int32_t head = 0; head < plan->num_kv_heads; head++)
        btx_load_elements(view, offset + head * view->stride[2], view->stride[3], plan->head_dim,
                          to + (int64_t)head * plan->head_dim);
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
            for (int64_t i = 0; i < step->num_recalled + step->num_window; i++, rows += 2 * half_width) {
                int64_t position = *positions++;
                gather_row(plan, &plan->keys[layer], step->sequence, position, rows);
                gather_row(plan, &plan->values[layer], step->sequence, position, rows + half_width);
                if (plan->rope_inv_freq != NULL) {
                    btx_rope_table(plan, position - step->sequence_begin, -1.0f, cosines, sines);
                    btx_rope_turn(plan, cosines, sines, rows);
                }
                norm_row(rows, 2 * half_width, weight + layer * 2 * half_width, eps, dtype, normed);
                normed = (char *)normed + stride;
            }
        }
    }
    return BTX_OK;
}
