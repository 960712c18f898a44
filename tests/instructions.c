/* instructions.c - one boundary of fixed inputs, for counting its instructions (test_instructions.py).
 *
 *     instructions BACKEND WEIGHT_DTYPE        e.g. cpu:avx2 float32
 *
 * Two layers of SmolLM2-135M's shape, d_p = 128, k = 32, a step of 32 tokens after 512, a bf16 cache, one thread. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "btx.h"
#include "half.h"

enum { LAYERS = 2, KV_HEADS = 3, QUERY_HEADS = 9, HEAD_DIM = 64, PRIOR = 512, STEP = 32, TOKENS = PRIOR + STEP };

static uint16_t keys[LAYERS][TOKENS * KV_HEADS * HEAD_DIM], values[LAYERS][TOKENS * KV_HEADS * HEAD_DIM];
static uint16_t queries[LAYERS][STEP * QUERY_HEADS * HEAD_DIM];

/* Uniform in [-1, 1) (xorshift64*). */
static float uniform(void)
{
    static uint64_t state = 42;
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (float)((state * 2685821657736338717u) >> 40) * 0x1p-23f - 1.0f;
}

static void fill(uint16_t *out, size_t count)
{
    for (size_t i = 0; i < count; i++)
        out[i] = btx_f32_to_bf16(2.0f * uniform());
}

/* Random weights of the config, owned by the caller through weights[...].data. 0 when memory is short. */
static int make_weights(const btx_config *config, btx_tensor *weights)
{
    for (int i = 0; i < LAYERS * BTX_NUM_WEIGHTS; i++) {
        int64_t shape[2] = {1, 1};
        int32_t num_dims = btx_weight_shape(config, (btx_weight)(i % BTX_NUM_WEIGHTS), shape);
        float *data = malloc((size_t)(shape[0] * shape[1]) * sizeof *data);
        if (data == NULL)
            return 0;
        for (int64_t j = 0; j < shape[0] * shape[1]; j++)
            data[j] = num_dims == 2 ? uniform() / sqrtf((float)shape[1]) : 0.1f * uniform() + 1.0f;
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, shape);
    }
    return 1;
}

int main(int argc, char **argv)
{
    const int64_t kv_shape[4] = {1, TOKENS, KV_HEADS, HEAD_DIM}, query_shape[4] = {1, STEP, QUERY_HEADS, HEAD_DIM};
    const int64_t table_shape[2] = {1, 1};
    const btx_step step = {.step_begin = PRIOR, .step_end = TOKENS};
    int32_t table = 0;
    btx_tensor weights[LAYERS * BTX_NUM_WEIGHTS] = {{0}};
    btx_tensor key_views[LAYERS], value_views[LAYERS], query_views[LAYERS];
    const btx_backend *backend = NULL;
    btx_processor *processor = NULL;
    btx_workspace *workspace = NULL;
    btx_error error = {{0}};
    if (argc != 3) {
        fprintf(stderr, "usage: %s BACKEND WEIGHT_DTYPE\n", argv[0]);
        return 2;
    }
    const btx_config config = {
        .num_layers = LAYERS,
        .num_kv_heads = KV_HEADS,
        .num_query_heads = QUERY_HEADS,
        .head_dim = HEAD_DIM,
        .processor_dim = 128,
        .processor_heads = 4,
        .processor_mlp_dim = 560,
        .top_k = 32,
        .recent_window = STEP,
        .norm_eps = 1e-6f,
        .weight_dtype = strcmp(argv[2], "bfloat16") == 0 ? BTX_BF16 : BTX_F32,
    };
    for (int layer = 0; layer < LAYERS; layer++) {
        fill(keys[layer], sizeof keys[layer] / sizeof *keys[layer]);
        fill(values[layer], sizeof values[layer] / sizeof *values[layer]);
        fill(queries[layer], sizeof queries[layer] / sizeof *queries[layer]);
        key_views[layer] = btx_tensor_contiguous(keys[layer], BTX_BF16, 4, kv_shape);
        value_views[layer] = btx_tensor_contiguous(values[layer], BTX_BF16, 4, kv_shape);
        query_views[layer] = btx_tensor_contiguous(queries[layer], BTX_BF16, 4, query_shape);
    }
    int32_t device_index = 0;
    const btx_kv_cache kv_cache = {LAYERS, key_views, value_views};
    const btx_query_cache query_cache = {LAYERS, query_views};
    const btx_boundary boundary = {
        .kv_cache = &kv_cache,
        .query_cache = &query_cache,
        .steps = &step,
        .num_steps = 1,
        .block_table = btx_tensor_contiguous(&table, BTX_I32, 2, table_shape),
        .query_table = btx_tensor_contiguous(&table, BTX_I32, 2, table_shape),
    };
    btx_status status = make_weights(&config, weights) ? BTX_OK : BTX_OUT_OF_MEMORY;
    if (status == BTX_OK)
        status = btx_backend_find(argv[1], &backend, &device_index, &error);
    if (status == BTX_OK)
        status = btx_processor_create(backend, 0, &config, weights, &processor, &error);
    if (status == BTX_OK)
        status = btx_workspace_create(backend, 0, 1, &workspace, &error);
    if (status == BTX_OK)
        status = btx_rewrite(processor, workspace, &boundary, NULL, &error);
    if (status != BTX_OK)
        fprintf(stderr, "%s\n", error.message);
    btx_workspace_destroy(workspace);
    btx_processor_destroy(processor);
    for (int i = 0; i < LAYERS * BTX_NUM_WEIGHTS; i++)
        free(weights[i].data);
    return status;
}
