/* operations.cuh - the functions of the CUDA backend's table, see btx.h for what each does. */
#ifndef BTX_OPERATIONS_CUH
#define BTX_OPERATIONS_CUH

#include "plan.cuh"

/* executor.cu */
int cuda_available(void);
btx_status cuda_allocate(int32_t device, size_t bytes, void **memory, btx_error *error);
void cuda_release(void *memory);
btx_status cuda_upload(int32_t device, void *memory, const void *from, size_t bytes, btx_error *error);
btx_status cuda_executor_create(int32_t device, int32_t num_threads, void **executor, btx_error *error);
void cuda_executor_destroy(void *executor);
btx_status cuda_executor_run(void *executor, int64_t num_units, btx_unit_function fn, void *context, btx_error *error);
btx_status cuda_check_wait(void *executor, void *stream, btx_error *error);
btx_status cuda_check_growth(void *executor, void *const *stream, btx_error *error);
btx_status cuda_begin(void *executor, const btx_plan *plan, void *stream, int timed, btx_error *error);
void cuda_mark(void *executor, btx_stage stage);
btx_status cuda_download(void *executor, void *to, const void *from, size_t bytes, btx_error *error);
btx_status cuda_synchronize(void *executor, double *stage_seconds, btx_error *error);
int64_t cuda_num_skipped(const void *executor);

/* attention_mass.cu, attention_mass_sm90.cu */
size_t cuda_selection_scratch_bytes(const btx_plan *plan, int32_t max_layers, int64_t max_rows);
btx_status cuda_attention_mass(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                               btx_error *error);

btx_status cuda_attention_mass_sm90(const btx_pass *pass, float *mass, btx_error *error);

/* One file each. */
btx_status cuda_store_mass(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                           btx_error *error);
btx_status cuda_top_k(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions, btx_error *error);
btx_status cuda_gather_kv(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight, float eps,
                          btx_dtype dtype, void *normed, btx_error *error);
btx_status cuda_round(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out, btx_error *error);
btx_status cuda_rms_norm(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                         btx_dtype dtype, void *out, btx_error *error);
btx_status cuda_attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                          void *out, btx_error *error);
btx_status cuda_stage_kv(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                         float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error);
btx_status cuda_write_kv(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error);
btx_status cuda_capture_queries(int32_t device_index, const btx_tensor *query, const btx_tensor *slots,
                                const btx_tensor *block_to_page, const btx_tensor *pages, void *stream,
                                btx_error *error);

/* linear.cu, linear_general.cu, linear_swiglu.cu, linear_swiglu_sm90.cu */
size_t cuda_packed_bytes(int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated);
void cuda_pack(const float *weight, int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated, void *packed);
size_t cuda_operand_bytes(int64_t rows, int64_t dim, btx_dtype dtype);
btx_status cuda_linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                       btx_error *error);
btx_status cuda_linear_general(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate,
                               float *out, btx_error *error);
btx_status cuda_linear_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                              btx_error *error);
/* bf16 weights, where the executor has encode_tensor_map. */
btx_status cuda_linear_swiglu_sm90(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                   btx_error *error);

static inline cuda_executor *executor_of(const btx_pass *pass)
{
    return (cuda_executor *)pass->executor;
}

static inline int32_t num_layers_of(const btx_pass *pass)
{
    return pass->layer_end - pass->layer_begin;
}

#endif /* BTX_OPERATIONS_CUH */
