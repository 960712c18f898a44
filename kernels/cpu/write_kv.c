/* write_kv.c - the write of a rewrite: cache += edit, in f32, rounded once into the cache's dtype
 * (arXiv 2505.16950, section 3.2, the gated write).
 *
 * An element whose edit is zero, of either sign, is not written: old + 0 would turn -0 into +0 and quieten a
 * signalling NaN. */
#include "paging.h"

/* Stores lanes [0, n) of value where delta is not zero. */
#if BTX_VL == 16

static inline __mmask16 write_changed(vf delta, int n)
{
    return _mm512_mask_cmp_ps_mask(vf_first(n), delta, vf_zero(), _CMP_NEQ_UQ);
}

static inline void write_f32(float *to, vf value, vf delta, int n)
{
    _mm512_mask_storeu_ps(to, write_changed(delta, n), value);
}

static inline void write_bf16(uint16_t *to, vf value, vf delta, int n)
{
    _mm256_mask_storeu_epi16(to, write_changed(delta, n), vf_to_bf16(value));
}

static inline void write_f16(uint16_t *to, vf value, vf delta, int n)
{
    _mm256_mask_storeu_epi16(to, write_changed(delta, n), vf_to_f16(value));
}

#else

static inline void write_f32(float *to, vf value, vf delta, int n)
{
    float values[BTX_VL], deltas[BTX_VL];
    vf_store(values, value);
    vf_store(deltas, delta);
    for (int i = 0; i < n; i++)
        to[i] = deltas[i] != 0.0f ? values[i] : to[i];
}

/* There is no masked store of 16-bit lanes: the row is this layer's alone, so old bits may be stored again. */
static inline void write_halves(uint16_t *to, const uint16_t *values, vf delta, int n)
{
    float deltas[BTX_VL];
    vf_store(deltas, delta);
    for (int i = 0; i < n; i++)
        to[i] = deltas[i] != 0.0f ? values[i] : to[i];
}

static inline void write_bf16(uint16_t *to, vf value, vf delta, int n)
{
    uint16_t values[BTX_VL];
    vf_store_bf16(values, value);
    write_halves(to, values, delta, n);
}

static inline void write_f16(uint16_t *to, vf value, vf delta, int n)
{
    uint16_t values[BTX_VL];
    vf_store_f16(values, value);
    write_halves(to, values, delta, n);
}

#endif

/* Contiguous elements += delta [n]. */
static void write_run(const btx_tensor *view, int64_t offset, const float *delta, int64_t n)
{
    float *single = view->data;
    uint16_t *half = view->data;
    for (int64_t i = 0; i < n; i += BTX_VL) {
        int m = (int)(n - i < BTX_VL ? n - i : BTX_VL);
        vf edit = vf_load_n(delta + i, m);
        if (view->dtype == BTX_F32)
            write_f32(single + offset + i, vf_add(vf_load_n(single + offset + i, m), edit), edit, m);
        else if (view->dtype == BTX_BF16)
            write_bf16(half + offset + i, vf_add(vf_load_bf16_n(half + offset + i, m), edit), edit, m);
        else
            write_f16(half + offset + i, vf_add(vf_load_f16_n(half + offset + i, m), edit), edit, m);
    }
}

static void write_element(const btx_tensor *view, int64_t offset, float delta)
{
    float *single = view->data;
    uint16_t *half = view->data;
    if (delta == 0.0f)
        return;
    if (view->dtype == BTX_F32)
        single[offset] += delta;
    else if (view->dtype == BTX_BF16)
        half[offset] = btx_f32_to_bf16(btx_bf16_to_f32(half[offset]) + delta);
    else
        half[offset] = btx_f32_to_f16(btx_f16_to_f32(half[offset]) + delta);
}

/* One position of a key or value view += delta [num_kv_heads, head_dim]. */
static void write_row(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position,
                      const float *delta)
{
    int64_t offset = btx_kv_offset(plan, view, sequence, position), stride = view->stride[3];
    for (int32_t head = 0; head < plan->num_kv_heads; head++, delta += plan->head_dim) {
        int64_t start = offset + head * view->stride[2];
        if (stride == 1) {
            write_run(view, start, delta, plan->head_dim);
        }
        else {
            for (int32_t i = 0; i < plan->head_dim; i++)
                write_element(view, start + i * stride, delta[i]);
        }
    }
}

static btx_status btx_cpu_write_kv(const btx_pass *pass, const int32_t *positions, const float *delta, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    int64_t half_width = (int64_t)plan->num_kv_heads * plan->head_dim;
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = 0; s < plan->num_steps; s++) {
            const btx_plan_step *step = &plan->steps[s];
            for (int64_t i = 0; i < step->num_recalled + step->num_window; i++, delta += 2 * half_width) {
                int64_t position = *positions++;
                write_row(plan, &plan->keys[layer], step->sequence, position, delta);
                write_row(plan, &plan->values[layer], step->sequence, position, delta + half_width);
            }
        }
    }
    return BTX_OK;
}
