/* variants.c - whole boundaries on every CPU backend that this machine runs, against the scalar one (test_simd.py).
 *
 * No Python, so that it runs wherever the C core does: under an emulator too. Each case is two sequences in a paged
 * cache; what must not be rewritten must keep its bits, the recalled positions must be the scalar backend's, and the
 * masses and the edits near it. Either backend is within the tolerances of test_parity.py of the true value, so two
 * are within twice those of each other.
 *
 * Prints one line per backend and case; exit status 0 when all agree. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "btx.h"
#include "half.h"

enum {
    NUM_LAYERS = 2,
    NUM_SEQUENCES = 2,
    NUM_KV_HEADS = 2,
    MAX_GROUP = 3,
    MAX_HEAD_DIM = 128,
    BLOCK_SIZE = 16,
    MAX_BLOCKS = 10, /* of a sequence */
    NUM_BLOCKS = NUM_SEQUENCES * MAX_BLOCKS + 1,
    MAX_PRIOR = 139, /* of the first step, the longer one: two tiles of keys and a tail */
    RECENT_WINDOW = 19,
    TOP_K = 6,
    MAX_CACHE = NUM_BLOCKS * BLOCK_SIZE * NUM_KV_HEADS * MAX_HEAD_DIM,
    MAX_QUERIES = NUM_SEQUENCES * RECENT_WINDOW * NUM_KV_HEADS * MAX_GROUP * MAX_HEAD_DIM,
    MAX_WEIGHTS = NUM_LAYERS * 120000
};

typedef struct shape {
    int32_t head_dim, group;
    btx_dtype dtype, weight_dtype;
    int column_major; /* keys [block, head, dim, row] in memory instead of [block, row, head, dim] */
    btx_key_space key_space;
} shape;

static const shape shapes[] = {
    {7, 3, BTX_F32, BTX_F32, 0, BTX_KEYS_ROTATED},      {7, 1, BTX_BF16, BTX_BF16, 1, BTX_KEYS_ROTATED},
    {64, 3, BTX_F32, BTX_F32, 0, BTX_KEYS_UNROTATED},   {64, 3, BTX_F16, BTX_F32, 0, BTX_KEYS_ROTATED},
    {64, 3, BTX_BF16, BTX_BF16, 0, BTX_KEYS_UNROTATED}, {96, 1, BTX_F32, BTX_BF16, 1, BTX_KEYS_ROTATED},
    {96, 3, BTX_F16, BTX_F32, 1, BTX_KEYS_UNROTATED},   {96, 2, BTX_BF16, BTX_F32, 0, BTX_KEYS_ROTATED},
    {128, 3, BTX_F32, BTX_F32, 0, BTX_KEYS_ROTATED},    {128, 1, BTX_F16, BTX_BF16, 0, BTX_KEYS_ROTATED},
    {128, 3, BTX_BF16, BTX_F32, 1, BTX_KEYS_ROTATED},   {10, 3, BTX_F32, BTX_F32, 0, BTX_KEYS_UNROTATED},
    {22, 3, BTX_BF16, BTX_F32, 0, BTX_KEYS_UNROTATED},
};

/* The second is left-padded, and its step is longer than the recent window. */
static const btx_step steps[NUM_SEQUENCES] = {
    {.sequence = 0, .sequence_begin = 0, .step_begin = MAX_PRIOR, .step_end = MAX_PRIOR + 11},
    {.sequence = 1, .sequence_begin = 5, .step_begin = 50, .step_end = 77},
};

/* The memory of a cache in the dtype of the case, and what a backend made of it. */
typedef struct cache {
    _Alignas(64) unsigned char keys[NUM_LAYERS][MAX_CACHE * sizeof(float)];
    unsigned char values[NUM_LAYERS][MAX_CACHE * sizeof(float)];
} cache;

typedef struct result {
    cache cache;
    int64_t recalled[NUM_LAYERS][NUM_SEQUENCES][TOP_K];
    float mass[NUM_LAYERS][NUM_SEQUENCES][MAX_PRIOR];
    float delta_norm[NUM_LAYERS][NUM_SEQUENCES], row_norm[NUM_LAYERS][NUM_SEQUENCES];
} result;

/* The inputs of one case. */
static cache original;
static _Alignas(64) unsigned char queries[NUM_LAYERS][MAX_QUERIES * sizeof(float)];
static float weight_data[MAX_WEIGHTS], inv_freq[MAX_HEAD_DIM / 2];
static btx_tensor weights[NUM_LAYERS * BTX_NUM_WEIGHTS];
static int32_t block_table[NUM_SEQUENCES][MAX_BLOCKS];

