/* store_mass.c - the attention mass, summed over its parts, to a caller's tensor. */
#include "btx.h"

static btx_status btx_cpu_store_mass(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                                     btx_error *error)
{
    const int64_t prior = btx_pass_prior(pass);
    (void)error;
    for (int64_t layer = pass->layer_begin; layer < pass->layer_end; layer++, mass += num_parts * prior) {
        const float *of_step = mass;
        for (int64_t s = pass->step_begin; s < pass->step_end; s++) {
            const int64_t num_prior = pass->plan->steps[s].num_prior;
            for (int64_t i = 0; i < out->shape[2]; i++) {
                float sum = 0.0f;
                for (int32_t part = 0; i < num_prior && part < num_parts; part++)
                    sum += of_step[part * prior + i];
                ((float *)out->data)[layer * out->stride[0] + s * out->stride[1] + i * out->stride[2]] = sum;
            }
            of_step += num_prior;
        }
    }
    return BTX_OK;
}
