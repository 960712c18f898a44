/* processor.c - the Cache Processor: packed weights, and one boundary as a sequence of backend calls.
 *
 *     for every unit, some layers of some steps                   stage
 *       attention_mass                                            mass
 *       top_k                        -> positions                 top_k
 *       gather_kv, normed            -> x [rows, C]               gather
 *       in_proj                      -> u [rows, D]               processor
 *       rms_norm, qkv, attention, o_proj    (u += ...)
 *       rms_norm, gate_up with swiglu, down_proj (u += ...)
 *       out_proj                     -> delta [rows, C]
 *       stage_kv, gated              -> staged [rows, C]
 *     then, when everything is staged and finite, or of each step within the boundary's max_relative_edit
 *       write_kv                                                  write
 *
 * Where there are fewer units than threads would like, the mass comes first, its KV heads units of their own.
 *
 * This file names no backend. arXiv 2505.16950, section 3; the arithmetic is stated in docs/processor.md. */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "half.h"
#include "internal.h"

/* The products of one layer. Those of one input are merged: q, k, v; gate, up. */
enum { IN_PROJ, QKV_PROJ, O_PROJ, GATE_UP_PROJ, DOWN_PROJ, OUT_PROJ, NUM_LINEARS };

struct btx_processor {
    const btx_backend *backend;
    int32_t device_index;
    btx_config config;
    float *rope_inv_freq; /* Owned: config's, [head_dim / 2]; NULL where keys stay rotated */
    btx_linear linear[NUM_LINEARS];
    /* The backend's memory, owned: packed products, biases, norms, gates and inverse frequencies. */
    void *memory;
    size_t bytes;
    float *input_norm; /* [num_layers, C] */
    float *attn_norm;  /* [num_layers, D] */
    float *mlp_norm;   /* [num_layers, D] */
    float *gate;       /* [num_layers], sigmoid applied */
    float *inv_freq;   /* [head_dim / 2], NULL where keys stay rotated */
};

static const char *const weight_names[BTX_NUM_WEIGHTS] = {
    "input_norm.weight", "in_proj.weight",   "in_proj.bias",   "attn_norm.weight",
    "q_proj.weight",     "q_proj.bias",      "k_proj.weight",  "k_proj.bias",
    "v_proj.weight",     "v_proj.bias",      "o_proj.weight",  "o_proj.bias",
    "mlp_norm.weight",   "gate_proj.weight", "up_proj.weight", "down_proj.weight",
    "out_proj.weight",   "out_proj.bias",    "gate",
};

static const char *const stage_names[BTX_NUM_STAGES] = {"mass", "top_k", "gather", "processor", "write"};

const char *btx_weight_name(btx_weight weight)
{
    return weight_names[weight];
}

const char *btx_stage_name(btx_stage stage)
{
    return stage_names[stage];
}

static int64_t smaller(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t larger(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

static int64_t kv_width(const btx_config *config)
{
    return 2 * (int64_t)config->num_kv_heads * config->head_dim;
}

int32_t btx_weight_shape(const btx_config *config, btx_weight weight, int64_t shape[2])
{
    int64_t C = kv_width(config), D = config->processor_dim, F = config->processor_mlp_dim;
    int64_t out = D, in = 0; /* in == 0: a vector */
    switch (weight) {
    case BTX_GATE:
    case BTX_NUM_WEIGHTS:
        return 0;
    case BTX_INPUT_NORM_WEIGHT:
    case BTX_OUT_PROJ_BIAS:
        out = C;
        break;
    case BTX_IN_PROJ_WEIGHT:
        in = C;
        break;
    case BTX_Q_PROJ_WEIGHT:
    case BTX_K_PROJ_WEIGHT:
    case BTX_V_PROJ_WEIGHT:
    case BTX_O_PROJ_WEIGHT:
        in = D;
        break;
    case BTX_GATE_PROJ_WEIGHT:
    case BTX_UP_PROJ_WEIGHT:
        out = F, in = D;
        break;
    case BTX_DOWN_PROJ_WEIGHT:
        in = F;
        break;
    case BTX_OUT_PROJ_WEIGHT:
        out = C, in = D;
        break;
    case BTX_IN_PROJ_BIAS:
    case BTX_ATTN_NORM_WEIGHT:
    case BTX_Q_PROJ_BIAS:
    case BTX_K_PROJ_BIAS:
    case BTX_V_PROJ_BIAS:
    case BTX_O_PROJ_BIAS:
    case BTX_MLP_NORM_WEIGHT:
        break;
    }
    shape[0] = out;
    if (in == 0)
        return 1;
    shape[1] = in;
    return 2;
}

static btx_status check_range(const char *name, int64_t value, int64_t low, int64_t high, btx_error *error)
{
    if (value < low || value > high)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "%s is %" PRId64 "; it must be %" PRId64 " to %" PRId64, name,
                        value, low, high);
    return BTX_OK;
}

btx_status btx_config_check(const btx_config *config, btx_error *error)
{
    const struct {
        const char *name;
        int64_t value, low, high;
    } ranges[] = {
        {"num_layers", config->num_layers, 1, 4096},
        {"num_kv_heads", config->num_kv_heads, 1, 4096},
        {"num_query_heads", config->num_query_heads, 1, 65536},
        {"head_dim", config->head_dim, 1, 4096},
        {"processor_dim", config->processor_dim, 1, 65536},
        {"processor_heads", config->processor_heads, 1, 65536},
        {"processor_mlp_dim", config->processor_mlp_dim, 1, 1 << 20},
        {"top_k", config->top_k, 0, BTX_MAX_TOP_K},
        {"recent_window", config->recent_window, 1, BTX_MAX_RECENT_WINDOW},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        btx_status status = check_range(ranges[i].name, ranges[i].value, ranges[i].low, ranges[i].high, error);
        if (status != BTX_OK)
            return status;
    }
    if (config->num_query_heads % config->num_kv_heads != 0)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "num_query_heads %d is not a multiple of num_kv_heads %d",
                        (int)config->num_query_heads, (int)config->num_kv_heads);
    if (config->processor_dim % config->processor_heads != 0)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "processor_dim %d is not a multiple of processor_heads %d",
                        (int)config->processor_dim, (int)config->processor_heads);
    if (!(config->norm_eps > 0.0f) || !isfinite(config->norm_eps))
        return btx_fail(error, BTX_INVALID_ARGUMENT, "norm_eps is %g; it must be positive and finite",
                        (double)config->norm_eps);
    if (config->weight_dtype != BTX_F32 && config->weight_dtype != BTX_BF16)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "weight_dtype is %s; it must be float32 or bfloat16",
                        btx_dtype_name(config->weight_dtype));
    if (config->key_space == BTX_KEYS_ROTATED)
        return BTX_OK;
    if (config->key_space != BTX_KEYS_UNROTATED)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "key_space is %d; it must be rotated or unrotated",
                        (int)config->key_space);
    if (config->head_dim % 2 != 0 || config->rope_inv_freq == NULL)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "unrotated keys need an even head_dim (it is %d) and rope_inv_freq", (int)config->head_dim);
    for (int32_t i = 0; i < config->head_dim / 2; i++) {
        if (!isfinite(config->rope_inv_freq[i]))
            return btx_fail(error, BTX_INVALID_ARGUMENT, "rope_inv_freq[%d] is not finite", (int)i);
    }
    return BTX_OK;
}

static float read_element(const btx_tensor *tensor, int64_t element)
{
    if (tensor->dtype == BTX_F32)
        return ((const float *)tensor->data)[element];
    uint16_t half = ((const uint16_t *)tensor->data)[element];
    return tensor->dtype == BTX_BF16 ? btx_bf16_to_f32(half) : btx_f16_to_f32(half);
}

/* "[16, 32]", or "[]" for a scalar. */
static void format_shape(int32_t num_dims, const int64_t *shape, char *out, size_t size)
{
    size_t used = (size_t)snprintf(out, size, "[");
    for (int32_t d = 0; d < num_dims && used < size; d++)
        used += (size_t)snprintf(out + used, size - used, d ? ", %" PRId64 : "%" PRId64, shape[d]);
    if (used < size)
        snprintf(out + used, size - used, "]");
}

