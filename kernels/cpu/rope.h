/* rope.h - rotary position embedding of key rows, half-split pairing: element i of a head turns with element
 * i + head_dim / 2 by angle position * inv_freq[i], the position counted from the sequence's first token. */
#ifndef BTX_ROPE_H
#define BTX_ROPE_H

#include <math.h>

#include "btx.h"
#include "simd.h"

/* Cosines and sines of one token position, [head_dim / 2] each. direction 1 turns as the backbone does, -1 back.
 * The angle is rounded to f32 once, as backbones do. */
static inline void btx_rope_table(const btx_plan *plan, int64_t position, float direction, float *cosines, float *sines)
{
    for (int32_t i = 0; i < plan->head_dim / 2; i++) {
        float angle = (float)position * plan->rope_inv_freq[i];
        cosines[i] = cosf(angle);
        sines[i] = direction * sinf(angle);
    }
}

/* Turns keys [num_kv_heads, head_dim] in place. */
static inline void btx_rope_turn(const btx_plan *plan, const float *cosines, const float *sines, float *keys)
{
    int64_t half = plan->head_dim / 2;
    for (int32_t head = 0; head < plan->num_kv_heads; head++, keys += plan->head_dim) {
        for (int64_t i = 0; i < half; i += BTX_VL) {
            int n = (int)(half - i < BTX_VL ? half - i : BTX_VL);
            vf c = vf_load_n(cosines + i, n), s = vf_load_n(sines + i, n);
            vf first = vf_load_n(keys + i, n), second = vf_load_n(keys + half + i, n);
            vf_store_n(keys + i, vf_sub(vf_mul(first, c), vf_mul(second, s)), n);
            vf_store_n(keys + half + i, vf_add(vf_mul(second, c), vf_mul(first, s)), n);
        }
    }
}

#endif /* BTX_ROPE_H */
