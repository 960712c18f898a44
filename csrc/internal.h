/* internal.h - what the core's files share and its users do not see. */
#ifndef BTX_INTERNAL_H
#define BTX_INTERNAL_H

#include "btx.h"

/* Bytes rounded up so that every buffer carved from one allocation starts on a cache line. */
#define BTX_ALIGNMENT ((size_t)64)

/* The plan of a boundary and the tables it owns. */
typedef struct btx_boundary_plan {
    btx_plan plan;
    btx_plan_step *steps; /* Owned. */
    char *tables;         /* Owned: the entries of block and query table that the steps use. */
} btx_boundary_plan;

/* Checks the whole boundary and lays out its rows. for_writing: views must be writable and no block may belong to two
 * steps. On failure *out owns nothing. */
btx_status btx_boundary_plan_create(const btx_boundary *boundary, btx_device device, int32_t num_layers,
                                    int32_t num_kv_heads, int32_t num_query_heads, int32_t head_dim, int32_t top_k,
                                    int32_t recent_window, int for_writing, btx_boundary_plan *out, btx_error *error);
void btx_boundary_plan_destroy(btx_boundary_plan *plan);

/* Checks one tensor argument: rank, dtype, shape (-1: any), CPU, writable. name is used in the message. */
btx_status btx_tensor_check(const btx_tensor *tensor, const char *name, btx_dtype dtype, int32_t num_dims,
                            const int64_t *shape, int for_writing, btx_error *error);
/* The same on a device; and whether it is there, alone. */
btx_status btx_tensor_check_on(const btx_tensor *tensor, const char *name, btx_dtype dtype, int32_t num_dims,
                               const int64_t *shape, int for_writing, btx_device device, btx_error *error);
btx_status btx_device_check(const btx_tensor *tensor, const char *name, btx_device device, btx_error *error);

/* ABI and device of a backend that a caller hands in. */
btx_status btx_backend_check(const btx_backend *backend, btx_error *error);

/* A region of the workspace being laid out: *total grows by count * size, aligned; 0 on overflow. */
int btx_reserve(size_t *total, size_t *offset, int64_t count, size_t size);

/* For a call on stream that is waited for: refuses it where that cannot be, else waits for what was called before,
 * whose refusal must not be taken for this one's. */
btx_status btx_workspace_settle(btx_workspace *workspace, void *stream, btx_error *error);
/* btx_workspace_reserve, for a call on *stream, or with NULL for calls to come. */
btx_status btx_workspace_grow(btx_workspace *workspace, size_t bytes, void *const *stream, btx_error *error);
/* What was reserved: stays where it is until the workspace is destroyed or grows. */
char *btx_workspace_memory(const btx_workspace *workspace);
btx_status btx_workspace_run(btx_workspace *workspace, int64_t num_units, btx_unit_function fn, void *context,
                             btx_error *error);
void *btx_workspace_executor(const btx_workspace *workspace);
/* Of a workspace of the host: adds to what btx_workspace_skipped_steps tells. */
void btx_workspace_count_skipped(btx_workspace *workspace, int64_t num_steps);
int32_t btx_workspace_device_index(const btx_workspace *workspace);
/* INVALID_ARGUMENT where the workspace is not of this backend and device. */
btx_status btx_workspace_check(const btx_workspace *workspace, const btx_backend *backend, int32_t device_index,
                               btx_error *error);

/* "cpu:avx2", "cuda:1" to out. */
void btx_backend_format(const btx_backend *backend, int32_t device_index, char *out, size_t size);

#endif /* BTX_INTERNAL_H */