/* One checkpoint tensor as f32, row-major, checked. */
static btx_status read_weight(const btx_config *config, const btx_tensor *weights, int32_t layer, btx_weight weight,
                              float *out, btx_error *error)
{
    const btx_tensor *tensor = &weights[(int64_t)layer * BTX_NUM_WEIGHTS + weight];
    int64_t shape[2] = {1, 1};
    int32_t num_dims = btx_weight_shape(config, weight, shape);
    if (tensor->dtype != BTX_F32 && tensor->dtype != BTX_F16 && tensor->dtype != BTX_BF16)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "tensor layers.%d.%s is %s; it must be float32, float16 or bfloat16", (int)layer,
                        weight_names[weight], btx_dtype_name(tensor->dtype));
    if (tensor->device.type != BTX_CPU || tensor->data == NULL)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "tensor layers.%d.%s is missing or not on the CPU", (int)layer,
                        weight_names[weight]);
    int matches = tensor->num_dims == num_dims;
    for (int32_t d = 0; matches && d < num_dims; d++)
        matches = tensor->shape[d] == shape[d];
    if (!matches) {
        char is[96], must[96];
        format_shape(tensor->num_dims, tensor->shape, is, sizeof is);
        format_shape(num_dims, shape, must, sizeof must);
        return btx_fail(error, BTX_INVALID_ARGUMENT, "tensor layers.%d.%s has the wrong shape %s; it must be %s",
                        (int)layer, weight_names[weight], is, must);
    }
    int64_t row_stride = num_dims == 2 ? tensor->stride[0] : 0;
    int64_t column_stride = num_dims == 2 ? tensor->stride[1] : num_dims == 1 ? tensor->stride[0] : 0;
    int64_t rows = num_dims == 2 ? shape[0] : 1, columns = num_dims == 2 ? shape[1] : shape[0];
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t c = 0; c < columns; c++) {
            float value = read_element(tensor, r * row_stride + c * column_stride);
            if (!isfinite(value))
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "tensor layers.%d.%s holds %g at [%" PRId64 ", %" PRId64 "]; weights must be finite",
                                (int)layer, weight_names[weight], (double)value, r, c);
            *out++ = value;
        }
    }
    return BTX_OK;
}

/* Which checkpoint tensors make up a product, stacked along its output. */
static const struct {
    int32_t num_parts;
    btx_weight weight[3];
    btx_weight bias[3]; /* BTX_NUM_WEIGHTS: none */
} products[NUM_LINEARS] = {
    [IN_PROJ] = {1, {BTX_IN_PROJ_WEIGHT}, {BTX_IN_PROJ_BIAS}},
    [QKV_PROJ] = {3,
                  {BTX_Q_PROJ_WEIGHT, BTX_K_PROJ_WEIGHT, BTX_V_PROJ_WEIGHT},
                  {BTX_Q_PROJ_BIAS, BTX_K_PROJ_BIAS, BTX_V_PROJ_BIAS}},
    [O_PROJ] = {1, {BTX_O_PROJ_WEIGHT}, {BTX_O_PROJ_BIAS}},
    [GATE_UP_PROJ] = {2, {BTX_GATE_PROJ_WEIGHT, BTX_UP_PROJ_WEIGHT}, {BTX_NUM_WEIGHTS, BTX_NUM_WEIGHTS}},
    [DOWN_PROJ] = {1, {BTX_DOWN_PROJ_WEIGHT}, {BTX_NUM_WEIGHTS}},
    [OUT_PROJ] = {1, {BTX_OUT_PROJ_WEIGHT}, {BTX_OUT_PROJ_BIAS}},
};

/* Sizes of everything the processor keeps; fills in the products and the offsets. */
static btx_status lay_out_weights(btx_processor *processor, size_t packed_offset[NUM_LINEARS],
                                  size_t bias_offset[NUM_LINEARS], size_t vector_offset[5], btx_error *error)
{
    const btx_config *config = &processor->config;
    size_t total = 0, layer_bytes = 0, weights_at = 0;
    int fits = 1;
    /* The products of a layer lie one behind the other, in the order of their use: linear.c fetches ahead. */
    for (int32_t p = 0; p < NUM_LINEARS; p++) {
        btx_linear *linear = &processor->linear[p];
        int64_t shape[2] = {0, 0};
        btx_weight_shape(config, products[p].weight[0], shape);
        linear->out_dim = products[p].num_parts * shape[0];
        linear->in_dim = shape[1];
        linear->dtype = config->weight_dtype;
        linear->gated = p == GATE_UP_PROJ;
        size_t bytes = processor->backend->packed_bytes(linear->out_dim, linear->in_dim, linear->dtype, linear->gated);
        fits = fits && btx_reserve(&layer_bytes, &packed_offset[p], 1, bytes);
    }
    fits = fits && btx_reserve(&total, &weights_at, config->num_layers, layer_bytes);
    for (int32_t p = 0; p < NUM_LINEARS; p++) {
        btx_linear *linear = &processor->linear[p];
        linear->layer_stride = layer_bytes;
        if (products[p].bias[0] != BTX_NUM_WEIGHTS)
            fits = fits && btx_reserve(&total, &bias_offset[p], config->num_layers * linear->out_dim, sizeof(float));
    }
    const int64_t lengths[5] = {config->num_layers * kv_width(config),
                                (int64_t)config->num_layers * config->processor_dim,
                                (int64_t)config->num_layers * config->processor_dim, config->num_layers,
                                config->rope_inv_freq != NULL ? config->head_dim / 2 : 0};
    for (int32_t i = 0; i < 5; i++)
        fits = fits && btx_reserve(&total, &vector_offset[i], lengths[i], sizeof(float));
    if (!fits)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "the Processor's weights exceed the address space");
    processor->bytes = total;
    return BTX_OK;
}

/* Where something in the backend's memory lies in its image on the host. */
static void *in_image(const btx_processor *processor, char *image, const void *place)
{
    return image + ((const char *)place - (const char *)processor->memory);
}

static btx_status pack_layer(const btx_processor *processor, const btx_tensor *weights, int32_t layer, float *unpacked,
                             char *image, btx_error *error)
{
    const btx_config *config = &processor->config;
    const int64_t C = kv_width(config), D = config->processor_dim;
    btx_status status = BTX_OK;
    for (int32_t p = 0; p < NUM_LINEARS && status == BTX_OK; p++) {
        const btx_linear *linear = &processor->linear[p];
        const int64_t part_rows = linear->out_dim / products[p].num_parts;
        for (int32_t part = 0; part < products[p].num_parts && status == BTX_OK; part++) {
            status = read_weight(config, weights, layer, products[p].weight[part],
                                 unpacked + part * part_rows * linear->in_dim, error);
            if (status == BTX_OK && products[p].bias[part] != BTX_NUM_WEIGHTS)
                status = read_weight(config, weights, layer, products[p].bias[part],
                                     (float *)in_image(processor, image, linear->bias) + layer * linear->out_dim +
                                         part * part_rows,
                                     error);
        }
        if (status == BTX_OK)
            processor->backend->pack(unpacked, linear->out_dim, linear->in_dim, linear->dtype, linear->gated,
                                     (char *)in_image(processor, image, linear->packed) +
                                         (size_t)layer * linear->layer_stride);
    }
    const struct {
        btx_weight weight;
        const float *place;
        int64_t size;
    } vectors[] = {
        {BTX_INPUT_NORM_WEIGHT, processor->input_norm, C},
        {BTX_ATTN_NORM_WEIGHT, processor->attn_norm, D},
        {BTX_MLP_NORM_WEIGHT, processor->mlp_norm, D},
        {BTX_GATE, processor->gate, 1},
    };
    for (size_t v = 0; v < sizeof vectors / sizeof *vectors && status == BTX_OK; v++) {
        float *to = (float *)in_image(processor, image, vectors[v].place) + layer * vectors[v].size;
        status = read_weight(config, weights, layer, vectors[v].weight, to, error);
        if (status == BTX_OK && vectors[v].weight == BTX_GATE)
            *to = 1.0f / (1.0f + expf(-*to));
    }
    return status;
}

