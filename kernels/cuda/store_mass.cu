/* store_mass.cu - the attention mass, summed over its parts, to a caller's tensor. */
#include "operations.cuh"

#define THREADS 256

/* Block: positions of a step, a layer. */
__global__ void store_mass_kernel(const device_plan plan, const int32_t layer_begin, const int32_t num_parts,
                                  const float *mass, float *out, const int64_t layer_stride, const int64_t step_stride,
                                  const int64_t stride, const int64_t length)
{
    const device_step step = plan.steps[blockIdx.y];
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i >= length)
        return;
    float sum = 0.0f;
    mass += (int64_t)blockIdx.z * num_parts * plan.total_prior + step.prior_offset + i;
    for (int32_t part = 0; i < step.num_prior && part < num_parts; part++)
        sum += mass[part * plan.total_prior];
    out[(layer_begin + blockIdx.z) * layer_stride + blockIdx.y * step_stride + i * stride] = sum;
}

btx_status cuda_store_mass(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                           btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    const device_plan &plan = executor->plan;
    const int64_t length = out->shape[2];
    if (length == 0)
        return BTX_OK;
    BTX_LAUNCH(
        store_mass_kernel,
        dim3((unsigned)((length + THREADS - 1) / THREADS), (unsigned)plan.num_steps, (unsigned)num_layers_of(pass)),
        THREADS, 0, executor->stream, plan, pass->layer_begin, num_parts, mass, (float *)out->data, out->stride[0],
        out->stride[1], out->stride[2], length);
    BTX_CUDA_CHECK("launching store_mass_kernel");
    return BTX_OK;
}
