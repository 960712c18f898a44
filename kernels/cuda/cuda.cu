/* cuda.cu - the CUDA backend's table. */
#include "operations.cuh"

/* One operation runs at a time, so they share one scratch. */
static size_t cuda_scratch_bytes(const btx_plan *plan, int32_t max_layers, int64_t max_rows, int64_t max_dim)
{
    const size_t selection = cuda_selection_scratch_bytes(plan, max_layers, max_rows);
    const size_t norms = (size_t)max_layers * (size_t)max_rows * sizeof(float2);
    (void)max_dim;
    return selection > norms ? selection : norms;
}

/* Rows of a pass: enough to fill the device, few enough for what they become to stay in its second-level cache. */
#define ROWS_PER_PASS 4096

extern "C" const btx_backend btx_cuda_backend = {
    BTX_ABI_VERSION,
    sizeof(btx_backend),
    "cuda",
    "",
#ifdef BTX_EMULATE
    BTX_CPU,
#else
    BTX_CUDA,
#endif
    0, /* layers_per_pass: as many as have ROWS_PER_PASS rows */
    ROWS_PER_PASS,
    1, /* mass_by_head */
    0, /* keeps_rows */
    cuda_available,
    cuda_allocate,
    cuda_release,
    cuda_executor_create,
    cuda_executor_destroy,
    cuda_executor_run,
    cuda_upload,
    cuda_check_wait,
    cuda_check_growth,
    cuda_begin,
    cuda_mark,
    cuda_download,
    cuda_synchronize,
    cuda_num_skipped,
    cuda_packed_bytes,
    cuda_pack,
    cuda_operand_bytes,
    cuda_scratch_bytes,
    cuda_attention_mass,
    cuda_store_mass,
    cuda_top_k,
    cuda_gather_kv,
    cuda_round,
    cuda_rms_norm,
    cuda_linear,
    cuda_linear_swiglu,
    cuda_attention,
    cuda_stage_kv,
    cuda_write_kv,
    cuda_capture_queries,
};