/* Packs all layers into the backend's memory. */
static btx_status pack_weights(const btx_processor *processor, const btx_tensor *weights, btx_error *error)
{
    const btx_config *config = &processor->config;
    const btx_backend *backend = processor->backend;
    int64_t largest = 0;
    btx_status status = BTX_OK;
    for (int32_t p = 0; p < NUM_LINEARS; p++)
        largest = larger(largest, processor->linear[p].out_dim * processor->linear[p].in_dim);
    float *unpacked = malloc((size_t)largest * sizeof *unpacked);
    char *image = backend->upload == NULL ? processor->memory : calloc(1, processor->bytes);
    if (unpacked == NULL || image == NULL)
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for packing %zu bytes of weights", processor->bytes);
    for (int32_t layer = 0; layer < config->num_layers && status == BTX_OK; layer++)
        status = pack_layer(processor, weights, layer, unpacked, image, error);
    if (status == BTX_OK && processor->inv_freq != NULL)
        memcpy(in_image(processor, image, processor->inv_freq), processor->rope_inv_freq,
               sizeof(float) * (size_t)(config->head_dim / 2));
    if (status == BTX_OK && backend->upload != NULL)
        status = backend->upload(processor->device_index, processor->memory, image, processor->bytes, error);
    free(unpacked);
    if (backend->upload != NULL)
        free(image);
    return status;
}

