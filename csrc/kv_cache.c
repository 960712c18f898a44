/* kv_cache.c - checks of a KV cache's views against the backbone's shape. */
#include <inttypes.h>

#include "internal.h"

static btx_status check_view(const btx_tensor *view, const btx_tensor *first, const char *what, int32_t layer,
                             int32_t num_kv_heads, int32_t head_dim, int for_writing, btx_error *error)
{
    if (view->num_dims != 4)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d have %d dimensions; they must be "
                        "[num_blocks, block_size, num_kv_heads, head_dim]",
                        what, (int)layer, (int)view->num_dims);
    if (view->dtype != BTX_F32 && view->dtype != BTX_F16 && view->dtype != BTX_BF16)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d are %s; a KV cache is float32, float16 or bfloat16", what, (int)layer,
                        btx_dtype_name(view->dtype));
    if (view->shape[2] != num_kv_heads)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s of layer %d have %" PRId64 " KV heads; expected %d", what,
                        (int)layer, view->shape[2], (int)num_kv_heads);
    if (view->shape[3] != head_dim)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s of layer %d have head size %" PRId64 "; expected %d", what,
                        (int)layer, view->shape[3], (int)head_dim);
    if (view->shape[0] < 1 || view->shape[1] < 1)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d are empty: %" PRId64 " blocks of %" PRId64 " positions", what, (int)layer,
                        view->shape[0], view->shape[1]);
    if (view->data == NULL)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s of layer %d have no data", what, (int)layer);
    if (view->dtype != first->dtype)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s of layer %d are %s, keys of layer 0 are %s; use one dtype",
                        what, (int)layer, btx_dtype_name(view->dtype), btx_dtype_name(first->dtype));
    if (view->device.type != first->device.type || view->device.index != first->device.index)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d are on another device than keys of layer 0; keep the cache on one", what,
                        (int)layer);
    if (view->shape[0] != first->shape[0] || view->shape[1] != first->shape[1])
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d have %" PRId64 " blocks of %" PRId64 " positions, keys of layer 0 have %" PRId64
                        " of %" PRId64 "; all layers share one block table",
                        what, (int)layer, view->shape[0], view->shape[1], first->shape[0], first->shape[1]);
    if (for_writing && view->read_only)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s of layer %d are read-only; pass writable tensors", what,
                        (int)layer);
    if (for_writing && btx_tensor_overlaps(view))
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s of layer %d have zero or overlapping strides; copy them to memory of their own", what,
                        (int)layer);
    return BTX_OK;
}

btx_status btx_kv_cache_check(const btx_kv_cache *cache, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim,
                              int for_writing, btx_error *error)
{
    if (cache->num_layers != num_layers)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "the KV cache has %d layers; the Processor was made for %d",
                        (int)cache->num_layers, (int)num_layers);
    for (int32_t layer = 0; layer < num_layers; layer++) {
        btx_status status =
            check_view(&cache->keys[layer], &cache->keys[0], "keys", layer, num_kv_heads, head_dim, for_writing, error);
        if (status == BTX_OK)
            status = check_view(&cache->values[layer], &cache->keys[0], "values", layer, num_kv_heads, head_dim,
                                for_writing, error);
        if (status != BTX_OK)
            return status;
    }
    /* One tensor given twice would be rewritten twice. Ranges may interleave (packed K|V rows), starts may not. */
    for (int32_t a = 0; for_writing && a < 2 * num_layers; a++) {
        const void *start = a % 2 ? cache->values[a / 2].data : cache->keys[a / 2].data;
        for (int32_t b = 0; b < a; b++) {
            if (start == (b % 2 ? cache->values[b / 2].data : cache->keys[b / 2].data))
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "%s of layer %d and %s of layer %d are the same memory; give each its own",
                                b % 2 ? "values" : "keys", (int)(b / 2), a % 2 ? "values" : "keys", (int)(a / 2));
        }
    }
    return BTX_OK;
}
