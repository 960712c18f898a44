/* stage_kv.c - what a rewrite will write: cache + gated edit, in f32, rounded once into the cache's dtype
 * (arXiv 2505.16950, section 3.2, the gated write). The key half of an edit is first turned to the cache's positions
 * when keys were unrotated.
 *
 * Where the edit is zero, of either sign, the cache's own value is staged: old + 0 would turn -0 into +0. (A NaN there
 * makes the whole row's edit NaN, which is refused.) */
#include <math.h>

#include "paging.h"
#include "rope.h"

/* Sum of squares in double, as running sums so that additions overlap. */
static double stage_sum_squares(const float *x, int64_t n)
{
    double total = 0.0;
    int64_t i = 0;
#if BTX_VL == 16
    __m512d sum[4] = {_mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd(), _mm512_setzero_pd()};
    for (; i + 32 <= n; i += 32) {
        BTX_UNROLL
        for (int k = 0; k < 4; k++) {
            __m512d wide = _mm512_cvtps_pd(_mm256_loadu_ps(x + i + 8 * k));
            sum[k] = _mm512_fmadd_pd(wide, wide, sum[k]);
        }
    }
    total = _mm512_reduce_add_pd(_mm512_add_pd(_mm512_add_pd(sum[0], sum[1]), _mm512_add_pd(sum[2], sum[3])));
#else
    double sum[8] = {0};
    for (; i + 8 <= n; i += 8) {
        for (int lane = 0; lane < 8; lane++)
            sum[lane] += (double)x[i + lane] * (double)x[i + lane];
    }
    total = ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
#endif
    for (; i < n; i++)
        total += (double)x[i] * (double)x[i];
    return total;
}

/* Widening is exact: what is not edited gets its own bits back. */
static inline vf stage_value(vf before, vf edit, vf *peak)
{
    vf value = vf_select_nonzero(edit, vf_add(before, edit), before);
    *peak = vf_max(*peak, vf_max(value, vf_sub(vf_zero(), value)));
    return value;
}

/* Elements [i, i + n) of to. */
static inline void stage_store(btx_dtype dtype, char *to, int64_t i, vf value, int n)
{
    float *single = (float *)(void *)to + i;
    uint16_t *half = (uint16_t *)(void *)to + i;
    if (dtype == BTX_F32)
        n == BTX_VL ? vf_store(single, value) : vf_store_n(single, value, n);
    else if (dtype == BTX_BF16)
        n == BTX_VL ? vf_store_bf16(half, value) : vf_store_bf16_n(half, value, n);
    else
        n == BTX_VL ? vf_store_f16(half, value) : vf_store_f16_n(half, value, n);
}

/* to [num_kv_heads, head_dim], of the view's dtype = cache + gate * delta of one position, rows holding the cache's
 * values where they are at hand (else NULL). Returns the largest magnitude before rounding. old is scratch [head_dim].
 */
static float stage_row(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position,
                       const float *rows, const float *delta, float gate, float *old, char *to)
{
    int64_t offset = btx_kv_offset(plan, view, sequence, position), dim = plan->head_dim;
    int64_t size = view->dtype == BTX_F32 ? 4 : 2;
    const vf opening = vf_set1(gate);
    vf peak = vf_zero();
    for (int32_t head = 0; head < plan->num_kv_heads; head++, delta += dim, to += dim * size) {
        const float *from = old;
        if (rows != NULL)
            from = rows + head * dim;
        else
            btx_load_elements(view, offset + head * view->stride[2], view->stride[3], dim, old);
        int64_t i = 0;
        for (; i + BTX_VL <= dim; i += BTX_VL)
            stage_store(view->dtype, to, i, stage_value(vf_load(from + i), vf_mul(vf_load(delta + i), opening), &peak),
                        BTX_VL);
        int n = (int)(dim - i);
        stage_store(view->dtype, to, i,
                    stage_value(vf_load_n(from + i, n), vf_mul(vf_load_n(delta + i, n), opening), &peak), n);
    }
    return vf_reduce_max(peak);
}

static btx_status btx_cpu_stage_kv(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                                   float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    const btx_dtype dtype = plan->keys[0].dtype;
    const int64_t half = (int64_t)plan->num_kv_heads * plan->head_dim, half_bytes = half * (dtype == BTX_F32 ? 4 : 2);
    /* From here on rounding to nearest gives infinity. */
    const float limit = dtype == BTX_F16 ? 65520.0f : dtype == BTX_BF16 ? 0x1.ffp127f : INFINITY;
    const int unrotated = plan->rope_inv_freq != NULL;
    float *old = (float *)btx_scratch(pass), *cosines = old, *sines = cosines + plan->head_dim / 2;
    char *to = staged;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const btx_plan_step *step = &plan->steps[s];
            int64_t num_rows = step->num_recalled + step->num_window;
            float peak = 0.0f;
            *delta_norm = gate[layer] * (float)sqrt(stage_sum_squares(delta, num_rows * 2 * half));
            *row_norm++ = (float)sqrt(stage_sum_squares(rows, num_rows * 2 * half));
            for (int64_t i = 0; i < num_rows; i++, rows += 2 * half, delta += 2 * half, to += 2 * half_bytes) {
                int64_t position = *positions++;
                if (unrotated) {
                    btx_rope_table(plan, position - step->sequence_begin, 1.0f, cosines, sines);
                    btx_rope_turn(plan, cosines, sines, delta);
                }
                /* Rows hold unrotated keys, if so: the cache's own are read again. */
                float key_peak = stage_row(plan, &plan->keys[layer], step->sequence, position, unrotated ? NULL : rows,
                                           delta, gate[layer], old, to);
                float value_peak = stage_row(plan, &plan->values[layer], step->sequence, position, rows + half,
                                             delta + half, gate[layer], old, to + half_bytes);
                peak = key_peak > peak ? key_peak : peak;
                peak = value_peak > peak ? value_peak : peak;
            }
            if (!(peak < limit))
                *delta_norm = INFINITY;
            delta_norm++;
        }
    }
    return BTX_OK;
}