/* config and, where it has them, inverse frequencies of the processor's own. */
static btx_status copy_config(btx_processor *processor, const btx_config *config, btx_error *error)
{
    processor->config = *config;
    processor->config.rope_inv_freq = NULL;
    if (config->key_space == BTX_KEYS_ROTATED)
        return BTX_OK;
    const size_t bytes = sizeof(float) * (size_t)(config->head_dim / 2);
    processor->rope_inv_freq = malloc(bytes);
    if (processor->rope_inv_freq == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a Processor");
    memcpy(processor->rope_inv_freq, config->rope_inv_freq, bytes);
    processor->config.rope_inv_freq = processor->rope_inv_freq;
    return BTX_OK;
}

btx_status btx_processor_create(const btx_backend *backend, int32_t device_index, const btx_config *config,
                                const btx_tensor *weights, btx_processor **processor, btx_error *error)
{
    size_t packed_offset[NUM_LINEARS] = {0}, bias_offset[NUM_LINEARS] = {0}, vector_offset[5] = {0};
    *processor = NULL;
    btx_status status = btx_backend_check(backend, error);
    if (status == BTX_OK)
        status = btx_config_check(config, error);
    if (status != BTX_OK)
        return status;
    btx_processor *created = calloc(1, sizeof *created);
    if (created == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a Processor");
    created->backend = backend;
    created->device_index = device_index;
    status = copy_config(created, config, error);
    if (status == BTX_OK)
        status = lay_out_weights(created, packed_offset, bias_offset, vector_offset, error);
    if (status == BTX_OK)
        status = backend->allocate(device_index, created->bytes, &created->memory, error);
    if (status != BTX_OK)
        goto cleanup;

    char *memory = created->memory;
    for (int32_t p = 0; p < NUM_LINEARS; p++) {
        btx_linear *linear = &created->linear[p];
        linear->packed = memory + packed_offset[p];
        linear->bias = products[p].bias[0] != BTX_NUM_WEIGHTS ? (float *)(memory + bias_offset[p]) : NULL;
    }
    created->input_norm = (float *)(memory + vector_offset[0]);
    created->attn_norm = (float *)(memory + vector_offset[1]);
    created->mlp_norm = (float *)(memory + vector_offset[2]);
    created->gate = (float *)(memory + vector_offset[3]);
    created->inv_freq = created->rope_inv_freq != NULL ? (float *)(memory + vector_offset[4]) : NULL;
    status = pack_weights(created, weights, error);

cleanup:
    if (status != BTX_OK) {
        btx_processor_destroy(created);
        created = NULL;
    }
    *processor = created;
    return status;
}

void btx_processor_destroy(btx_processor *processor)
{
    if (processor == NULL)
        return;
    processor->backend->release(processor->memory);
    free(processor->rope_inv_freq);
    free(processor);
}

const btx_config *btx_processor_config(const btx_processor *processor)
{
    return &processor->config;
}

const btx_backend *btx_processor_backend(const btx_processor *processor)
{
    return processor->backend;
}

int32_t btx_processor_device_index(const btx_processor *processor)
{
    return processor->device_index;
}

size_t btx_processor_bytes(const btx_processor *processor)
{
    return processor->bytes;
}

/* ---- one boundary --------------------------------------------------------------------------------- */

/* Buffers of one lane, for one unit. work: normed KV-tokens, then qkv, then the operand of DOWN_PROJ, then delta; one
 * is dead when the next is written. operand: what the products of width D take. */
typedef struct lane_layout {
    size_t mass, x, operand, u, work, scratch, bytes;
} lane_layout;

typedef struct boundary_run {
    const btx_processor *processor; /* NULL: attention mass alone */
    const btx_backend *backend;
    const btx_plan *plan;
    void *executor;
    int32_t num_lanes;
    int32_t layers_per_unit;
    int64_t num_chunks;   /* of steps; a unit is one of them for layers_per_unit layers */
    int64_t *chunk_begin; /* [num_chunks + 1], steps. Owned. */
    int32_t num_parts;    /* of the mass, a KV head each, or 1 */
    int mass_is_apart;    /* its parts are units of their own, before all others */
    int wants_norms;
    lane_layout layout;
    char *lanes;                  /* [num_lanes] of layout.bytes */
    int32_t layers_per_selection; /* where the rows of all layers are selected before any is staged; else 0 */
    char *selection;              /* mass of so many layers, then scratch; shares its memory with staged */
    size_t selection_scratch;
    float *mass;            /* [num_layers, num_chunks][num_parts, prior of the chunk] where mass_is_apart */
    int32_t *positions;     /* [num_layers, total_rows] */
    float *delta_norm;      /* [num_layers, num_steps] */
    float *row_norm;        /* [num_layers, num_steps] */
    char *staged;           /* [num_layers, total_rows, C] in the cache's dtype */
    double *seconds;        /* [num_lanes, BTX_NUM_STAGES]. Owned. */
    unsigned char *skipped; /* [num_steps], the plan's. Owned; NULL where it is not the host that decides. */
    char *fetched;          /* a device's results for the host: positions up to staged. Owned, or NULL. */
    const btx_tensor *mass_out;
} boundary_run;

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

/* Adds the time since *since to a stage and starts the next. */
static void charge(boundary_run *run, int32_t lane, btx_stage stage, double *since)
{
    double time = now();
    if (run->backend->mark != NULL)
        run->backend->mark(run->executor, stage);
    run->seconds[(int64_t)lane * BTX_NUM_STAGES + stage] += time - *since;
    *since = time;
}

static int64_t num_units(const boundary_run *run)
{
    return (run->plan->num_layers + run->layers_per_unit - 1) / run->layers_per_unit * run->num_chunks;
}

static int64_t num_selections(const boundary_run *run)
{
    return (run->plan->num_layers + run->layers_per_selection - 1) / run->layers_per_selection;
}

/* Units of one layer are neighbours, so that lanes share its weights. */
static btx_pass make_pass(const boundary_run *run, int64_t unit, int32_t lane)
{
    int64_t chunk = unit % run->num_chunks;
    int32_t layer_begin = (int32_t)(unit / run->num_chunks) * run->layers_per_unit;
    int32_t layer_end = layer_begin + run->layers_per_unit;
    return (btx_pass){
        .plan = run->plan,
        .layer_begin = layer_begin,
        .layer_end = layer_end < run->plan->num_layers ? layer_end : run->plan->num_layers,
        .step_begin = run->chunk_begin[chunk],
        .step_end = run->chunk_begin[chunk + 1],
        .executor = run->executor,
        .scratch = run->lanes + (size_t)lane * run->layout.bytes + run->layout.scratch,
    };
}

/* Where a pass's rows begin among all: a pass is of one layer, or of all steps. */
static int64_t first_row(const btx_pass *pass)
{
    return pass->layer_begin * pass->plan->total_rows + pass->plan->steps[pass->step_begin].row_offset;
}

/* Where the mass of a pass goes: into the lane, or, apart, among all. */
static float *mass_of_pass(const boundary_run *run, const btx_pass *pass, int32_t lane)
{
    const btx_plan *plan = run->plan;
    if (!run->mass_is_apart)
        return (float *)(run->lanes + (size_t)lane * run->layout.bytes + run->layout.mass);
    return run->mass +
           (pass->layer_begin * plan->total_prior + plan->steps[pass->step_begin].prior_offset) * run->num_parts;
}

/* The mass of one unit, all of it. */
static btx_status measure_mass(const boundary_run *run, const btx_pass *pass, int32_t lane, btx_error *error)
{
    return run->backend->attention_mass(pass, 0, run->plan->num_kv_heads, mass_of_pass(run, pass, lane), error);
}

/* One part of the mass of one unit: units of the run of their own. */
static btx_status mass_part(void *context, int64_t index, int32_t lane, btx_error *error)
{
    boundary_run *run = context;
    btx_pass pass = make_pass(run, index / run->num_parts, lane);
    double since = now();
    const int32_t part = (int32_t)(index % run->num_parts);
    btx_status status = run->backend->attention_mass(
        &pass, part, part + 1, mass_of_pass(run, &pass, lane) + part * btx_pass_prior(&pass), error);
    charge(run, lane, BTX_STAGE_MASS, &since);
    return status;
}

static btx_status process_rows(const boundary_run *run, const btx_pass *pass, char *lane, btx_error *error)
{
    const btx_processor *processor = run->processor;
    const btx_backend *backend = run->backend;
    const btx_config *config = &processor->config;
    const btx_linear *linear = processor->linear;
    const btx_dtype dtype = config->weight_dtype;
    const lane_layout *layout = &run->layout;
    const int64_t C = kv_width(config), D = config->processor_dim;
    const float *x = backend->keeps_rows ? (float *)(lane + layout->x) : NULL;
    float *u = (float *)(lane + layout->u);
    void *work = lane + layout->work;
    void *operand = lane + layout->operand;
    const float eps = config->norm_eps;
    const int64_t row = first_row(pass), norm = pass->layer_begin * run->plan->num_steps + pass->step_begin;
    btx_status status = backend->linear(pass, &linear[IN_PROJ], work, 0, u, error);

    if (status == BTX_OK)
        status = backend->rms_norm(pass, u, D, processor->attn_norm, eps, dtype, operand, error);
    if (status == BTX_OK)
        status = backend->linear(pass, &linear[QKV_PROJ], operand, 0, work, error);
    if (status == BTX_OK)
        status = backend->attention(pass, work, D, config->processor_heads, dtype, operand, error);
    if (status == BTX_OK)
        status = backend->linear(pass, &linear[O_PROJ], operand, 1, u, error);

    if (status == BTX_OK)
        status = backend->rms_norm(pass, u, D, processor->mlp_norm, eps, dtype, operand, error);
    if (status == BTX_OK)
        status = backend->linear_swiglu(pass, &linear[GATE_UP_PROJ], operand, work, error);
    if (status == BTX_OK)
        status = backend->linear(pass, &linear[DOWN_PROJ], work, 1, u, error);

    if (status == BTX_OK)
        status = backend->round(pass, u, D, dtype, operand, error);
    if (status == BTX_OK)
        status = backend->linear(pass, &linear[OUT_PROJ], operand, 0, work, error);
    if (status == BTX_OK)
        status = backend->stage_kv(pass, run->positions + row, processor->gate, x, work,
                                   run->staged + row * C * (int64_t)btx_dtype_size(run->plan->keys[0].dtype),
                                   run->wants_norms ? run->delta_norm + norm : NULL,
                                   run->wants_norms ? run->row_norm + norm : NULL, error);
    return status;
}

/* Mass and top-k of one run of layers and all steps. */
static btx_status select_rows(void *context, int64_t unit, int32_t lane, btx_error *error)
{
    boundary_run *run = context;
    const btx_plan *plan = run->plan;
    const int32_t layer_begin = (int32_t)unit * run->layers_per_selection;
    const int32_t layer_end = layer_begin + run->layers_per_selection;
    const btx_pass pass = {
        .plan = plan,
        .layer_begin = layer_begin,
        .layer_end = layer_end < plan->num_layers ? layer_end : plan->num_layers,
        .step_end = plan->num_steps,
        .executor = run->executor,
        .scratch = run->selection + run->selection_scratch,
    };
    float *mass = (float *)(void *)run->selection;
    double since = now();
    btx_status status = BTX_OK;
    if (run->processor->config.top_k > 0)
        status = run->backend->attention_mass(&pass, 0, plan->num_kv_heads, mass, error);
    charge(run, lane, BTX_STAGE_MASS, &since);
    if (status == BTX_OK)
        status = run->backend->top_k(&pass, run->num_parts, mass, run->positions + first_row(&pass), error);
    charge(run, lane, BTX_STAGE_TOP_K, &since);
    return status;
}

/* Stages one unit: everything but the write. */
static btx_status stage_unit(void *context, int64_t unit, int32_t lane_index, btx_error *error)
{
    boundary_run *run = context;
    const btx_processor *processor = run->processor;
    btx_pass pass = make_pass(run, unit, lane_index);
    char *lane = run->lanes + (size_t)lane_index * run->layout.bytes;
    float *rows = run->backend->keeps_rows ? (float *)(lane + run->layout.x) : NULL;
    int32_t *positions = run->positions + first_row(&pass);
    double since = now();

    btx_status status = BTX_OK;
    if (run->layers_per_selection == 0) {
        if (processor->config.top_k > 0 && !run->mass_is_apart)
            status = measure_mass(run, &pass, lane_index, error);
        charge(run, lane_index, BTX_STAGE_MASS, &since);
        if (status == BTX_OK)
            status = run->backend->top_k(&pass, run->num_parts, mass_of_pass(run, &pass, lane_index), positions, error);
        charge(run, lane_index, BTX_STAGE_TOP_K, &since);
    }
    if (status == BTX_OK)
        status = run->backend->gather_kv(&pass, positions, rows, processor->input_norm, processor->config.norm_eps,
                                         processor->config.weight_dtype, lane + run->layout.work, error);
    charge(run, lane_index, BTX_STAGE_GATHER, &since);
    if (status == BTX_OK)
        status = process_rows(run, &pass, lane, error);
    charge(run, lane_index, BTX_STAGE_PROCESSOR, &since);
    return status;
}

static btx_status write_unit(void *context, int64_t unit, int32_t lane, btx_error *error)
{
    boundary_run *run = context;
    btx_pass pass = make_pass(run, unit, lane);
    if (run->layers_per_selection > 0) /* one launch for all layers */
        pass.layer_begin = 0, pass.layer_end = run->plan->num_layers;
    int64_t row = first_row(&pass), row_bytes = kv_width(&run->processor->config);
    row_bytes *= (int64_t)btx_dtype_size(run->plan->keys[0].dtype);
    double since = now();
    btx_status status = run->backend->write_kv(&pass, run->positions + row, run->staged + row * row_bytes, error);
    charge(run, lane, BTX_STAGE_WRITE, &since);
    return status;
}

/* Cuts the steps into chunks of about rows_per_pass rows, and fills in chunk_begin when there is room for it. */
static void cut_chunks(boundary_run *run)
{
    const btx_plan *plan = run->plan;
    const int64_t limit = run->backend->layers_per_pass > 0 ? run->backend->rows_per_pass : 0;
    const int64_t top_k = run->processor != NULL ? run->processor->config.top_k : 0;
    int64_t rows = 0;
    run->num_chunks = 0;
    for (int64_t s = 0; s < plan->num_steps; s++) {
        /* As many rows as without a top_k of its own: a chunk's prior positions are bounded by its rows. */
        int64_t more = smaller(top_k, plan->steps[s].num_prior) + plan->steps[s].num_window;
        if (s == 0 || (limit > 0 && rows + more > limit)) {
            if (run->chunk_begin != NULL)
                run->chunk_begin[run->num_chunks] = s;
            run->num_chunks++;
            rows = 0;
        }
        rows += more;
    }
    if (run->chunk_begin != NULL)
        run->chunk_begin[run->num_chunks] = plan->num_steps;
}

/* Positions as memory is laid out for them: in steps of a quarter at most, or a sequence that grows would want more
 * memory, and all of it anew, at nearly each of its boundaries. */
static int64_t round_positions(int64_t positions)
{
    int64_t unit = 1;
    while (8 * unit <= positions)
        unit *= 2;
    return (positions + unit - 1) / unit * unit;
}

/* What the memory of a run depends on. It grows with each of these and depends on nothing else, so that it can be
 * planned: the largest boundary needs the most. For that it is here and there a little more than a boundary uses; of
 * max_positions it sees round_positions alone. */
typedef struct run_size {
    int64_t num_steps;
    int64_t total_rows;
    int64_t max_rows;      /* of a step: recalled and window */
    int64_t max_window;    /* of a step */
    int64_t max_positions; /* of a step: prior and window */
    int64_t row_limit;     /* what max_rows can be: decides on the layers of a unit */
} run_size;

/* Where the buffers of a run begin in the workspace. */
typedef struct run_layout {
    size_t lanes, mass, positions, delta_norm, row_norm, staged, bytes;
} run_layout;

static run_size size_of_plan(const btx_plan *plan, const btx_config *config)
{
    run_size size = {.num_steps = plan->num_steps, .total_rows = plan->total_rows};
    for (int64_t s = 0; s < plan->num_steps; s++) {
        const btx_plan_step *step = &plan->steps[s];
        size.max_rows = larger(size.max_rows, step->num_recalled + step->num_window);
        size.max_window = larger(size.max_window, step->num_window);
        size.max_positions = larger(size.max_positions, step->num_prior + step->num_window);
    }
    size.row_limit = config != NULL ? (int64_t)config->recent_window + config->top_k : size.max_window;
    return size;
}

/* The work is split by KV heads too where units are few. The results do not depend on it: parts are single heads, and
 * their sum has one order. Attention mass alone always is: all of it is known before any is stored. */
static int is_split(const boundary_run *run, int64_t units)
{
    const btx_processor *processor = run->processor;
    if (run->backend->layers_per_pass == 0)
        return 0;
    return processor == NULL ||
           (units < 4 * (int64_t)run->num_lanes && processor->config.top_k > 0 && processor->config.num_kv_heads > 1);
}

/* Layers of a unit when num_steps steps end. */
static int64_t layers_of_unit(const boundary_run *run, int64_t num_steps, int64_t row_limit)
{
    const btx_backend *backend = run->backend;
    if (backend->layers_per_pass > 0)
        return backend->layers_per_pass;
    return smaller(run->plan->num_layers, larger(1, backend->rows_per_pass / larger(1, num_steps * row_limit)));
}

/* Steps times layers of a unit, at most, when up to num_steps steps end: the fewer end, the more layers are taken. */
static int64_t largest_unit(const boundary_run *run, int64_t num_steps, int64_t row_limit)
{
    int64_t largest = 0;
    for (int64_t s = 1; s <= num_steps; s++)
        largest = larger(largest, s * layers_of_unit(run, s, row_limit));
    return largest;
}

/* Reserves memory that holds now the one, now the other. */
static int reserve_shared(size_t *bytes, size_t *at, int64_t count, size_t size, size_t other_bytes)
{
    size_t other = *bytes;
    if (!btx_reserve(bytes, at, count, size) || !btx_reserve(&other, at, 1, other_bytes))
        return 0;
    *bytes = other > *bytes ? other : *bytes;
    return 1;
}

/* Memory to select the rows of so many steps times layers. longest: of one step, as large as any. */
static int reserve_selection(const boundary_run *run, const btx_plan *longest, int64_t steps, size_t *scratch_at,
                             size_t *bytes)
{
    const btx_config *config = &run->processor->config;
    const int64_t prior = config->top_k > 0 ? steps * longest->steps->num_prior : 0;
    const int64_t parts = run->backend->mass_by_head ? run->plan->num_kv_heads : 1;
    size_t mass_at;
    *bytes = 0;
    return btx_reserve(bytes, &mass_at, prior * parts, sizeof(float)) &&
           btx_reserve(
               bytes, scratch_at, 1,
               run->backend->scratch_bytes(longest, 1, steps * longest->steps->num_window, config->processor_dim));
}

/* Lays out lanes and staged results for a run of this size; without a Processor for attention mass alone. 0 where they
 * exceed the address space. Of the plan it reads the backbone's shape alone. */
static int lay_out(boundary_run *run, const run_size *size, btx_dtype cache_dtype, run_layout *out)
{
    const btx_plan *plan = run->plan;
    const btx_backend *backend = run->backend;
    const btx_config *config = run->processor != NULL ? &run->processor->config : NULL;
    const btx_dtype dtype = config != NULL ? config->weight_dtype : BTX_F32;
    const size_t C = config != NULL ? (size_t)kv_width(config) : 0,
                 D = config != NULL ? (size_t)config->processor_dim : 0;
    const size_t F = config != NULL ? (size_t)config->processor_mlp_dim : 0;
    const int64_t limit = backend->rows_per_pass, top_k = config != NULL ? config->top_k : 0;
    const int64_t mass_parts = backend->mass_by_head ? plan->num_kv_heads : 1;
    /* With a Processor the rows of a device's unit are bounded, without one the prior positions. */
    const int64_t rows_of_step = config != NULL ? size->max_rows : size->row_limit;
    const int64_t max_positions = round_positions(size->max_positions);
    run->layers_per_unit = (int32_t)layers_of_unit(run, size->num_steps, rows_of_step);

    /* A chunk is a single step, or has at most limit rows: steps with more than top_k prior positions have top_k + 1
     * rows or more, those with fewer recall them all. */
    int64_t chunk_rows = size->num_steps * size->max_rows, all_prior = size->num_steps * max_positions;
    int64_t chunk_prior = config != NULL && top_k == 0 ? 0 : all_prior;
    if (backend->layers_per_pass > 0 && limit > 0) {
        chunk_rows = smaller(chunk_rows, larger(limit, size->max_rows));
        chunk_prior = smaller(chunk_prior, larger(1, limit / (top_k + 1)) * max_positions + limit);
    }
    /* Of mass in parts, for as many chunks as are still split. */
    int64_t layer_units = (plan->num_layers + run->layers_per_unit - 1) / run->layers_per_unit, split_prior = 0;
    if (config == NULL && is_split(run, layer_units))
        split_prior = all_prior;
    else if (is_split(run, layer_units))
        split_prior = smaller(all_prior, (4 * (int64_t)run->num_lanes - 1) / layer_units * chunk_prior);

    btx_plan_step longest = {.num_prior = max_positions, .num_window = size->max_window};
    btx_plan plan_of_longest = *plan;
    plan_of_longest.steps = &longest;
    plan_of_longest.num_steps = 1;
    /* Of all units that as many steps or fewer make the largest. */
    int64_t max_layers = run->layers_per_unit, rows = max_layers * chunk_rows, prior = max_layers * chunk_prior;
    if (backend->layers_per_pass == 0 && config == NULL) {
        const int64_t steps = largest_unit(run, size->num_steps, size->row_limit);
        max_layers = layers_of_unit(run, 1, size->row_limit);
        rows = steps * size->max_rows;
        prior = steps * max_positions;
        chunk_rows = (rows + max_layers - 1) / max_layers;
    }
    const int64_t all_rows = plan->num_layers * size->total_rows, all_steps = plan->num_layers * size->num_steps;
    lane_layout *lane = &run->layout;
    *lane = (lane_layout){0};
    *out = (run_layout){0};
    /* A device selects the rows of as many layers at once as the memory of what is staged later has room for, but of no
     * fewer than have rows_per_pass rows. */
    size_t selection_bytes = 0;
    if (backend->layers_per_pass == 0 && config != NULL) {
        const int64_t steps = largest_unit(run, size->num_steps, size->row_limit);
        size_t staged = 0, at, bytes;
        if (!btx_reserve(&staged, &at, all_rows, C * btx_dtype_size(cache_dtype)) ||
            !reserve_selection(run, &plan_of_longest, steps, &at, &selection_bytes))
            return 0;
        staged = staged > selection_bytes ? staged : selection_bytes;
        run->layers_per_selection = plan->num_layers + 1;
        longest.num_prior = size->max_positions; /* what is reserved may hold more layers of what there is */
        do {
            run->layers_per_selection--;
            if (!reserve_selection(run, &plan_of_longest, run->layers_per_selection * size->num_steps,
                                   &run->selection_scratch, &bytes))
                bytes = SIZE_MAX;
        } while (bytes > staged && run->layers_per_selection > 1);
        max_layers = 1;
        rows = chunk_rows =
            larger(size->num_steps * size->max_rows,
                   smaller(backend->rows_per_pass, plan->num_layers * size->num_steps * size->max_rows));
        prior = 0; /* nor the scratch of the selection: the lane has none */
        plan_of_longest.num_steps = 0;
    }
    return btx_reserve(&lane->bytes, &lane->mass, prior * mass_parts, sizeof(float)) &&
           btx_reserve(&lane->bytes, &lane->x, backend->keeps_rows ? rows : 0, C * sizeof(float)) &&
           btx_reserve(&lane->bytes, &lane->operand, 1, backend->operand_bytes(rows, (int64_t)D, dtype)) &&
           btx_reserve(&lane->bytes, &lane->u, rows, D * sizeof(float)) &&
           reserve_shared(&lane->bytes, &lane->work, rows, (3 * D > C ? 3 * D : C) * sizeof(float),
                          backend->operand_bytes(rows, (int64_t)(C > F ? C : F), dtype)) &&
           btx_reserve(&lane->bytes, &lane->scratch, 1,
                       backend->scratch_bytes(&plan_of_longest, (int32_t)max_layers, chunk_rows, (int64_t)D)) &&
           btx_reserve(&out->bytes, &out->lanes, run->num_lanes, lane->bytes) &&
           btx_reserve(&out->bytes, &out->mass, plan->num_layers * split_prior,
                       (size_t)plan->num_kv_heads * sizeof(float)) &&
           btx_reserve(&out->bytes, &out->positions, all_rows, sizeof(int32_t)) &&
           btx_reserve(&out->bytes, &out->delta_norm, all_steps, sizeof(float)) &&
           btx_reserve(&out->bytes, &out->row_norm, all_steps, sizeof(float)) &&
           reserve_shared(&out->bytes, &out->staged, all_rows, C * btx_dtype_size(cache_dtype), selection_bytes);
}

/* Makes room in the workspace and cuts the run into units. reports: its results are for the host too. What the run owns
 * is released by end_run, also after a failure. */
static btx_status begin_run(boundary_run *run, btx_workspace *workspace, void *stream, int reports, btx_error *error)
{
    const btx_plan *plan = run->plan;
    const run_size size = size_of_plan(plan, run->processor != NULL ? &run->processor->config : NULL);
    run_layout layout;
    run->executor = btx_workspace_executor(workspace);
    run->num_lanes = btx_workspace_num_threads(workspace);
    run->chunk_begin = malloc(((size_t)plan->num_steps + 1) * sizeof *run->chunk_begin);
    run->seconds = calloc((size_t)run->num_lanes * BTX_NUM_STAGES, sizeof *run->seconds);
    const int judges = plan->max_relative_edit > 0.0f && run->backend->begin == NULL;
    if (judges) /* here, since there must be no want of memory once a step is staged */
        run->skipped = calloc((size_t)plan->num_steps, sizeof *run->skipped);
    if (run->chunk_begin == NULL || run->seconds == NULL || (judges && run->skipped == NULL))
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a boundary of %" PRId64 " steps", plan->num_steps);
    if (!lay_out(run, &size, plan->keys[0].dtype, &layout))
        return btx_fail(error, BTX_OUT_OF_MEMORY, "%" PRId64 " rows exceed the address space; split the call",
                        plan->total_rows);
    btx_status status = btx_workspace_grow(workspace, layout.bytes, &stream, error);
    if (status != BTX_OK)
        return status;
    char *memory = btx_workspace_memory(workspace);
    run->lanes = memory + layout.lanes;
    run->mass = (float *)(memory + layout.mass);
    run->positions = (int32_t *)(memory + layout.positions);
    run->delta_norm = (float *)(memory + layout.delta_norm);
    run->row_norm = (float *)(memory + layout.row_norm);
    run->staged = run->selection = memory + layout.staged;
    cut_chunks(run);
    run->mass_is_apart = plan->total_prior > 0 && is_split(run, num_units(run));
    run->num_parts = run->mass_is_apart || run->backend->mass_by_head ? plan->num_kv_heads : 1;
    if (run->backend->begin == NULL)
        return BTX_OK;
    if (reports) { /* before the write, after which there must be no want of memory */
        run->fetched = malloc(layout.staged - layout.positions);
        if (run->fetched == NULL)
            return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for the report of %" PRId64 " steps",
                            plan->num_steps);
    }
    return run->backend->begin(run->executor, plan, stream, reports, error);
}

static void end_run(boundary_run *run)
{
    free(run->chunk_begin);
    free(run->seconds);
    free(run->skipped);
    free(run->fetched);
}

btx_status btx_processor_workspace_bytes(const btx_processor *processor, int32_t num_threads, int64_t num_sequences,
                                         int64_t max_tokens, btx_dtype cache_dtype, size_t *bytes, btx_error *error)
{
    const btx_config *config = &processor->config;
    btx_status status = check_range("num_threads", num_threads, 1, BTX_MAX_THREADS, error);
    if (status == BTX_OK)
        status = check_range("num_sequences", num_sequences, 1, 65536, error);
    if (status == BTX_OK)
        status = check_range("max_tokens", max_tokens, 1, INT32_MAX, error);
    if (status == BTX_OK && cache_dtype != BTX_F32 && cache_dtype != BTX_F16 && cache_dtype != BTX_BF16)
        status = btx_fail(error, BTX_INVALID_ARGUMENT, "cache_dtype is %s; it must be float32, float16 or bfloat16",
                          btx_dtype_name(cache_dtype));
    if (status != BTX_OK)
        return status;
    const btx_plan plan = {
        .num_layers = config->num_layers,
        .num_kv_heads = config->num_kv_heads,
        .num_query_heads = config->num_query_heads,
        .head_dim = config->head_dim,
    };
    const int64_t rows = smaller((int64_t)config->recent_window + config->top_k, max_tokens);
    const run_size size = {
        .num_steps = num_sequences,
        .total_rows = num_sequences * rows,
        .max_rows = rows,
        .max_window = smaller(config->recent_window, max_tokens),
        .max_positions = max_tokens,
        .row_limit = (int64_t)config->recent_window + config->top_k,
    };
    boundary_run run = {.processor = processor, .backend = processor->backend, .plan = &plan};
    run.num_lanes = processor->backend->layers_per_pass > 0 ? num_threads : 1;
    run_layout layout;
    if (!lay_out(&run, &size, cache_dtype, &layout))
        return btx_fail(error, BTX_OUT_OF_MEMORY,
                        "%" PRId64 " sequences of %" PRId64 " positions exceed the address space; plan for fewer",
                        num_sequences, max_tokens);
    *bytes = layout.bytes;
    return BTX_OK;
}

static btx_status check_report(const btx_report *report, const btx_plan *plan, int32_t top_k, btx_error *error)
{
    const int64_t recalled[3] = {plan->num_layers, plan->num_steps, top_k};
    btx_status status = BTX_OK;
    if (report->recalled.data != NULL)
        status = btx_tensor_check(&report->recalled, "recalled", BTX_I64, 3, recalled, 1, error);
    if (status == BTX_OK && report->delta_norm.data != NULL)
        status = btx_tensor_check(&report->delta_norm, "delta_norm", BTX_F32, 2, recalled, 1, error);
    if (status == BTX_OK && report->row_norm.data != NULL)
        status = btx_tensor_check(&report->row_norm, "row_norm", BTX_F32, 2, recalled, 1, error);
    if (status == BTX_OK && report->skipped.data != NULL)
        status = btx_tensor_check(&report->skipped, "skipped", BTX_I32, 1, &recalled[1], 1, error);
    return status;
}

static void copy_norms(const btx_tensor *out, const float *norms, const btx_plan *plan)
{
    for (int64_t layer = 0; out->data != NULL && layer < plan->num_layers; layer++) {
        for (int64_t step = 0; step < plan->num_steps; step++)
            ((float *)out->data)[layer * out->stride[0] + step * out->stride[1]] =
                norms[layer * plan->num_steps + step];
    }
}

/* Whether a step is not written, for norms [num_layers, num_steps]. */
static int is_skipped(const btx_plan *plan, int64_t step, const float *delta_norm, const float *row_norm)
{
    if (plan->max_relative_edit == 0.0f)
        return 0;
    for (int64_t i = step; i < plan->num_layers * plan->num_steps; i += plan->num_steps) {
        if (!btx_edit_is_within(delta_norm[i], row_norm[i], plan->max_relative_edit))
            return 1;
    }
    return 0;
}

/* results: the run's positions and norms, or the host's copy of them. */
static void fill_report(btx_report *report, const boundary_run *run, const char *results)
{
    const btx_plan *plan = run->plan;
    const char *begin = (const char *)run->positions;
    const int32_t *positions = (const int32_t *)(const void *)results;
    const float *delta_norm = (const float *)(const void *)(results + ((const char *)run->delta_norm - begin));
    const float *row_norm = (const float *)(const void *)(results + ((const char *)run->row_norm - begin));
    const btx_tensor *out = &report->recalled;
    const int64_t top_k = run->processor->config.top_k;
    for (int64_t layer = 0; out->data != NULL && layer < plan->num_layers; layer++) {
        for (int64_t s = 0; s < plan->num_steps; s++) {
            const btx_plan_step *step = &plan->steps[s];
            const int32_t *of_step = positions + layer * plan->total_rows + step->row_offset;
            for (int64_t i = 0; i < top_k; i++)
                ((int64_t *)out->data)[layer * out->stride[0] + s * out->stride[1] + i * out->stride[2]] =
                    i < step->num_recalled ? of_step[i] : -1;
        }
    }
    copy_norms(&report->delta_norm, delta_norm, plan);
    copy_norms(&report->row_norm, row_norm, plan);
    for (int64_t s = 0; report->skipped.data != NULL && s < plan->num_steps; s++)
        ((int32_t *)report->skipped.data)[s * report->skipped.stride[0]] = is_skipped(plan, s, delta_norm, row_norm);
    for (int32_t lane = 0; run->backend->begin == NULL && lane < run->num_lanes; lane++) {
        for (int32_t stage = 0; stage < BTX_NUM_STAGES; stage++)
            report->stage_seconds[stage] += run->seconds[lane * BTX_NUM_STAGES + stage];
    }
}

/* The report of a boundary on another device, which is waited for. The write has been called for, so every failure but
 * the device's own refusal leaves the caches as nobody knows. */
/* A device's array to its place in run->fetched: what lies between arrays, for alignment, was never written. */
static btx_status fetch(const boundary_run *run, const void *array, int64_t count, btx_error *error)
{
    char *to = run->fetched + ((const char *)array - (const char *)run->positions);
    return run->backend->download(run->executor, to, array, (size_t)(count * run->plan->num_layers) * 4, error);
}

static btx_status fetch_report(btx_report *report, const boundary_run *run, btx_error *error)
{
    btx_status status = run->backend->synchronize(run->executor, report->stage_seconds, error);
    if (status == BTX_INVALID_ARGUMENT)
        return status;
    if (status == BTX_OK)
        status = fetch(run, run->positions, run->plan->total_rows, error);
    if (status == BTX_OK)
        status = fetch(run, run->delta_norm, run->plan->num_steps, error);
    if (status == BTX_OK)
        status = fetch(run, run->row_norm, run->plan->num_steps, error);
    if (status != BTX_OK)
        return BTX_REBUILD_NEEDED;
    fill_report(report, run, run->fetched);
    return BTX_OK;
}

static btx_status check_finite(const boundary_run *run, btx_error *error)
{
    const btx_plan *plan = run->plan;
    for (int64_t i = 0; i < plan->num_layers * plan->num_steps; i++) {
        if (!isfinite(run->delta_norm[i]))
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "the edit of sequence %" PRId64 " in layer %" PRId64
                            " is not finite: its cache or the weights hold NaN, infinity or too large values; "
                            "nothing was written",
                            plan->steps[i % plan->num_steps].sequence, i / plan->num_steps);
    }
    return BTX_OK;
}

