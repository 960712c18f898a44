/* linear.c - one product y = x W^T + bias for every layer: what the Processor is made of, alone.
 *
 * For tests and benchmarks of the kernels, and for whoever needs nothing else. This file names no backend. */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#include "internal.h"

struct btx_packed_linear {
    const btx_backend *backend;
    int32_t num_layers;
    btx_linear linear;
    void *memory; /* Owned, the backend's: packed weights and biases. */
    size_t bytes;
};

static btx_status check_dimension(const char *name, int64_t value, int64_t high, btx_error *error)
{
    if (value < 1 || value > high)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "the weight has %s %" PRId64 "; it must be 1 to %" PRId64, name,
                        value, high);
    return BTX_OK;
}

/* Rows of one layer of tensor f32 [num_layers, ...], the layer's last dimension along a row, to out, row-major and
 * checked. */
static btx_status read_layer(const btx_tensor *tensor, const char *name, int64_t layer, float *out, btx_error *error)
{
    const int32_t last = tensor->num_dims - 1;
    const float *data = (const float *)tensor->data + layer * tensor->stride[0];
    const int64_t rows = last == 2 ? tensor->shape[1] : 1, row_stride = last == 2 ? tensor->stride[1] : 0;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < tensor->shape[last]; c++) {
            float value = data[r * row_stride + c * tensor->stride[last]];
            if (!isfinite(value))
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "the %s of layer %" PRId64 " holds %g at [%" PRId64 ", %" PRId64
                                "]; weights must be finite",
                                name, layer, (double)value, r, c);
            *out++ = value;
        }
    }
    return BTX_OK;
}

btx_status btx_packed_linear_create(const btx_backend *backend, const btx_tensor *weight, const btx_tensor *bias,
                                    btx_dtype weight_dtype, btx_packed_linear **linear, btx_error *error)
{
    const int64_t any[3] = {-1, -1, -1};
    btx_packed_linear *created = NULL;
    float *unpacked = NULL, *biases = NULL;
    size_t packed_offset = 0, bias_offset = 0, total = 0;
    *linear = NULL;
    btx_status status = btx_backend_check(backend, error);
    if (status == BTX_OK && weight_dtype != BTX_F32 && weight_dtype != BTX_BF16)
        status = btx_fail(error, BTX_INVALID_ARGUMENT, "weight_dtype is %s; it must be float32 or bfloat16",
                          btx_dtype_name(weight_dtype));
    if (status == BTX_OK)
        status = btx_tensor_check(weight, "the weight", BTX_F32, 3, any, 0, error);
    if (status == BTX_OK)
        status = check_dimension("num_layers", weight->shape[0], 4096, error);
    if (status == BTX_OK)
        status = check_dimension("out_dim", weight->shape[1], 1 << 20, error);
    if (status == BTX_OK)
        status = check_dimension("in_dim", weight->shape[2], 1 << 20, error);
    if (status == BTX_OK && bias != NULL)
        status = btx_tensor_check(bias, "the bias", BTX_F32, 2, weight->shape, 0, error);
    if (status != BTX_OK)
        return status;

    created = calloc(1, sizeof *created);
    if (created == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a product");
    created->backend = backend;
    created->num_layers = (int32_t)weight->shape[0];
    btx_linear *product = &created->linear;
    product->out_dim = weight->shape[1];
    product->in_dim = weight->shape[2];
    product->dtype = weight_dtype;
    product->layer_bytes = backend->packed_bytes(product->out_dim, product->in_dim, weight_dtype);
    product->layer_bytes += (BTX_ALIGNMENT - product->layer_bytes % BTX_ALIGNMENT) % BTX_ALIGNMENT;
    int64_t num_biases = bias != NULL ? created->num_layers * product->out_dim : 0;
    if (!btx_reserve(&total, &packed_offset, created->num_layers, product->layer_bytes) ||
        !btx_reserve(&total, &bias_offset, num_biases, sizeof(float))) {
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "the weights exceed the address space");
        goto cleanup;
    }
    status = backend->allocate(total, &created->memory, error);
    if (status != BTX_OK)
        goto cleanup;
    created->bytes = total;
    char *packed = (char *)created->memory + packed_offset;
    biases = bias != NULL ? (float *)(void *)((char *)created->memory + bias_offset) : NULL;
    product->packed = packed;
    product->bias = biases;
    int64_t layer_size = product->out_dim * product->in_dim;
    unpacked = malloc((size_t)layer_size * sizeof *unpacked);
    if (unpacked == NULL) {
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for packing %" PRId64 " weights", layer_size);
        goto cleanup;
    }
    for (int64_t layer = 0; layer < created->num_layers && status == BTX_OK; layer++) {
        status = read_layer(weight, "weight", layer, unpacked, error);
        if (status == BTX_OK && biases != NULL)
            status = read_layer(bias, "bias", layer, biases + layer * product->out_dim, error);
        if (status == BTX_OK)
            backend->pack(unpacked, product->out_dim, product->in_dim, weight_dtype,
                          packed + (size_t)layer * product->layer_bytes);
    }

cleanup:
    free(unpacked);
    if (status != BTX_OK) {
        btx_packed_linear_destroy(created);
        created = NULL;
    }
    *linear = created;
    return status;
}