static uint64_t random_state = 42;

/* Uniform in [-1, 1) (xorshift64*). */
static float uniform(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (float)((random_state * 2685821657736338717u) >> 40) * 0x1p-23f - 1.0f;
}

static void fill(unsigned char *out, btx_dtype dtype, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        float value = 2.0f * uniform();
        uint16_t half = dtype == BTX_F16 ? btx_f32_to_f16(value) : btx_f32_to_bf16(value);
        if (dtype == BTX_F32)
            memcpy(out + i * sizeof value, &value, sizeof value);
        else
            memcpy(out + i * sizeof half, &half, sizeof half);
    }
}

static float element(const unsigned char *data, btx_dtype dtype, int64_t offset)
{
    float value;
    uint16_t half;
    if (dtype == BTX_F32) {
        memcpy(&value, data + offset * (int64_t)sizeof value, sizeof value);
        return value;
    }
    memcpy(&half, data + offset * (int64_t)sizeof half, sizeof half);
    return dtype == BTX_F16 ? btx_f16_to_f32(half) : btx_bf16_to_f32(half);
}

static btx_config make_config(const shape *shape)
{
    return (btx_config){
        .num_layers = NUM_LAYERS,
        .num_kv_heads = NUM_KV_HEADS,
        .num_query_heads = NUM_KV_HEADS * shape->group,
        .head_dim = shape->head_dim,
        .processor_dim = 39, /* tails everywhere */
        .processor_heads = 3,
        .processor_mlp_dim = 53,
        .top_k = TOP_K,
        .recent_window = RECENT_WINDOW,
        .norm_eps = 1e-6f,
        .key_space = shape->key_space,
        .rope_inv_freq = shape->key_space == BTX_KEYS_UNROTATED ? inv_freq : NULL,
        .weight_dtype = shape->weight_dtype,
    };
}

/* Weights of the size that keeps activations near 1, so that edits are comparable to what they change. */
static void make_weights(const btx_config *config)
{
    float *data = weight_data;
    for (int i = 0; i < NUM_LAYERS * BTX_NUM_WEIGHTS; i++) {
        btx_weight weight = (btx_weight)(i % BTX_NUM_WEIGHTS);
        int64_t dims[2] = {1, 1};
        int32_t num_dims = btx_weight_shape(config, weight, dims);
        float scale = num_dims == 2 ? sqrtf(3.0f / (float)dims[1]) : 0.2f;
        int is_norm = strstr(btx_weight_name(weight), "norm") != NULL;
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, dims);
        for (int64_t j = 0; j < dims[0] * dims[1]; j++)
            *data++ = scale * uniform() + (float)is_norm;
    }
}

static void make_inputs(const shape *shape)
{
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        fill(original.keys[layer], shape->dtype, MAX_CACHE);
        fill(original.values[layer], shape->dtype, MAX_CACHE);
        fill(queries[layer], shape->dtype, MAX_QUERIES);
    }
    for (int s = 0; s < NUM_SEQUENCES; s++) {
        for (int i = 0; i < MAX_BLOCKS; i++)
            block_table[s][i] = NUM_BLOCKS - 1 - (i * NUM_SEQUENCES + s); /* block 0 is nobody's */
    }
    for (int i = 0; i < shape->head_dim / 2; i++)
        inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)shape->head_dim);
}

static btx_tensor cache_view(const shape *shape, void *data, int column_major)
{
    const int64_t dims[4] = {NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, shape->head_dim};
    btx_tensor view = btx_tensor_contiguous(data, shape->dtype, 4, dims);
    if (column_major) {
        view.stride[1] = 1;
        view.stride[2] = BLOCK_SIZE * shape->head_dim;
        view.stride[3] = BLOCK_SIZE;
    }
    return view;
}