/* Which steps are left as they are. Returns how many. */
static int64_t judge_edits(boundary_run *run, btx_plan *plan)
{
    int64_t num_skipped = 0;
    for (int64_t s = 0; s < plan->num_steps; s++) {
        run->skipped[s] = (unsigned char)is_skipped(plan, s, run->delta_norm, run->row_norm);
        num_skipped += run->skipped[s];
    }
    plan->skipped = run->skipped;
    return num_skipped;
}

btx_status btx_rewrite(const btx_processor *processor, btx_workspace *workspace, const btx_boundary *boundary,
                       btx_report *report, btx_error *error)
{
    const btx_config *config = &processor->config;
    const btx_backend *backend = processor->backend;
    const btx_device device = {backend->device_type, processor->device_index};
    btx_boundary_plan planned = {0};
    int64_t num_skipped = 0;
    btx_status status = btx_workspace_check(workspace, backend, processor->device_index, error);
    if (status == BTX_OK)
        status = btx_boundary_plan_create(boundary, device, config->num_layers, config->num_kv_heads,
                                          config->num_query_heads, config->head_dim, config->top_k,
                                          config->recent_window, 1, &planned, error);
    if (status != BTX_OK)
        return status;
    planned.plan.rope_inv_freq = processor->inv_freq;
    boundary_run run = {.processor = processor, .backend = backend, .plan = &planned.plan};
    /* On the host they say what is not finite. */
    run.wants_norms = report != NULL || backend->begin == NULL || planned.plan.max_relative_edit > 0.0f;
    if (report != NULL) {
        memset(report->stage_seconds, 0, sizeof report->stage_seconds);
        status = check_report(report, &planned.plan, config->top_k, error);
    }
    if (status != BTX_OK || planned.plan.num_steps == 0)
        goto cleanup;
    if (report != NULL)
        status = btx_workspace_settle(workspace, boundary->stream, error);
    if (status == BTX_OK)
        status = begin_run(&run, workspace, boundary->stream, report != NULL, error);
    if (status == BTX_OK && run.mass_is_apart)
        status = btx_workspace_run(workspace, num_units(&run) * run.num_parts, mass_part, &run, error);
    if (status == BTX_OK && run.layers_per_selection > 0)
        status = btx_workspace_run(workspace, num_selections(&run), select_rows, &run, error);
    if (status == BTX_OK)
        status = btx_workspace_run(workspace, num_units(&run), stage_unit, &run, error);
    if (status == BTX_OK && run.skipped != NULL)
        num_skipped = judge_edits(&run, &planned.plan);
    else if (status == BTX_OK && backend->begin == NULL)
        status = check_finite(&run, error);
    if (status != BTX_OK)
        goto cleanup;

    /* The only writes to the caller's cache. */
    if (btx_workspace_run(workspace, run.layers_per_selection > 0 ? 1 : num_units(&run), write_unit, &run, error) !=
        BTX_OK) {
        status = BTX_REBUILD_NEEDED;
        goto cleanup;
    }
    btx_workspace_count_skipped(workspace, num_skipped);
    if (report != NULL && backend->begin != NULL)
        status = fetch_report(report, &run, error);
    else if (report != NULL)
        fill_report(report, &run, (const char *)run.positions);

cleanup:
    end_run(&run);
    btx_boundary_plan_destroy(&planned);
    return status;
}

