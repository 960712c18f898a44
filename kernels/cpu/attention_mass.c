/* attention_mass.c - attention mass of every prior position: the backbone's attention from the window, averaged
 * over window queries and query heads (arXiv 2505.16950, section 3.2, equation for alpha), exact.
 *
 * For one KV head and one block of rows (scores.h) at a time, in two sweeps over the prior keys:
 *
 *     1.  scores, and p = 2^(score - reference of the row), kept; their sum, to which the window's own keys are added,
 *         is the denominator of the row's softmax
 *     2.  mass of a key += sum over the rows of p / denominator
 *
 * So every score and every exponential is computed once; what is kept is a float per key and row of the block, which
 * for some thousand keys stays in the second-level cache. No row's attention over the whole context ever exists.
 *
 * A row's reference is a whole number (in powers of two, as all here) near its largest score so far, and only moves
 * when a score exceeds it by MASS_HEADROOM. Being whole, it changes exponents only: a key's terms have the same bits
 * wherever the key lies, so equal keys get equal mass and ties are real. The reference in force is kept with each tile.
 * Within a tile exponentials are summed in f32, in fours; tiles are summed in double, so a sum over 128k keys is as
 * good as one over 64. */
#include <float.h>

#include "scores.h"

#define MASS_HEADROOM 24.0f /* 2^31 keys times 2^24 stays far below FLT_MAX */

/* One block of rows. */
typedef struct mass_block {
    int width;         /* vectors */
    int64_t first_row; /* of the group's rows */
    const float *queries;
    float scale;                           /* softmax_scale * log2(e) */
    float hidden;                          /* the score of a key that a row must not see: times scale, the lowest */
    float reference[SCORE_BLOCK * BTX_VL]; /* the one in force */
    double sum[SCORE_BLOCK * BTX_VL];      /* of 2^(score - reference) so far */
} mass_block;

/* Hides keys behind the tile's last, and in the window those behind the row's query; finds the largest again.
 * first_key is the tile's first key counted from the window's begin. */
