/* gate_delta.c - the Processor's output becomes the edit of the cache: times the layer's gate, its key half turned
 * to the cache's positions when keys were unrotated (arXiv 2505.16950, section 3.2, the gated write). */
#include <math.h>

#include "paging.h"
#include "rope.h"

/* Sum of squares in double, as eight running sums so that it vectorises. */
static double gate_sum_squares(const float *x, int64_t n)
{
    double sum[8] = {0};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        for (int lane = 0; lane < 8; lane++)
            sum[lane] += (double)x[i + lane] * (double)x[i + lane];
    }
    for (; i < n; i++)
        sum[0] += (double)x[i] * (double)x[i];
    return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

static void gate_scale(float *delta, int64_t n, float gate)
{
    int64_t i = 0;
    for (; i + BTX_VL <= n; i += BTX_VL)
        vf_store(delta + i, vf_mul(vf_load(delta + i), vf_set1(gate)));
    vf_store_n(delta + i, vf_mul(vf_load_n(delta + i, (int)(n - i)), vf_set1(gate)), (int)(n - i));
}

/* Would old + delta [num_kv_heads, head_dim] be finite once rounded into the cache's dtype? old is scratch. */
static int gate_fits(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position,
                     const float *delta, float *old)
{
    /* From here on rounding to nearest gives infinity. */
    const float limit = view->dtype == BTX_F16 ? 65520.0f : view->dtype == BTX_BF16 ? 0x1.ffp127f : INFINITY;
    int64_t offset = btx_kv_offset(plan, view, sequence, position);
    vf peak = vf_zero();
    for (int32_t head = 0; head < plan->num_kv_heads; head++, delta += plan->head_dim) {
        btx_load_elements(view, offset + head * view->stride[2], view->stride[3], plan->head_dim, old);
        for (int64_t i = 0; i < plan->head_dim; i += BTX_VL) {
            int n = (int)(plan->head_dim - i < BTX_VL ? plan->head_dim - i : BTX_VL);
            vf sum = vf_add(vf_load_n(old + i, n), vf_load_n(delta + i, n));
            peak = vf_max(peak, vf_max(sum, vf_sub(vf_zero(), sum)));
        }
    }
    return vf_reduce_max(peak) < limit;
}

static btx_status btx_cpu_gate_delta(const btx_pass *pass, const int32_t *positions, const float *rows,
                                     const float *gate, float *delta, float *delta_norm, float *row_norm,
                                     btx_error *error)
{
    const btx_plan *plan = pass->plan;
    int64_t width = 2 * (int64_t)plan->num_kv_heads * plan->head_dim;
    float *scratch = (float *)btx_scratch(pass); /* [head_dim] */
    float *cosines = scratch, *sines = cosines + plan->head_dim / 2;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = 0; s < plan->num_steps; s++) {
            const btx_plan_step *step = &plan->steps[s];
            int64_t num_rows = step->num_recalled + step->num_window;
            gate_scale(delta, num_rows * width, gate[layer]);
            *delta_norm = (float)sqrt(gate_sum_squares(delta, num_rows * width));
            *row_norm++ = (float)sqrt(gate_sum_squares(rows, num_rows * width));
            for (int64_t i = 0; i < num_rows && plan->rope_inv_freq != NULL; i++) {
                btx_rope_table(plan, positions[i] - step->sequence_begin, 1.0f, cosines, sines);
                btx_rope_turn(plan, cosines, sines, delta + i * width);
            }
            int fits = 1;
            for (int64_t i = 0; i < num_rows; i++) {
                const float *edit = delta + i * width;
                fits &= gate_fits(plan, &plan->keys[layer], step->sequence, positions[i], edit, scratch);
                fits &= gate_fits(plan, &plan->values[layer], step->sequence, positions[i], edit + width / 2, scratch);
            }
            if (!fits)
                *delta_norm = INFINITY;
            delta_norm++;
            positions += num_rows;
            delta += num_rows * width;
            rows += num_rows * width;
        }
    }
    return BTX_OK;
}