/* The mass of one unit, summed over its parts, to the caller's tensor. */
static btx_status mass_unit(void *context, int64_t unit, int32_t lane, btx_error *error)
{
    boundary_run *run = context;
    btx_pass pass = make_pass(run, unit, lane);
    btx_status status = run->mass_is_apart ? BTX_OK : measure_mass(run, &pass, lane, error);
    if (status == BTX_OK)
        status = run->backend->store_mass(&pass, run->num_parts, mass_of_pass(run, &pass, lane), run->mass_out, error);
    return status;
}

btx_status btx_attention_mass(const btx_backend *backend, btx_workspace *workspace, const btx_boundary *boundary,
                              int32_t recent_window, btx_tensor *out, btx_error *error)
{
    btx_boundary_plan planned = {0};
    btx_status status = btx_backend_check(backend, error);
    if (status == BTX_OK) {
        int32_t device_index = workspace != NULL ? btx_workspace_device_index(workspace) : 0;
        status = btx_workspace_check(workspace, backend, device_index, error);
    }
    if (status == BTX_OK)
        status = check_range("recent_window", recent_window, 1, BTX_MAX_RECENT_WINDOW, error);
    if (status != BTX_OK)
        return status;
    if (boundary == NULL || boundary->kv_cache == NULL || boundary->query_cache == NULL ||
        boundary->kv_cache->num_layers < 1 || boundary->query_cache->num_layers < 1 ||
        boundary->kv_cache->keys[0].num_dims != 4 || boundary->query_cache->queries[0].num_dims != 4)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "attention mass needs keys and queries of at least one layer, four dimensions each");
    /* There is no Processor to say what shape the backbone has: the cache itself does. */
    const int64_t *key_shape = boundary->kv_cache->keys[0].shape;
    int64_t num_query_heads = boundary->query_cache->queries[0].shape[2];
    if (key_shape[2] < 1 || key_shape[2] > 4096 || key_shape[3] < 1 || key_shape[3] > 4096 || num_query_heads < 1 ||
        num_query_heads > 65536 || num_query_heads % key_shape[2] != 0)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%" PRId64 " query heads over %" PRId64 " KV heads of size %" PRId64
                        " make no attention; query heads are a multiple of KV heads",
                        num_query_heads, key_shape[2], key_shape[3]);
    const btx_device device = {backend->device_type, btx_workspace_device_index(workspace)};
    status =
        btx_boundary_plan_create(boundary, device, boundary->kv_cache->num_layers, (int32_t)key_shape[2],
                                 (int32_t)num_query_heads, (int32_t)key_shape[3], 0, recent_window, 0, &planned, error);
    if (status != BTX_OK)
        return status;
    int64_t max_prior = 0;
    for (int64_t s = 0; s < planned.plan.num_steps; s++)
        max_prior = planned.steps[s].num_prior > max_prior ? planned.steps[s].num_prior : max_prior;
    const int64_t shape[3] = {planned.plan.num_layers, planned.plan.num_steps, max_prior};
    status = btx_tensor_check_on(out, "out", BTX_F32, 3, shape, 1, device, error);
    boundary_run run = {.backend = backend, .plan = &planned.plan, .mass_out = out};
    if (status != BTX_OK || planned.plan.num_steps == 0)
        goto cleanup;
    status = btx_workspace_settle(workspace, boundary->stream, error);
    if (status == BTX_OK)
        status = begin_run(&run, workspace, boundary->stream, 0, error);
    if (status == BTX_OK && run.mass_is_apart)
        status = btx_workspace_run(workspace, num_units(&run) * run.num_parts, mass_part, &run, error);
    if (status == BTX_OK)
        status = btx_workspace_run(workspace, num_units(&run), mass_unit, &run, error);
    if (status == BTX_OK)
        status = btx_workspace_synchronize(workspace, error);

