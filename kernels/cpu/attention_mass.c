/* attention_mass.c - attention mass of every prior position: the backbone's attention from the window, averaged
 * over window queries and query heads (arXiv 2505.16950, section 3.2, equation for alpha).
 *
 * Scores are computed again rather than kept: they would need a row per query, which is what made the paper's own
 * implementation slow. A key's sum goes through the same additions in the same order wherever the key lies, so
 * equal keys get equal mass, bit for bit, and ties are real. */
#include "scores.h"

#define MASS_BLOCKS 16 /* blocks of rows summed in f32 before they join the sum in double */

/* total[key] += sum over the lanes of partial[key], which starts again at zero. */
static void mass_flush(const score_group *group, int64_t num_keys, double *total)
{
    for (int64_t key = 0; key < num_keys; key++) {
        total[key] += (double)vf_reduce_add(vf_load(group->partial + key * BTX_VL));
        vf_store(group->partial + key * BTX_VL, vf_zero());
    }
}

/* Adds a tile's probabilities with one block of rows to partial [SCORE_TILE][VL]. reference holds -lse. */
static void mass_add_block(const score_group *group, int width, int64_t first_row, int64_t num_keys)
{
    const vf scale = vf_set1(group->plan->softmax_scale);
    const float *scores = group->scores;
    for (int64_t key = 0; key < num_keys; key++) {
        const float *shift = group->reference + first_row;
        float *partial = group->partial + key * BTX_VL;
        vf sum = vf_load(partial);
        for (int v = 0; v < width; v++, scores += BTX_VL, shift += BTX_VL)
            sum = vf_add(sum, vf_exp(vf_fma(vf_load(scores), scale, vf_load(shift))));
        vf_store(partial, sum);
    }
}

/* mass [num_prior] += the group's part, times weight when the last KV head is in. */
static void mass_of_group(score_group *group, const btx_plan_step *step, int is_first, float weight, float *mass)
{
    memset(group->partial, 0, SCORE_TILE * BTX_VL * sizeof *group->partial);
    for (int64_t done = 0; done < step->num_prior; done += SCORE_TILE, mass += SCORE_TILE) {
        int64_t num_keys = score_pack_keys(group, step->sequence_begin + done, step->window_begin);
        const float *queries = group->queries;
        double total[SCORE_TILE] = {0};
        int num_blocks = 0;
        for (int64_t vector = 0; vector < group->num_vectors;) {
            int width = score_block_width(group->num_vectors - vector);
            score_block(group, width, queries, num_keys);
            mass_add_block(group, width, vector * BTX_VL, num_keys);
            queries += group->depth * width * BTX_VL;
            vector += width;
            if (++num_blocks % MASS_BLOCKS == 0 || vector == group->num_vectors)
                mass_flush(group, num_keys, total);
        }
        for (int64_t key = 0; key < num_keys; key++)
            mass[key] = ((is_first ? 0.0f : mass[key]) + (float)total[key]) * weight;
    }
}

static btx_status btx_cpu_attention_mass(const btx_pass *pass, const float *lse, float *mass, btx_error *error)
{
    const btx_plan *plan = pass->plan;
    int64_t group_size = score_group_size(plan);
    score_group group;
    (void)error;
    score_lay_out(plan, score_max_rows(plan), btx_scratch(pass), &group);
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = 0; s < plan->num_steps; s++) {
            const btx_plan_step *step = &plan->steps[s];
            float weight = 1.0f / ((float)step->num_window * (float)plan->num_query_heads);
            for (int32_t kv_head = 0; kv_head < plan->num_kv_heads; kv_head++) {
                const float *from = lse + step->window_offset * plan->num_query_heads + kv_head * group_size;
                int is_last = kv_head == plan->num_kv_heads - 1;
                score_pack_queries(&group, pass, layer, step, kv_head);
                for (int64_t row = 0; row < group.num_vectors * BTX_VL; row++) /* lanes without a row: no mass */
                    group.reference[row] = row < group.num_rows
                                               ? -from[row / group_size * plan->num_query_heads + row % group_size]
                                               : -INFINITY;
                mass_of_group(&group, step, kv_head == 0, is_last ? weight : 1.0f, mass + step->prior_offset);
            }
        }
        lse += plan->total_window * plan->num_query_heads;
        mass += plan->total_prior;
    }
    return BTX_OK;
}
