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
    if (status == BTX_OK && backend->upload != NULL)
        status = btx_fail(error, BTX_UNSUPPORTED,
                          "single products run on CPU backends; '%s' has its own library for them", backend->name);
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
    product->layer_stride = backend->packed_bytes(product->out_dim, product->in_dim, weight_dtype, 0);
    product->layer_stride += (BTX_ALIGNMENT - product->layer_stride % BTX_ALIGNMENT) % BTX_ALIGNMENT;
    int64_t num_biases = bias != NULL ? created->num_layers * product->out_dim : 0;
    if (!btx_reserve(&total, &packed_offset, created->num_layers, product->layer_stride) ||
        !btx_reserve(&total, &bias_offset, num_biases, sizeof(float))) {
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "the weights exceed the address space");
        goto cleanup;
    }
    status = backend->allocate(0, total, &created->memory, error);
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
            backend->pack(unpacked, product->out_dim, product->in_dim, weight_dtype, 0,
                          packed + (size_t)layer * product->layer_stride);
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
    btx_plan plan; /* rows alone: nothing is selected or written; its steps are the passes' rows */
    int32_t layers_per_unit;
    const float *x;
    float *out;
    int accumulate;
    void *executor;
    char *lanes; /* [num_threads] of lane_bytes */
    size_t operand, scratch, lane_bytes;
} linear_run;

static int64_t num_units(const linear_run *run)
{
    return (run->plan.num_layers + run->layers_per_unit - 1) / run->layers_per_unit * run->plan.num_steps;
}

static btx_status linear_unit(void *context, int64_t unit, int32_t lane_index, btx_error *error)
{
    const linear_run *run = context;
    const btx_backend *backend = run->linear->backend;
    const btx_linear *product = &run->linear->linear;
    const btx_plan *plan = &run->plan;
    char *lane = run->lanes + (size_t)lane_index * run->lane_bytes;
    const int32_t layer_begin = (int32_t)(unit / plan->num_steps) * run->layers_per_unit;
    const int32_t layer_end = layer_begin + run->layers_per_unit;
    const int64_t step = unit % plan->num_steps;
    const btx_pass pass = {
        .plan = plan,
        .layer_begin = layer_begin,
        .layer_end = layer_end < plan->num_layers ? layer_end : plan->num_layers,
        .step_begin = step,
        .step_end = step + 1,
        .executor = run->executor,
        .scratch = lane + run->scratch,
    };
    const int64_t row = layer_begin * plan->total_rows + plan->steps[step].row_offset;
    btx_status status = backend->round(&pass, run->x + row * product->in_dim, product->in_dim, product->dtype,
                                       lane + run->operand, error);
    if (status == BTX_OK)
        status = backend->linear(&pass, product, lane + run->operand, run->accumulate,
                                 run->out + row * product->out_dim, error);
    return status;
}

/* Makes room in the workspace and cuts the rows into passes: as a boundary's, of the backend's favourite size. */
static btx_status prepare_run(linear_run *run, btx_workspace *workspace, btx_error *error)
{
    const btx_backend *backend = run->linear->backend;
    const btx_linear *product = &run->linear->linear;
    btx_plan *plan = &run->plan;
    int64_t rows_per_unit = plan->total_rows;
    run->layers_per_unit = backend->layers_per_pass > 0 ? backend->layers_per_pass : plan->num_layers;
    /* A pass is of one layer, or of all rows. */
    if (run->layers_per_unit == 1 && backend->rows_per_pass > 0 && backend->rows_per_pass < rows_per_unit)
        rows_per_unit = backend->rows_per_pass;
    int64_t num_steps = (plan->total_rows + rows_per_unit - 1) / rows_per_unit;
    size_t total = 0, lanes = 0, steps = 0;
    int64_t rows = run->layers_per_unit * rows_per_unit;
    int fits = btx_reserve(&run->lane_bytes, &run->operand, 1,
                           backend->operand_bytes(rows, product->in_dim, product->dtype)) &&
               btx_reserve(&run->lane_bytes, &run->scratch, 1,
                           backend->scratch_bytes(plan, run->layers_per_unit, rows_per_unit, 0)) &&
               btx_reserve(&total, &lanes, btx_workspace_num_threads(workspace), run->lane_bytes) &&
               btx_reserve(&total, &steps, num_steps, sizeof(btx_plan_step));
    if (!fits)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "%" PRId64 " rows exceed the address space; split the call",
                        plan->total_rows);
    btx_status status = btx_workspace_reserve(workspace, total, error);
    if (status != BTX_OK)
        return status;
    char *memory = btx_workspace_memory(workspace);
    run->lanes = memory + lanes;
    btx_plan_step *step = (btx_plan_step *)(void *)(memory + steps);
    plan->steps = step;
    plan->num_steps = num_steps;
    for (int64_t row = 0; row < plan->total_rows; row += rows_per_unit, step++) {
        int64_t left = plan->total_rows - row;
        *step = (btx_plan_step){.row_offset = row, .num_window = left < rows_per_unit ? left : rows_per_unit};
    }
    return BTX_OK;
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
    const btx_linear *product = &linear->linear;
    const int64_t x_shape[3] = {linear->num_layers, -1, product->in_dim};
    btx_status status = btx_workspace_check(workspace, linear->backend, 0, error);
    if (status == BTX_OK)
        status = btx_tensor_check(x, "x", BTX_F32, 3, x_shape, 0, error);
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
        .accumulate = accumulate,
        .executor = btx_workspace_executor(workspace),
    };
    const float *x_end = run.x + linear->num_layers * rows * product->in_dim;
    const float *out_end = run.out + linear->num_layers * rows * product->out_dim;
    if (run.x < out_end && run.out < x_end)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "x and out share memory; pass an out of its own");
    status = prepare_run(&run, workspace, error);
    if (status == BTX_OK)
        status = btx_workspace_run(workspace, num_units(&run), linear_unit, &run, error);
    return status;
}