/* One boundary, and the masses before it, on a copy of the inputs. */
static btx_status rewrite(const btx_backend *backend, const shape *shape, result *out, btx_error *error)
{
    const btx_config config = make_config(shape);
    btx_tensor key_views[NUM_LAYERS], value_views[NUM_LAYERS], query_views[NUM_LAYERS];
    int32_t query_table[NUM_SEQUENCES] = {1, 0};
    btx_processor *processor = NULL;
    btx_workspace *workspace = NULL;
    btx_status status;

    const int64_t query_shape[4] = {NUM_SEQUENCES, RECENT_WINDOW, config.num_query_heads, shape->head_dim};
    const int64_t block_table_shape[2] = {NUM_SEQUENCES, MAX_BLOCKS}, query_table_shape[2] = {NUM_SEQUENCES, 1};
    const int64_t recalled_shape[3] = {NUM_LAYERS, NUM_SEQUENCES, TOP_K};
    const int64_t mass_shape[3] = {NUM_LAYERS, NUM_SEQUENCES, MAX_PRIOR}, norm_shape[2] = {NUM_LAYERS, NUM_SEQUENCES};
    memset(out, 0, sizeof *out);
    out->cache = original;
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        key_views[layer] = cache_view(shape, out->cache.keys[layer], shape->column_major);
        value_views[layer] = cache_view(shape, out->cache.values[layer], 0);
        query_views[layer] = btx_tensor_contiguous(queries[layer], shape->dtype, 4, query_shape);
    }
    const btx_kv_cache kv_cache = {NUM_LAYERS, key_views, value_views};
    const btx_query_cache query_cache = {NUM_LAYERS, query_views};
    const btx_boundary boundary = {
        .kv_cache = &kv_cache,
        .query_cache = &query_cache,
        .steps = steps,
        .num_steps = NUM_SEQUENCES,
        .block_table = btx_tensor_contiguous(block_table, BTX_I32, 2, block_table_shape),
        .query_table = btx_tensor_contiguous(query_table, BTX_I32, 2, query_table_shape),
    };
    btx_report report = {
        .recalled = btx_tensor_contiguous(out->recalled, BTX_I64, 3, recalled_shape),
        .delta_norm = btx_tensor_contiguous(out->delta_norm, BTX_F32, 2, norm_shape),
        .row_norm = btx_tensor_contiguous(out->row_norm, BTX_F32, 2, norm_shape),
    };
    btx_tensor mass = btx_tensor_contiguous(out->mass, BTX_F32, 3, mass_shape);

    status = btx_processor_create(backend, 0, &config, weights, &processor, error);
    if (status == BTX_OK)
        status = btx_workspace_create(backend, 0, 2, &workspace, error);
    if (status == BTX_OK)
        status = btx_attention_mass(backend, workspace, &boundary, RECENT_WINDOW, &mass, error);
    if (status == BTX_OK)
        status = btx_rewrite(processor, workspace, &boundary, &report, error);
    btx_processor_destroy(processor);
    btx_workspace_destroy(workspace);
    return status;
}

/* selected [block][row]: the rows of the cache that the boundary rewrites in a layer. */
static void mark_selected(const result *result, int layer, char selected[NUM_BLOCKS][BLOCK_SIZE])
{
    memset(selected, 0, NUM_BLOCKS * BLOCK_SIZE);
    for (int s = 0; s < NUM_SEQUENCES; s++) {
        int64_t begin = steps[s].step_end - RECENT_WINDOW;
        begin = begin > steps[s].step_begin ? begin : steps[s].step_begin;
        for (int64_t p = begin; p < steps[s].step_end; p++)
            selected[block_table[s][p / BLOCK_SIZE]][p % BLOCK_SIZE] = 1;
        for (int i = 0; i < TOP_K; i++) {
            int64_t p = result->recalled[layer][s][i];
            selected[block_table[s][p / BLOCK_SIZE]][p % BLOCK_SIZE] = 1;
        }
    }
}

/* The larger of the worst so far and |got - expected| / allowed; a NaN is worst of all. */
static double worse(double worst, double got, double expected, double allowed)
{
    double ratio = fabs(got - expected) / allowed;
    return ratio <= worst ? worst : isnan(ratio) ? INFINITY : ratio;
}

/* The worst difference of the cached values of a layer, in units of what is allowed; infinity where a row that is not
 * selected lost its bits, or where a selected one was not changed noticeably. */
