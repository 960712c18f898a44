/* attention_lse.c - natural log-sum-exp of every window query's causal scores, over all keys of its sequence
 * (arXiv 2505.16950, section 3.2: the denominator of the backbone's softmax).
 *
 * Online over tiles of keys, against a reference per row. The reference only moves when a score exceeds it by
 * LSE_HEADROOM: each move shrinks what was summed before by e^-16 or more, so roundings of moves do not add up.
 * Within a tile exponentials are summed in f32, in fours; tiles are summed in double, so a sum over 128k keys is as
 * good as one over 64. */
#include <float.h>

#include "scores.h"

#define LSE_HEADROOM 16.0f /* 2^31 keys times e^16 stays far below FLT_MAX */

/* Scores that a row must not see become -infinity: keys behind the tile's last, and keys behind the row's query.
 * first_row is the block's first row, first_key the tile's first key counted from the window's begin. */
static void lse_mask(const score_group *group, int64_t lanes, int64_t first_row, int64_t first_key, int64_t num_keys)
{
    int64_t group_size = score_group_size(group->plan);
    int64_t end = (num_keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
    for (int64_t key = first_key < 0 ? -first_key : 0; key < end; key++) {
        int64_t hidden = key < num_keys ? (first_key + key) * group_size - first_row : lanes;
        hidden = hidden < lanes ? hidden : lanes;
        for (int64_t lane = 0; lane < hidden; lane++)
            group->scores[key * lanes + lane] = -INFINITY;
    }
}

/* Adds the scores of one tile to the running sums of one block's rows. */
static void lse_add_tile(const score_group *group, int width, int64_t first_row, int64_t num_keys)
{
    const vf scale = vf_set1(group->plan->softmax_scale);
    const float *scores = group->scores;
    float *reference = group->reference + first_row;
    double *sum = group->sum + first_row;
    int64_t lanes = width * BTX_VL;
    float found[SCORE_BLOCK * BTX_VL] = {0};

    for (int v = 0; v < width; v++) {
        const float *score = scores + v * BTX_VL;
        vf even = vf_load(score), odd = vf_load(score + lanes);
        for (int64_t key = 2; key < num_keys; key += 2) {
            even = vf_max(even, vf_load(score + key * lanes));
            odd = vf_max(odd, vf_load(score + (key + 1) * lanes));
        }
        vf_store(found + v * BTX_VL, vf_mul(vf_max(even, odd), scale));
    }
    for (int64_t lane = 0; lane < lanes; lane++) {
        if (found[lane] > reference[lane] + LSE_HEADROOM) {
            sum[lane] *= exp((double)reference[lane] - (double)found[lane]);
            reference[lane] = found[lane];
        }
    }
    for (int v = 0; v < width; v++) {
        const float *score = scores + v * BTX_VL;
        const vf shift = vf_sub(vf_zero(), vf_load(reference + v * BTX_VL));
        vf total = vf_zero();
        for (int64_t key = 0; key < num_keys; key += 4, score += 4 * lanes) {
            vf a = vf_exp(vf_fma(vf_load(score), scale, shift));
            vf b = vf_exp(vf_fma(vf_load(score + lanes), scale, shift));
            vf c = vf_exp(vf_fma(vf_load(score + 2 * lanes), scale, shift));
            vf d = vf_exp(vf_fma(vf_load(score + 3 * lanes), scale, shift));
            total = vf_add(total, vf_add(vf_add(a, b), vf_add(c, d)));
        }
        vf_store(found + v * BTX_VL, total);
    }
    for (int64_t lane = 0; lane < lanes; lane++)
        sum[lane] += (double)found[lane];
}

static void lse_of_group(score_group *group, const btx_plan_step *step)
{
    for (int64_t lane = 0; lane < group->num_vectors * BTX_VL; lane++) {
        group->reference[lane] = -FLT_MAX; /* not -infinity, from which it could not be subtracted */
        group->sum[lane] = 0.0;
    }
    for (int64_t begin = step->sequence_begin; begin < step->step_end; begin += SCORE_TILE) {
        int64_t num_keys = score_pack_keys(group, begin, step->step_end);
        int64_t padded = (num_keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
        const float *queries = group->queries;
        for (int64_t vector = 0; vector < group->num_vectors;) {
            int width = score_block_width(group->num_vectors - vector);
            int64_t first_row = vector * BTX_VL;
            score_block(group, width, queries, num_keys);
            lse_mask(group, width * BTX_VL, first_row, begin - step->window_begin, num_keys);
            lse_add_tile(group, width, first_row, padded);
            queries += group->depth * width * BTX_VL;
            vector += width;
        }
    }
}

static btx_status btx_cpu_attention_lse(const btx_pass *pass, float *lse, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    int64_t group_size = score_group_size(plan);
    score_group group;
    score_lay_out(plan, score_max_rows(plan), btx_scratch(pass), &group);
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = 0; s < plan->num_steps; s++) {
            const btx_plan_step *step = &plan->steps[s];
            for (int32_t kv_head = 0; kv_head < plan->num_kv_heads; kv_head++) {
                float *to = lse + step->window_offset * plan->num_query_heads + kv_head * group_size;
                score_pack_queries(&group, pass, layer, step, kv_head);
                lse_of_group(&group, step);
                for (int64_t row = 0; row < group.num_rows; row++) {
                    float value = (float)((double)group.reference[row] + log(group.sum[row]));
                    if (!isfinite(value))
                        return btx_fail(error, BTX_INVALID_ARGUMENT,
                                        "the attention of sequence %lld in layer %d is not finite: its queries or keys "
                                        "hold NaN or infinity, or were never captured; nothing was written",
                                        (long long)step->sequence, (int)layer);
                    to[row / group_size * plan->num_query_heads + row % group_size] = value;
                }
            }
        }
        lse += plan->total_window * plan->num_query_heads;
    }
    return BTX_OK;
}