cleanup:
    end_run(&run);
    btx_boundary_plan_destroy(&planned);
    return status;
}

btx_status btx_select_top_k(const btx_backend *backend, const btx_tensor *mass, const btx_tensor *lengths,
                            btx_tensor *out, btx_error *error)
{
    const int64_t any[2] = {-1, -1};
    btx_plan_step step = {0};
    btx_plan plan = {.steps = &step, .num_steps = 1, .num_layers = 1};
    int64_t *counts = NULL;
    float *row_mass = NULL;
    int32_t *positions = NULL;
    void *scratch = NULL;
    btx_status status = btx_backend_check(backend, error);
    if (status == BTX_OK && backend->begin != NULL)
        status = btx_fail(error, BTX_UNSUPPORTED, "select_top_k alone runs on CPU backends, not on '%s'; name one",
                          backend->name);
    if (status == BTX_OK)
        status = btx_tensor_check(mass, "mass", BTX_F32, 2, any, 0, error);
    if (status == BTX_OK)
        status = btx_tensor_check(lengths, "lengths", BTX_I64, 1, mass->shape, 0, error);
    const int64_t out_shape[2] = {mass->shape[0], -1};
    if (status == BTX_OK)
        status = btx_tensor_check(out, "out", BTX_I64, 2, out_shape, 1, error);
    if (status != BTX_OK)
        return status;
    int64_t n = mass->shape[1], top_k = out->shape[1];
    if (n > INT32_MAX)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "mass has %" PRId64 " columns; at most %d fit", n, INT32_MAX);
    /* Copied first: another thread may write the caller's tensor after it was checked. */
    counts = calloc((size_t)mass->shape[0] + 1, sizeof *counts); /* of a view that repeats one row there may be 2^61 */
    if (counts == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for %" PRId64 " lengths", mass->shape[0]);
    for (int64_t row = 0; row < mass->shape[0]; row++) {
        counts[row] = ((const int64_t *)lengths->data)[row * lengths->stride[0]];
        if (counts[row] < 0 || counts[row] > n) {
            status = btx_fail(error, BTX_INVALID_ARGUMENT,
                              "lengths[%" PRId64 "] is %" PRId64 "; it must be 0 to %" PRId64, row, counts[row], n);
            goto cleanup;
        }
    }
    plan.total_prior = n;
    step.num_prior = n;
    row_mass = malloc((size_t)(n + 1) * sizeof *row_mass);
    positions = malloc((size_t)(n + 1) * sizeof *positions);
    scratch = malloc(backend->scratch_bytes(&plan, 1, 0, 0) + 1);
    if (row_mass == NULL || positions == NULL || scratch == NULL) {
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for selecting among %" PRId64 " positions", n);
        goto cleanup;
    }
    for (int64_t row = 0; row < mass->shape[0] && status == BTX_OK; row++) {
        int64_t length = counts[row];
        for (int64_t i = 0; i < length; i++)
            row_mass[i] = ((const float *)mass->data)[row * mass->stride[0] + i * mass->stride[1]];
        step.num_prior = plan.total_prior = length;
        step.num_recalled = plan.total_rows = length < top_k ? length : top_k;
        btx_pass pass = {.plan = &plan, .layer_end = 1, .step_end = 1, .scratch = scratch};
        status = backend->top_k(&pass, 1, row_mass, positions, error);
        for (int64_t i = 0; i < top_k && status == BTX_OK; i++)
            ((int64_t *)out->data)[row * out->stride[0] + i * out->stride[1]] =
                i < step.num_recalled ? positions[i] : -1;
    }

cleanup:
    free(counts);
    free(row_mass);
    free(positions);
    free(scratch);
    return status;
}

