/* rewrite.c - one boundary from plain C: no Python, no framework.
 *
 * A paged bfloat16 cache holds one sequence of 40 tokens, the last 12 of which are the step that just ended. A
 * Processor with random weights rewrites the step and the 4 earlier positions it attended to most.
 *
 *     make -C examples/c && examples/c/rewrite
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "btx.h"

enum {
    NUM_LAYERS = 2,
    NUM_KV_HEADS = 2,
    NUM_QUERY_HEADS = 4,
    HEAD_DIM = 16,
    NUM_BLOCKS = 6,
    BLOCK_SIZE = 8,
    NUM_TOKENS = 40,
    STEP_BEGIN = 28,
    TOP_K = 4,
    RECENT_WINDOW = 16,
    BLOCK_ELEMENTS = NUM_BLOCKS * BLOCK_SIZE * NUM_KV_HEADS * HEAD_DIM,
    QUERY_ELEMENTS = RECENT_WINDOW * NUM_QUERY_HEADS * HEAD_DIM
};

static uint64_t random_state = 42;

/* Uniform in [-1, 1) (xorshift64*). */
static float uniform(void)
{
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return (float)((random_state * 2685821657736338717u) >> 40) * 0x1p-23f - 1.0f;
}

static void fill_bf16(uint16_t *out, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        float value = uniform();
        uint32_t bits;
        memcpy(&bits, &value, sizeof bits);
        out[i] = (uint16_t)(bits >> 16);
    }
}

/* Random weights under the checkpoint's shapes; every tensor is allocated once and freed by the caller. */
static int make_weights(const btx_config *config, btx_tensor *weights)
{
    for (int i = 0; i < NUM_LAYERS * BTX_NUM_WEIGHTS; i++) {
        int64_t shape[2] = {1, 1};
        int32_t num_dims = btx_weight_shape(config, (btx_weight)(i % BTX_NUM_WEIGHTS), shape);
        size_t count = (size_t)(shape[0] * shape[1]);
        float *data = malloc(count * sizeof *data);
        if (data == NULL)
            return 0;
        for (size_t j = 0; j < count; j++)
            data[j] = 0.2f * uniform() + (strstr(btx_weight_name((btx_weight)(i % BTX_NUM_WEIGHTS)), "norm") != NULL);
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, shape);
    }
    return 1;
}

int main(void)
{
    static uint16_t keys[NUM_LAYERS][BLOCK_ELEMENTS], values[NUM_LAYERS][BLOCK_ELEMENTS];
    static uint16_t queries[NUM_LAYERS][QUERY_ELEMENTS];
    static uint16_t keys_before[NUM_LAYERS][BLOCK_ELEMENTS];
    static int64_t recalled[NUM_LAYERS][1][TOP_K];
    static float delta_norm[NUM_LAYERS][1], row_norm[NUM_LAYERS][1];
    int32_t block_table[NUM_BLOCKS - 1] = {3, 0, 5, 1, 4}; /* block 2 belongs to somebody else */
    int32_t query_table[1] = {0};
    btx_tensor weights[NUM_LAYERS * BTX_NUM_WEIGHTS] = {{0}};
    btx_tensor key_views[NUM_LAYERS], value_views[NUM_LAYERS], query_views[NUM_LAYERS];
    const btx_backend *backend = NULL;
    int32_t device_index = 0;
    btx_processor *processor = NULL;
    btx_workspace *workspace = NULL;
    btx_error error = {{0}};
    int exit_status = 1;

    const btx_config config = {
        .num_layers = NUM_LAYERS,
        .num_kv_heads = NUM_KV_HEADS,
        .num_query_heads = NUM_QUERY_HEADS,
        .head_dim = HEAD_DIM,
        .processor_dim = 32,
        .processor_heads = 4,
        .processor_mlp_dim = 48,
        .top_k = TOP_K,
        .recent_window = RECENT_WINDOW,
        .norm_eps = 1e-6f,
        .weight_dtype = BTX_F32,
    };
    const int64_t cache_shape[4] = {NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM};
    const int64_t query_shape[4] = {1, RECENT_WINDOW, NUM_QUERY_HEADS, HEAD_DIM};
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        fill_bf16(keys[layer], BLOCK_ELEMENTS);
        fill_bf16(values[layer], BLOCK_ELEMENTS);
        fill_bf16(queries[layer], QUERY_ELEMENTS);
        key_views[layer] = btx_tensor_contiguous(keys[layer], BTX_BF16, 4, cache_shape);
        value_views[layer] = btx_tensor_contiguous(values[layer], BTX_BF16, 4, cache_shape);
        query_views[layer] = btx_tensor_contiguous(queries[layer], BTX_BF16, 4, query_shape);
    }
    memcpy(keys_before, keys, sizeof keys);

    const int64_t block_table_shape[2] = {1, NUM_BLOCKS - 1}, query_table_shape[2] = {1, 1};
    const int64_t recalled_shape[3] = {NUM_LAYERS, 1, TOP_K}, norm_shape[2] = {NUM_LAYERS, 1};
    const btx_kv_cache kv_cache = {NUM_LAYERS, key_views, value_views};
    const btx_query_cache query_cache = {NUM_LAYERS, query_views};
    const btx_step step = {.sequence = 0, .sequence_begin = 0, .step_begin = STEP_BEGIN, .step_end = NUM_TOKENS};
    const btx_boundary boundary = {
        .kv_cache = &kv_cache,
        .query_cache = &query_cache,
        .steps = &step,
        .num_steps = 1,
        .block_table = btx_tensor_contiguous(block_table, BTX_I32, 2, block_table_shape),
        .query_table = btx_tensor_contiguous(query_table, BTX_I32, 2, query_table_shape),
    };
    btx_report report = {
        .recalled = btx_tensor_contiguous(recalled, BTX_I64, 3, recalled_shape),
        .delta_norm = btx_tensor_contiguous(delta_norm, BTX_F32, 2, norm_shape),
        .row_norm = btx_tensor_contiguous(row_norm, BTX_F32, 2, norm_shape),
    };

    if (!make_weights(&config, weights) || btx_backend_find("cpu", &backend, &device_index, &error) != BTX_OK ||
        btx_processor_create(backend, device_index, &config, weights, &processor, &error) != BTX_OK ||
        btx_workspace_create(backend, device_index, 2, &workspace, &error) != BTX_OK ||
        btx_rewrite(processor, workspace, &boundary, &report, &error) != BTX_OK) {
        fprintf(stderr, "rewrite: %s\n", error.message);
        goto cleanup;
    }
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        int changed = 0;
        for (int i = 0; i < BLOCK_ELEMENTS; i++)
            changed += keys[layer][i] != keys_before[layer][i];
        printf("layer %d: recalled", layer);
        for (int i = 0; i < TOP_K; i++)
            printf(" %d", (int)recalled[layer][0][i]);
        printf(", edit / rows = %.4f, %d of %d key elements changed\n", delta_norm[layer][0] / row_norm[layer][0],
               changed, (int)BLOCK_ELEMENTS);
    }
    /* A wrong call is an error with a sentence, and writes nothing. */
    block_table[4] = NUM_BLOCKS;
    if (btx_rewrite(processor, workspace, &boundary, NULL, &error) != BTX_INVALID_ARGUMENT)
        goto cleanup;
    printf("refused as it should be: %s\n", error.message);
    exit_status = 0;

cleanup:
    for (int i = 0; i < NUM_LAYERS * BTX_NUM_WEIGHTS; i++)
        free(weights[i].data);
    btx_processor_destroy(processor);
    btx_workspace_destroy(workspace);
    return exit_status;
}
