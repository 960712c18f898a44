/* top_k.c - the prior positions of largest attention mass, then the window: the rows of a rewrite
 * (arXiv 2505.16950, section 3.2, the set I).
 *
 * A radix select: bytes from the most significant on, each pass keeping the values that share the bytes of the
 * count-th largest. O(length), exact; among equal values the smaller positions are taken. */
#include "paging.h"

/* An integer that orders as the value does. NaN counts as zero, and so does -0. */
static inline uint32_t top_k_order(float value)
{
    uint32_t bits = btx_f32_bits(value), magnitude = bits & 0x7fffffffu; /* a comparison might flush a subnormal */
    if (magnitude == 0 || magnitude > 0x7f800000u)
        bits = 0;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The count-th largest order of mass [length], 1 <= count <= length. *ties is how many equal to it are among the
 * count largest. order [length] is scratch. */
static uint32_t top_k_threshold(const float *mass, int64_t length, int64_t count, uint32_t *order, int64_t *ties)
{
    uint32_t threshold = 0;
    for (int64_t i = 0; i < length; i++)
        order[i] = top_k_order(mass[i]);
    for (int shift = 24; shift >= 0; shift -= 8) {
        int64_t histogram[256] = {0}, kept = 0;
        uint32_t digit = 255;
        for (int64_t i = 0; i < length; i++)
            histogram[order[i] >> shift & 255]++;
        for (; histogram[digit] < count; digit--)
            count -= histogram[digit];
        threshold |= digit << shift;
        for (int64_t i = 0; i < length; i++) {
            order[kept] = order[i]; /* no branch: which values match is hard to predict */
            kept += (order[kept] >> shift & 255) == digit;
        }
        length = kept;
    }
    *ties = count;
    return threshold;
}

static void top_k_select(const float *mass, int64_t length, int64_t count, int64_t begin, uint32_t *order,
                         int32_t *positions)
{
    int64_t ties = length;
    uint32_t threshold = 0; /* all */
    if (count == 0)
        return;
    if (count < length)
        threshold = top_k_threshold(mass, length, count, order, &ties);
    for (int64_t i = 0; i < length; i++) {
        uint32_t value = top_k_order(mass[i]);
        if (value > threshold || (value == threshold && ties-- > 0))
            *positions++ = (int32_t)(begin + i);
    }
}

/* mass [n] += the other parts, each stride behind the one before. */
static void top_k_sum(float *mass, int64_t n, int32_t num_parts, int64_t stride)
{
    for (int32_t part = 1; part < num_parts; part++) {
        const float *from = mass + part * stride;
        for (int64_t i = 0; i < n; i++)
            mass[i] += from[i];
    }
}

static btx_status btx_cpu_top_k(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions,
                                btx_error *error)
{
    const btx_plan *plan = pass->plan;
    const int64_t prior = btx_pass_prior(pass);
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++, mass += num_parts * prior) {
        float *of_step = mass;
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const btx_plan_step *step = &plan->steps[s];
            if (step->num_recalled > 0)
                top_k_sum(of_step, step->num_prior, num_parts, prior);
            top_k_select(of_step, step->num_prior, step->num_recalled, step->sequence_begin,
                         (uint32_t *)btx_scratch(pass), positions);
            positions += step->num_recalled;
            for (int64_t j = 0; j < step->num_window; j++)
                *positions++ = (int32_t)(step->window_begin + j);
            of_step += step->num_prior;
        }
    }
    return BTX_OK;
}