static double compare_rows(const shape *shape, const btx_tensor *view, char selected[NUM_BLOCKS][BLOCK_SIZE],
                           const unsigned char *before, const unsigned char *scalar, const unsigned char *got)
{
    const double unit = shape->dtype == BTX_F32 ? 0x1p-23 : shape->dtype == BTX_F16 ? 0x1p-10 : 0x1p-7;
    const double edit_tolerance = shape->weight_dtype == BTX_F32 ? 0x1p-15 : 0x1p-7;
    const size_t size = btx_dtype_size(shape->dtype);
    double largest_edit = 0, worst = 0;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t row = 0; row < NUM_BLOCKS * BLOCK_SIZE; row++) {
            for (int64_t i = 0; i < NUM_KV_HEADS * shape->head_dim; i++) {
                int64_t at = row / BLOCK_SIZE * view->stride[0] + row % BLOCK_SIZE * view->stride[1] +
                             i / shape->head_dim * view->stride[2] + i % shape->head_dim * view->stride[3];
                double old = element(before, shape->dtype, at), right = element(scalar, shape->dtype, at);
                if (pass == 0)
                    largest_edit = fmax(largest_edit, fabs(right - old));
                else if (selected[row / BLOCK_SIZE][row % BLOCK_SIZE])
                    worst = worse(worst, element(got, shape->dtype, at), right,
                                  edit_tolerance * largest_edit + unit * fmax(fabs(old), fabs(right)));
                else if (memcmp(before + (size_t)at * size, got + (size_t)at * size, size) != 0)
                    worst = INFINITY;
            }
        }
    }
    return largest_edit > 0.1 ? worst : INFINITY;
}

/* The worst difference of a boundary, in units of what is allowed. */
static double compare(const shape *shape, const result *scalar, const result *got)
{
    const double norm_tolerance = shape->weight_dtype == BTX_F32 ? 0x1p-15 : 0x1p-7;
    char selected[NUM_BLOCKS][BLOCK_SIZE];
    double worst = 0;
    if (memcmp(scalar->recalled, got->recalled, sizeof got->recalled) != 0)
        return INFINITY;
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        for (int s = 0; s < NUM_SEQUENCES; s++) {
            for (int i = 0; i < MAX_PRIOR; i++)
                worst = worse(worst, got->mass[layer][s][i], scalar->mass[layer][s][i],
                              6e-5 * scalar->mass[layer][s][i] + 1e-30);
            worst = worse(worst, got->delta_norm[layer][s], scalar->delta_norm[layer][s],
                          norm_tolerance * scalar->delta_norm[layer][s]);
            worst =
                worse(worst, got->row_norm[layer][s], scalar->row_norm[layer][s], 0x1p-15 * scalar->row_norm[layer][s]);
        }
        mark_selected(scalar, layer, selected);
        btx_tensor keys = cache_view(shape, NULL, shape->column_major), values = cache_view(shape, NULL, 0);
        worst = fmax(worst, compare_rows(shape, &keys, selected, original.keys[layer], scalar->cache.keys[layer],
                                         got->cache.keys[layer]));
        worst = fmax(worst, compare_rows(shape, &values, selected, original.values[layer], scalar->cache.values[layer],
                                         got->cache.values[layer]));
    }
    return worst;
}

int main(void)
{
    static result scalar, got;
    int32_t num_backends = 0, device_index = 0;
    const btx_backend *const *backends = btx_backends(&num_backends);
    const btx_backend *reference = NULL;
    btx_error error = {{0}};
    int num_passed = 0, num_failed = 0;
    if (btx_backend_find("cpu:scalar", &reference, &device_index, &error) != BTX_OK) {
        fprintf(stderr, "variants: %s\n", error.message);
        return 2;
    }
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const shape *shape = &shapes[i];
        const btx_config config = make_config(shape);
        make_inputs(shape);
        make_weights(&config);
        if (rewrite(reference, shape, &scalar, &error) != BTX_OK) {
            fprintf(stderr, "variants: %s\n", error.message);
            return 2;
        }
        for (int32_t b = 0; b < num_backends; b++) {
            if (backends[b] == reference || !backends[b]->available())
                continue;
            btx_status status = rewrite(backends[b], shape, &got, &error);
            double worst = status == BTX_OK ? compare(shape, &scalar, &got) : INFINITY;
            printf("%s: head_dim %d, group %d, %s cache%s, %s weights%s: %.2f of the tolerance%s%s\n",
                   backends[b]->variant, (int)shape->head_dim, (int)shape->group, btx_dtype_name(shape->dtype),
                   shape->column_major ? " with keys by column" : "", btx_dtype_name(shape->weight_dtype),
                   shape->key_space == BTX_KEYS_UNROTATED ? " on unrotated keys" : "", worst,
                   status == BTX_OK ? "" : ": ", status == BTX_OK ? "" : error.message);
            if (worst <= 1)
                num_passed++;
            else
                num_failed++;
        }
    }
    printf("%d passed, %d failed\n", num_passed, num_failed);
    return num_failed != 0;
}
