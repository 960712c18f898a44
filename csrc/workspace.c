/* workspace.c - staging memory and threads of one caller. */
#include <stdlib.h>

#include "internal.h"

struct btx_workspace {
    const btx_backend *backend;
    int32_t num_threads;
    void *executor; /* Owned. */
    char *memory;   /* Owned, the backend's. */
    size_t bytes;
};

btx_status btx_workspace_create(const btx_backend *backend, int32_t num_threads, btx_workspace **workspace,
                                btx_error *error)
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
    created->num_threads = num_threads;
    status = backend->executor_create(num_threads, &created->executor, error);
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

int32_t btx_workspace_num_threads(const btx_workspace *workspace)
{
    return workspace->num_threads;
}

size_t btx_workspace_bytes(const btx_workspace *workspace)
{
    return workspace->bytes;
}

btx_status btx_workspace_check(const btx_workspace *workspace, const btx_backend *backend, btx_error *error)
{
    if (workspace == NULL || workspace->backend != backend)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "the workspace is of another backend than '%s:%s'; create it with this one", backend->name,
                        backend->variant);
    return BTX_OK;
}

btx_status btx_workspace_reserve(btx_workspace *workspace, size_t bytes, btx_error *error)
{
    if (bytes <= workspace->bytes)
        return BTX_OK;
    void *grown = NULL;
    btx_status status = workspace->backend->allocate(bytes, &grown, error);
    if (status != BTX_OK)
        return status;
    workspace->backend->release(workspace->memory);
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
