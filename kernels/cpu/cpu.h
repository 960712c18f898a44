/* cpu.h - the CPU backends: what backend.c lists and the variants share. */
#ifndef BTX_CPU_H
#define BTX_CPU_H

#include "btx.h"

extern const btx_backend btx_cpu_backend_scalar;
extern const btx_backend btx_cpu_backend_avx2;
extern const btx_backend btx_cpu_backend_avx512;
extern const btx_backend btx_cpu_backend_avx512_bf16;
extern const btx_backend btx_cpu_backend_neon;

/* executor.c: see the table in btx.h. */
btx_status btx_cpu_allocate(int32_t device_index, size_t bytes, void **memory, btx_error *error);
void btx_cpu_release(void *memory);
btx_status btx_cpu_executor_create(int32_t device_index, int32_t num_threads, void **executor, btx_error *error);
void btx_cpu_executor_destroy(void *executor);
btx_status btx_cpu_executor_run(void *executor, int64_t num_units, btx_unit_function fn, void *context,
                                btx_error *error);

#endif /* BTX_CPU_H */