void btx_packed_linear_destroy(btx_packed_linear *linear)
{
    if (linear == NULL)
        return;
    linear->backend->release(linear->memory);
    free(linear);
}

const btx_backend *btx_packed_linear_backend(const btx_packed_linear *linear)
{
    return linear->backend;
}

size_t btx_packed_linear_bytes(const btx_packed_linear *linear)
{
    return linear->bytes;
}

/* ---- one call ------------------------------------------------------------------------------------- */

typedef struct linear_run {
    const btx_packed_linear *linear;
    btx_plan plan; /* rows alone: nothing is selected or written */
    const float *x;
    float *out;
    int64_t rows;
    int accumulate;
    char *lanes; /* [num_threads] of lane_bytes */
    size_t lane_bytes;
} linear_run;

static btx_status linear_pass(void *context, int32_t layer_begin, int32_t layer_end, int32_t lane, btx_error *error)
{
    const linear_run *run = context;
    const btx_linear *product = &run->linear->linear;
    const btx_pass pass = {
        .plan = &run->plan,
        .layer_begin = layer_begin,
        .layer_end = layer_end,
        .scratch = run->lanes + (size_t)lane * run->lane_bytes,
    };
    return run->linear->backend->linear(&pass, product, run->x + layer_begin * run->rows * product->in_dim, run->rows,
                                        run->accumulate, run->out + layer_begin * run->rows * product->out_dim, error);
}

/* Kernels step from row to row and from layer to layer by the row's width. */
static btx_status check_row_major(const btx_tensor *tensor, const char *name, btx_error *error)
{
    int64_t stride = 1;
    for (int32_t d = tensor->num_dims - 1; d >= 0; stride *= tensor->shape[d], d--) {
        if (tensor->shape[d] > 1 && tensor->stride[d] != stride)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "%s has strides [%" PRId64 ", %" PRId64 ", %" PRId64
                            "]; it must be row-major: pass a contiguous tensor",
                            name, tensor->stride[0], tensor->stride[1], tensor->stride[2]);
    }
    return BTX_OK;
}

btx_status btx_packed_linear_apply(const btx_packed_linear *linear, btx_workspace *workspace, const btx_tensor *x,
                                   int accumulate, btx_tensor *out, btx_error *error)
{
    const btx_backend *backend = linear->backend;
    const btx_linear *product = &linear->linear;
    const int64_t x_shape[3] = {linear->num_layers, -1, product->in_dim};
    if (workspace == NULL || btx_workspace_backend(workspace) != backend)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "the workspace is of another backend than '%s:%s'; create it with this one", backend->name,
                        backend->variant);
    btx_status status = btx_tensor_check(x, "x", BTX_F32, 3, x_shape, 0, error);
    if (status != BTX_OK)
        return status;
    const int64_t rows = x->shape[1], out_shape[3] = {linear->num_layers, rows, product->out_dim};
    status = btx_tensor_check(out, "out", BTX_F32, 3, out_shape, 1, error);
    if (status != BTX_OK || rows == 0)
        return status;
    status = check_row_major(x, "x", error);
    if (status == BTX_OK)
        status = check_row_major(out, "out", error);
    if (status != BTX_OK)
        return status;
    linear_run run = {
        .linear = linear,
        .plan = {.total_rows = rows, .num_layers = linear->num_layers},
        .x = x->data,
        .out = out->data,
        .rows = rows,
        .accumulate = accumulate,
    };
    const float *x_end = run.x + linear->num_layers * rows * product->in_dim;
    const float *out_end = run.out + linear->num_layers * rows * product->out_dim;
    if (run.x < out_end && run.out < x_end)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "x and out share memory; pass an out of its own");

    size_t scratch = 0, total = 0, lanes = 0;
    if (!btx_reserve(&run.lane_bytes, &scratch, 1, backend->scratch_bytes(&run.plan, product->in_dim)) ||
        !btx_reserve(&total, &lanes, btx_workspace_num_threads(workspace), run.lane_bytes))
        return btx_fail(error, BTX_OUT_OF_MEMORY, "%" PRId64 " rows exceed the address space; split the call", rows);
    status = btx_workspace_reserve(workspace, total, &run.lanes, error);
    if (status == BTX_OK)
        status = btx_workspace_run(workspace, linear->num_layers, linear_pass, &run, error);
    return status;
}