static void mass_mask(const score_group *group, const mass_block *block, int64_t first_key, int64_t num_keys,
                      vf *largest)
{
    int64_t group_size = score_group_size(group->plan), lanes = block->width * BTX_VL;
    int64_t end = (num_keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
    for (int v = 0; v < block->width; v++)
        largest[v] = vf_set1(block->hidden);
    for (int64_t key = 0; key < end; key++) {
        float *scores = group->scores + key * lanes;
        int64_t hidden = key < num_keys ? (first_key + key) * group_size - block->first_row : lanes;
        hidden = hidden < lanes ? hidden : lanes;
        for (int64_t lane = 0; lane < hidden; lane++)
            scores[lane] = block->hidden;
        for (int v = 0; v < block->width; v++)
            largest[v] = vf_max(largest[v], vf_load(scores + v * BTX_VL));
    }
}

/* Moves the references of rows whose largest score has outgrown them. */
static void mass_move(mass_block *block, const vf *largest)
{
    for (int v = 0; v < block->width; v++) {
        float found[BTX_VL], *reference = block->reference + v * BTX_VL;
        vf excess = vf_sub(vf_mul(largest[v], vf_set1(block->scale)), vf_load(reference));
        if (!(vf_reduce_max(excess) > MASS_HEADROOM))
            continue;
        vf_store(found, vf_mul(largest[v], vf_set1(block->scale)));
        for (int lane = 0; lane < BTX_VL; lane++) {
            double *sum = &block->sum[v * BTX_VL + lane];
            if (!(found[lane] > reference[lane] + MASS_HEADROOM))
                continue;
            float moved = rintf(found[lane]);
            *sum = *sum > 0.0 ? *sum * exp2((double)reference[lane] - (double)moved) : *sum;
            reference[lane] = moved;
        }
    }
}

/* Adds one tile's scores to the sums; kept [keys, whole SCORE_KEYS][width * VL], or NULL, gets their exponentials.
 * width is a constant where this is inlined. */
BTX_INLINE void mass_add_tile_of(int width, const score_group *group, mass_block *block, int64_t num_keys, float *kept)
{
    const vf scale = vf_set1(block->scale);
    const float *scores = group->scores;
    float *to = kept != NULL ? kept : group->scores;
    float total[SCORE_BLOCK * BTX_VL];
    vf sum[SCORE_BLOCK], reference[SCORE_BLOCK];
    BTX_UNROLL
    for (int v = 0; v < width; v++) {
        sum[v] = vf_zero();
        reference[v] = vf_load(block->reference + v * BTX_VL);
    }
    for (int64_t key = 0; key < num_keys; key += 4) {
        BTX_UNROLL
        for (int v = 0; v < width; v++) {
            vf p[4];
            BTX_UNROLL
            for (int i = 0; i < 4; i++) {
                p[i] = vf_exp2_from(vf_mul(vf_load(scores + (i * width + v) * BTX_VL), scale), reference[v]);
                vf_store(to + (i * width + v) * BTX_VL, p[i]);
            }
            sum[v] = vf_add(sum[v], vf_add(vf_add(p[0], p[1]), vf_add(p[2], p[3])));
        }
        scores += 4 * width * BTX_VL;
        to += 4 * width * BTX_VL;
    }
    BTX_UNROLL
    for (int v = 0; v < width; v++)
        vf_store(total + v * BTX_VL, sum[v]);
    for (int lane = 0; lane < width * BTX_VL; lane++)
        block->sum[lane] += (double)total[lane];
}

static void mass_add_tile(const score_group *group, mass_block *block, int64_t num_keys, float *kept)
{
    if (block->width == SCORE_BLOCK)
        mass_add_tile_of(SCORE_BLOCK, group, block, num_keys, kept);
    else if (block->width == 2)
        mass_add_tile_of(2, group, block, num_keys, kept);
    else
        mass_add_tile_of(1, group, block, num_keys, kept);
}

/* The first sweep: keys [begin, end), whose probabilities are kept if they are prior ones. Of the window's, those
 * behind the block's last query are left out. *tile counts the tiles that the block has taken. */
static void mass_sweep(score_group *group, mass_block *block, const btx_plan_step *step, int64_t begin, int64_t end,
                       int64_t *tile)
{
    const int64_t lanes = block->width * BTX_VL;
    const int is_prior = end == step->window_begin;
    int64_t row_end = block->first_row + lanes < group->num_rows ? block->first_row + lanes : group->num_rows;
    int64_t seen_end = is_prior ? end : begin + (row_end - 1) / score_group_size(group->plan) + 1;
    float *kept = is_prior ? group->probabilities : NULL, *reference = group->references;
    for (; begin < seen_end; begin += SCORE_TILE, reference += lanes) {
        int64_t num_keys = score_take_keys(group, (*tile)++, begin, end);
        num_keys = seen_end - begin < num_keys ? seen_end - begin : num_keys;
        int64_t padded = (num_keys + SCORE_KEYS - 1) / SCORE_KEYS * SCORE_KEYS;
        vf largest[SCORE_BLOCK];
        score_block(group, block->width, block->queries, num_keys, largest);
        if (!is_prior || num_keys < padded)
            mass_mask(group, block, begin - step->window_begin, num_keys, largest);
        mass_move(block, largest);
        mass_add_tile(group, block, padded, kept);
        if (is_prior) {
            memcpy(reference, block->reference, (size_t)lanes * sizeof *reference);
            kept += SCORE_TILE * lanes;
        }
    }
}

/* The second sweep: mass [num_prior] += what the rows of the block give each key. weight [width * VL] is what a row's
 * terms, relative to its last reference, are worth. */
BTX_INLINE void mass_collect_of(int width, const score_group *group, const mass_block *block, const float *weight,
                                int64_t num_prior, float *mass)
{
    const float *p = group->probabilities, *reference = group->references;
    for (int64_t done = 0; done < num_prior; done += SCORE_TILE, reference += width * BTX_VL) {
        int64_t num_keys = num_prior - done < SCORE_TILE ? num_prior - done : SCORE_TILE;
        vf w[SCORE_BLOCK];
        BTX_UNROLL
        for (int v = 0; v < width; v++) {
            vf moved = vf_sub(vf_load(reference + v * BTX_VL), vf_load(block->reference + v * BTX_VL));
            w[v] = vf_scale2(vf_load(weight + v * BTX_VL), vf_max(moved, vf_set1(-160.0f)));
        }
        for (int64_t key = 0; key < num_keys; key += BTX_VL) {
            vf of_key[BTX_VL];
            BTX_UNROLL
            for (int i = 0; i < BTX_VL; i++, p += width * BTX_VL) {
                of_key[i] = vf_mul(vf_load(p), w[0]);
                BTX_UNROLL
                for (int v = 1; v < width; v++)
                    of_key[i] = vf_fma(vf_load(p + v * BTX_VL), w[v], of_key[i]);
            }
            vf sum = vf_reduce_add_each(of_key);
            int n = (int)(num_keys - key < BTX_VL ? num_keys - key : BTX_VL);
            vf_store_n(mass + done + key, vf_add(vf_load_n(mass + done + key, n), sum), n);
        }
    }
}

static void mass_collect(const score_group *group, const mass_block *block, const float *weight, int64_t num_prior,
                         float *mass)
{
    if (block->width == SCORE_BLOCK)
        mass_collect_of(SCORE_BLOCK, group, block, weight, num_prior, mass);
    else if (block->width == 2)
        mass_collect_of(2, group, block, weight, num_prior, mass);
    else
        mass_collect_of(1, group, block, weight, num_prior, mass);
}

/* mass [num_prior] += the mass of one KV head. 0 where a softmax is not finite. */
static int mass_of_head(score_group *group, const btx_plan_step *step, float *mass)
{
    const double rows = (double)step->num_window * (double)group->plan->num_query_heads;
    mass_block block = {.queries = group->queries};
    block.scale = (float)((double)group->plan->softmax_scale * 1.44269504088896340736);
    block.hidden = nextafterf(-FLT_MAX / fmaxf(block.scale, 1.0f), 0.0f); /* the quotient is rounded */
    for (int64_t vector = 0; vector < group->num_vectors; vector += block.width) {
        float weight[SCORE_BLOCK * BTX_VL];
        block.width = score_block_width(group->num_vectors - vector);
        block.first_row = vector * BTX_VL;
        for (int lane = 0; lane < block.width * BTX_VL; lane++) {
            block.reference[lane] = -FLT_MAX; /* not -infinity, from which it could not be subtracted */
            block.sum[lane] = 0.0;
        }
        int64_t tile = 0;
        mass_sweep(group, &block, step, step->sequence_begin, step->window_begin, &tile);
        mass_sweep(group, &block, step, step->window_begin, step->step_end, &tile);
        for (int lane = 0; lane < block.width * BTX_VL; lane++) {
            int is_row = block.first_row + lane < group->num_rows;
            if (!isfinite(block.sum[lane]) || !isfinite(block.reference[lane]))
                return 0;
            weight[lane] = is_row ? (float)(1.0 / (block.sum[lane] * rows)) : 0.0f;
        }
        mass_collect(group, &block, weight, step->num_prior, mass);
        block.queries += group->depth * block.width * BTX_VL;
    }
    return 1;
}

static btx_status btx_cpu_attention_mass(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                                         btx_error *error)
{
    const btx_plan *plan = pass->plan;
    score_group group;
    score_lay_out(plan, btx_scratch(pass), &group);
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const btx_plan_step *step = &plan->steps[s];
            for (int32_t head = head_begin; head < head_end && step->num_prior > 0; head++) {
                /* Heads are summed whole, so that the sum is the same when each is a part of its own. */
                float *of_head = head == head_begin ? mass : group.mass;
                memset(of_head, 0, (size_t)step->num_prior * sizeof *of_head);
                score_pack_queries(&group, pass, layer, step, head);
                if (!mass_of_head(&group, step, of_head))
                    return btx_fail(error, BTX_INVALID_ARGUMENT,
                                    "the attention of sequence %lld in layer %d is not finite: its queries or keys "
                                    "hold NaN or infinity, or were never captured; nothing was written",
                                    (long long)step->sequence, (int)layer);
                for (int64_t i = 0; head > head_begin && i < step->num_prior; i++)
                    mass[i] += of_head[i];
            }
            mass += step->num_prior;
        }
    }
    return BTX_OK;
}
