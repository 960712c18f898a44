/* tensor.c - dtypes, tensor views and their checks; the error sentence. */
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>

#include "internal.h"

btx_status btx_fail(btx_error *error, btx_status status, const char *format, ...)
{
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
    }
    return status;
}

size_t btx_dtype_size(btx_dtype dtype)
{
    switch (dtype) {
    case BTX_F16:
    case BTX_BF16:
        return 2;
    case BTX_F32:
    case BTX_I32:
        return 4;
    case BTX_I64:
        return 8;
    }
    return 0;
}

const char *btx_dtype_name(btx_dtype dtype)
{
    switch (dtype) {
    case BTX_F32:
        return "float32";
    case BTX_F16:
        return "float16";
    case BTX_BF16:
        return "bfloat16";
    case BTX_I32:
        return "int32";
    case BTX_I64:
        return "int64";
    }
    return "unknown dtype";
}

const char *btx_device_type_name(btx_device_type type)
{
    return type == BTX_CUDA ? "cuda" : "cpu";
}

btx_tensor btx_tensor_contiguous(void *data, btx_dtype dtype, int32_t num_dims, const int64_t *shape)
{
    btx_tensor tensor = {.data = data, .dtype = dtype, .num_dims = num_dims};
    int64_t stride = 1;
    for (int32_t d = num_dims - 1; d >= 0; d--) {
        tensor.shape[d] = shape[d];
        tensor.stride[d] = stride;
        stride *= shape[d];
    }
    return tensor;
}

static uint64_t magnitude(int64_t value)
{
    return value < 0 ? 0 - (uint64_t)value : (uint64_t)value;
}

/* Dimensions are visited from the smallest stride up; each must step over all that the smaller ones reach.
 * Sufficient for every layout made of nested blocks, which is what permutes, slices and paged pools are. */
int btx_tensor_overlaps(const btx_tensor *tensor)
{
    int visited[BTX_MAX_DIMS] = {0};
    uint64_t reach = 0;
    for (int32_t d = 0; d < tensor->num_dims; d++) {
        if (tensor->shape[d] == 0)
            return 0;
    }
    for (int32_t round = 0; round < tensor->num_dims; round++) {
        int32_t smallest = -1;
        for (int32_t d = 0; d < tensor->num_dims; d++) {
            if (!visited[d] && (smallest < 0 || magnitude(tensor->stride[d]) < magnitude(tensor->stride[smallest])))
                smallest = d;
        }
        visited[smallest] = 1;
        if (tensor->shape[smallest] <= 1)
            continue;
        if (magnitude(tensor->stride[smallest]) <= reach)
            return 1;
        uint64_t span;
        if (__builtin_mul_overflow(magnitude(tensor->stride[smallest]), (uint64_t)tensor->shape[smallest] - 1, &span) ||
            __builtin_add_overflow(reach, span, &reach))
            return 1;
    }
    return 0;
}

/* "the CPU" or "cuda:1". */
static void format_device(btx_device device, char *out, size_t size)
{
    if (device.type == BTX_CPU)
        snprintf(out, size, "the CPU");
    else
        snprintf(out, size, "%s:%d", btx_device_type_name(device.type), (int)device.index);
}

btx_status btx_device_check(const btx_tensor *tensor, const char *name, btx_device device, btx_error *error)
{
    if (tensor->device.type == device.type && tensor->device.index == device.index)
        return BTX_OK;
    char is[32], must[32];
    format_device(tensor->device, is, sizeof is);
    format_device(device, must, sizeof must);
    return btx_fail(error, BTX_INVALID_ARGUMENT, "%s is on %s; it must be on %s: move it there", name, is, must);
}

btx_status btx_tensor_check(const btx_tensor *tensor, const char *name, btx_dtype dtype, int32_t num_dims,
                            const int64_t *shape, int for_writing, btx_error *error)
{
    return btx_tensor_check_on(tensor, name, dtype, num_dims, shape, for_writing, (btx_device){BTX_CPU, 0}, error);
}

btx_status btx_tensor_check_on(const btx_tensor *tensor, const char *name, btx_dtype dtype, int32_t num_dims,
                               const int64_t *shape, int for_writing, btx_device device, btx_error *error)
{
    if (tensor->dtype != dtype)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s is %s; it must be %s", name, btx_dtype_name(tensor->dtype),
                        btx_dtype_name(dtype));
    btx_status status = btx_device_check(tensor, name, device, error);
    if (status != BTX_OK)
        return status;
    if (tensor->num_dims != num_dims)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s has %d dimensions; it must have %d", name,
                        (int)tensor->num_dims, (int)num_dims);
    int empty = 0;
    for (int32_t d = 0; d < num_dims; d++) {
        if (shape[d] >= 0 && tensor->shape[d] != shape[d])
            return btx_fail(error, BTX_INVALID_ARGUMENT, "dimension %d of %s is %" PRId64 "; it must be %" PRId64,
                            (int)d, name, tensor->shape[d], shape[d]);
        if (tensor->shape[d] < 0)
            return btx_fail(error, BTX_INVALID_ARGUMENT, "dimension %d of %s is %" PRId64 "; it must be 0 or more",
                            (int)d, name, tensor->shape[d]);
        empty = empty || tensor->shape[d] == 0;
    }
    if (tensor->data == NULL && !empty)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s has no data", name);
    if (for_writing && tensor->read_only)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s is read-only; pass a writable tensor", name);
    if (for_writing && btx_tensor_overlaps(tensor))
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s has zero or overlapping strides; pass a tensor whose elements are distinct", name);
    return BTX_OK;
}

int btx_reserve(size_t *total, size_t *offset, int64_t count, size_t size)
{
    size_t bytes;
    if (count < 0 || __builtin_mul_overflow((size_t)count, size, &bytes))
        return 0;
    if (__builtin_add_overflow(bytes, BTX_ALIGNMENT - 1, &bytes))
        return 0;
    bytes -= bytes % BTX_ALIGNMENT;
    *offset = *total;
    return !__builtin_add_overflow(*total, bytes, total);
}
