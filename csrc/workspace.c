/* workspace.c - staging memory and threads of one caller. */
#include <stdlib.h>

#include "internal.h"

struct btx_workspace {
    const btx_backend *backend;
    int32_t device_index;
    int32_t num_threads;
    void *executor; /* Owned. */
    char *memory;   /* Owned, the backend's. */
    size_t bytes;
    int64_t num_skipped; /* steps; of a device the executor counts */
};

btx_status btx_workspace_create(const btx_backend *backend, int32_t device_index, int32_t num_threads,
                                btx_workspace **workspace, btx_error *error)
{
    *workspace = NULL;
    btx_status status = btx_backend_check(backend, error);
    if (status != BTX_OK)
        return status;
    if (num_threads < 1 || num_threads > BTX_MAX_THREADS)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "num_threads is %d; it must be 1 to %d", (int)num_threads,
                        BTX_MAX_THREADS);
    btx_workspace *created = calloc(1, sizeof *created);
    if (created == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a workspace");
    created->backend = backend;
    created->device_index = device_index;
    created->num_threads = backend->layers_per_pass > 0 ? num_threads : 1;
    status = backend->executor_create(device_index, created->num_threads, &created->executor, error);
    if (status != BTX_OK) {
        free(created);
        return status;
    }
    *workspace = created;
    return BTX_OK;
}

void btx_workspace_destroy(btx_workspace *workspace)
{
    if (workspace == NULL)
        return;
    workspace->backend->executor_destroy(workspace->executor);
    workspace->backend->release(workspace->memory);
    free(workspace);
}

btx_status btx_workspace_synchronize(btx_workspace *workspace, btx_error *error)
{
    if (workspace->backend->synchronize == NULL)
        return BTX_OK;
    return workspace->backend->synchronize(workspace->executor, NULL, error);
}

btx_status btx_workspace_settle(btx_workspace *workspace, void *stream, btx_error *error)
{
    btx_status status = BTX_OK;
    if (workspace->backend->check_wait != NULL)
        status = workspace->backend->check_wait(workspace->executor, stream, error);
    return status == BTX_OK ? btx_workspace_synchronize(workspace, error) : status;
}

int32_t btx_workspace_num_threads(const btx_workspace *workspace)
{
    return workspace->num_threads;
}

size_t btx_workspace_bytes(const btx_workspace *workspace)
{
    return workspace->bytes;
}

int64_t btx_workspace_skipped_steps(const btx_workspace *workspace)
{
    if (workspace->backend->num_skipped != NULL)
        return workspace->backend->num_skipped(workspace->executor);
    return workspace->num_skipped;
}

void btx_workspace_count_skipped(btx_workspace *workspace, int64_t num_steps)
{
    workspace->num_skipped += num_steps;
}

void *btx_workspace_executor(const btx_workspace *workspace)
{
    return workspace->executor;
}

int32_t btx_workspace_device_index(const btx_workspace *workspace)
{
    return workspace->device_index;
}

btx_status btx_workspace_check(const btx_workspace *workspace, const btx_backend *backend, int32_t device_index,
                               btx_error *error)
{
    char name[64];
    if (workspace != NULL && workspace->backend == backend && workspace->device_index == device_index)
        return BTX_OK;
    btx_backend_format(backend, device_index, name, sizeof name);
    return btx_fail(error, BTX_INVALID_ARGUMENT,
                    "the workspace is of another backend than '%s'; create it with this one", name);
}

btx_status btx_workspace_reserve(btx_workspace *workspace, size_t bytes, btx_error *error)
{
    return btx_workspace_grow(workspace, bytes, NULL, error);
}

btx_status btx_workspace_grow(btx_workspace *workspace, size_t bytes, void *const *stream, btx_error *error)
{
    const btx_backend *backend = workspace->backend;
    if (bytes <= workspace->bytes)
        return BTX_OK;
    void *grown = NULL;
    btx_status status = BTX_OK;
    if (backend->check_growth != NULL)
        status = backend->check_growth(workspace->executor, stream, error);
    if (status == BTX_OK && workspace->memory != NULL) /* an earlier call may be working there */
        status = btx_workspace_synchronize(workspace, error);
    if (status == BTX_OK)
        status = backend->allocate(workspace->device_index, bytes, &grown, error);
    if (status != BTX_OK)
        return status;
    backend->release(workspace->memory);
    workspace->memory = grown;
    workspace->bytes = bytes;
    return BTX_OK;
}

char *btx_workspace_memory(const btx_workspace *workspace)
{
    return workspace->memory;
}

btx_status btx_workspace_run(btx_workspace *workspace, int64_t num_units, btx_unit_function fn, void *context,
                             btx_error *error)
{
    return workspace->backend->executor_run(workspace->executor, num_units, fn, context, error);
}