btx_status btx_capture_queries(const btx_backend *backend, int32_t device_index, const btx_tensor *query,
                               const btx_tensor *slots, const btx_tensor *block_to_page, const btx_tensor *pages,
                               void *stream, btx_error *error)
{
    const int64_t any[4] = {-1, -1, -1, -1};
    btx_status status = btx_backend_check(backend, error);
    if (status != BTX_OK)
        return status;
    const btx_device device = {backend->device_type, device_index};
    if (query->dtype != BTX_F32 && query->dtype != BTX_F16 && query->dtype != BTX_BF16)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "query is %s; it must be float32, float16 or bfloat16",
                        btx_dtype_name(query->dtype));
    status = btx_tensor_check_on(query, "query", query->dtype, 3, any, 0, device, error);
    if (status == BTX_OK)
        status = btx_tensor_check_on(slots, "slots", BTX_I64, 1, any, 0, device, error);
    if (status == BTX_OK)
        status = btx_tensor_check_on(block_to_page, "block_to_page", BTX_I32, 1, any, 0, device, error);
    if (status != BTX_OK)
        return status;
    const int64_t shape[4] = {-1, -1, query->shape[1], query->shape[2]};
    status = btx_tensor_check_on(pages, "pages", query->dtype, 4, shape, 1, device, error);
    if (status != BTX_OK)
        return status;
    if (pages->shape[1] < 1)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "pages have 0 rows; make them as long as a block");
    if (slots->shape[0] > query->shape[0])
        return btx_fail(error, BTX_INVALID_ARGUMENT, "there are %" PRId64 " slots for %" PRId64 " tokens in query",
                        slots->shape[0], query->shape[0]);
    return backend->capture_queries(device_index, query, slots, block_to_page, pages, stream, error);
}
