/* core.c - the C core alone, for tools that watch a program.
 *
 *     core threads BACKEND ROUNDS      under ThreadSanitizer (make tsan)
 *     core memory BACKEND              under valgrind (make valgrind), compiled with -DBTX_MEMCHECK
 *
 * threads: several threads with a workspace each share a Processor; they rewrite different sequences of one cache, read
 * the same ones, rewrite caches of their own, and are refused, before the work begins and in its middle. What comes out
 * must be what one thread gets, bit for bit.
 *
 * memory: all that a call may not read is made inaccessible: left padding, positions to come, blocks and pages of
 * nobody and of sequences that take no part. What it reads is defined, what it writes must be: staging memory of an
 * earlier call counts as undefined. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "internal.h"

#ifdef BTX_MEMCHECK
#include <valgrind/memcheck.h>
#else
#define VALGRIND_MAKE_MEM_NOACCESS(address, size) ((void)(address), (void)(size))
#define VALGRIND_MAKE_MEM_UNDEFINED(address, size) ((void)(address), (void)(size))
#define VALGRIND_MAKE_MEM_DEFINED(address, size) ((void)(address), (void)(size))
#define VALGRIND_CHECK_MEM_IS_DEFINED(address, size) ((void)(address), (void)(size), 0)
#endif

enum {
    LAYERS = 3,
    KV_HEADS = 2,
    QUERY_HEADS = 4,
    HEAD_DIM = 20,
    SEQUENCES = 5,
    BLOCK_SIZE = 8,
    BLOCKS = 7, /* of a sequence */
    ALL_BLOCKS = SEQUENCES * BLOCKS + 3,
    WINDOW = 16,
    PAGE_SIZE = 5,
    PAGES = 5, /* of a sequence: more than the window touches */
    TOP_K = 6,
    THREADS = 4,
    BLOCK_ELEMENTS = BLOCK_SIZE * KV_HEADS * HEAD_DIM,
    PAGE_ELEMENTS = PAGE_SIZE * QUERY_HEADS * HEAD_DIM
};

static void fail(const char *what, const char *why)
{
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static void must(btx_status status, const btx_error *error, const char *what)
{
    if (status != BTX_OK)
        fail(what, error->message);
}

static void *allocate(size_t bytes)
{
    void *memory = calloc(1, bytes);
    if (memory == NULL)
        fail("core", "out of memory");
    return memory;
}

/* ---- random numbers, weights, caches ---------------------------------------------------------------------------- */

/* Uniform in [-1, 1) (xorshift64*). */
static float uniform(uint64_t *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 2685821657736338717u) >> 40) * 0x1p-23f - 1.0f;
}

static int64_t below(uint64_t *state, int64_t limit)
{
    return (int64_t)((uniform(state) + 1.0f) * 0.5f * (float)limit) % limit;
}

static btx_processor *make_processor(const btx_backend *backend, btx_dtype weight_dtype, int unrotated)
{
    static const float inv_freq[HEAD_DIM / 2] = {1.0f, 0.4f, 0.16f, 0.06f, 0.025f, 0.01f, 4e-3f, 1.6e-3f, 6e-4f, 2e-4f};
    const btx_config config = {
        .num_layers = LAYERS,
        .num_kv_heads = KV_HEADS,
        .num_query_heads = QUERY_HEADS,
        .head_dim = HEAD_DIM,
        .processor_dim = 36,
        .processor_heads = 3,
        .processor_mlp_dim = 41,
        .top_k = TOP_K,
        .recent_window = WINDOW,
        .norm_eps = 1e-6f,
        .key_space = unrotated ? BTX_KEYS_UNROTATED : BTX_KEYS_ROTATED,
        .rope_inv_freq = unrotated ? inv_freq : NULL,
        .weight_dtype = weight_dtype,
    };
    btx_tensor weights[LAYERS * BTX_NUM_WEIGHTS];
    btx_processor *processor = NULL;
    btx_error error = {{0}};
    uint64_t state = 7;
    for (int i = 0; i < LAYERS * BTX_NUM_WEIGHTS; i++) {
        int64_t shape[2] = {1, 1};
        const int32_t num_dims = btx_weight_shape(&config, (btx_weight)(i % BTX_NUM_WEIGHTS), shape);
        float *data = allocate((size_t)(shape[0] * shape[1]) * sizeof *data);
        for (int64_t j = 0; j < shape[0] * shape[1]; j++)
            data[j] = num_dims == 2 ? uniform(&state) / sqrtf((float)shape[1]) : 1.0f + 0.1f * uniform(&state);
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, shape);
    }
    must(btx_processor_create(backend, 0, &config, weights, &processor, &error), &error, "btx_processor_create");
    for (int i = 0; i < LAYERS * BTX_NUM_WEIGHTS; i++)
        free(weights[i].data);
    return processor;
}

/* Caches of SEQUENCES sequences, each with a step that has ended. Every buffer is owned. */
typedef struct caches {
    btx_dtype dtype;
    size_t size; /* of an element */
    char *keys[LAYERS], *values[LAYERS], *queries[LAYERS];
    btx_tensor key_views[LAYERS], value_views[LAYERS], query_views[LAYERS];
    btx_kv_cache kv_cache;
    btx_query_cache query_cache;
    int32_t block_table[SEQUENCES][BLOCKS];
    int32_t query_table[SEQUENCES][PAGES];
    btx_step steps[SEQUENCES];
} caches;

static const size_t all_elements = (size_t)ALL_BLOCKS * BLOCK_ELEMENTS;
static const size_t all_query_elements = (size_t)SEQUENCES * PAGES * PAGE_ELEMENTS;

static char *make_elements(btx_dtype dtype, size_t count, uint64_t *state)
{
    const size_t size = btx_dtype_size(dtype);
    char *made = allocate(count * size);
    for (size_t i = 0; i < count; i++) {
        const float value = 2.0f * uniform(state);
        if (dtype == BTX_F32)
            ((float *)(void *)made)[i] = value;
        else
            ((uint16_t *)(void *)made)[i] = btx_f32_to_bf16(value);
    }
    return made;
}

/* A random permutation of 0 ... count - 1, its first entries to out. */
static void shuffle(int32_t *out, int64_t wanted, int64_t count, uint64_t *state)
{
    int32_t *all = allocate((size_t)count * sizeof *all);
    for (int64_t i = 0; i < count; i++)
        all[i] = (int32_t)i;
    for (int64_t i = 0; i < wanted; i++) {
        const int64_t j = i + below(state, count - i);
        const int32_t chosen = all[j];
        all[j] = all[i];
        out[i] = all[i] = chosen;
    }
    free(all);
}

static caches *make_caches(btx_dtype dtype, uint64_t seed)
{
    uint64_t state = 2 * seed + 1;
    const int64_t kv_shape[4] = {ALL_BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM};
    const int64_t query_shape[4] = {SEQUENCES * PAGES, PAGE_SIZE, QUERY_HEADS, HEAD_DIM};
    caches *made = allocate(sizeof *made);
    made->dtype = dtype;
    made->size = btx_dtype_size(dtype);
    for (int layer = 0; layer < LAYERS; layer++) {
        made->keys[layer] = make_elements(dtype, all_elements, &state);
        made->values[layer] = make_elements(dtype, all_elements, &state);
        made->queries[layer] = make_elements(dtype, all_query_elements, &state);
        made->key_views[layer] = btx_tensor_contiguous(made->keys[layer], dtype, 4, kv_shape);
        made->value_views[layer] = btx_tensor_contiguous(made->values[layer], dtype, 4, kv_shape);
        made->query_views[layer] = btx_tensor_contiguous(made->queries[layer], dtype, 4, query_shape);
    }
    made->kv_cache = (btx_kv_cache){LAYERS, made->key_views, made->value_views};
    made->query_cache = (btx_query_cache){LAYERS, made->query_views};
    shuffle(&made->block_table[0][0], SEQUENCES * BLOCKS, ALL_BLOCKS, &state);
    shuffle(&made->query_table[0][0], SEQUENCES * PAGES, SEQUENCES * PAGES, &state);
    for (int64_t s = 0; s < SEQUENCES; s++) {
        const int64_t begin = below(&state, 12), end = begin + 1 + below(&state, BLOCKS * BLOCK_SIZE - begin);
        made->steps[s] = (btx_step){s, begin, begin + below(&state, end - begin), end, 0};
    }
    return made;
}

static void free_caches(caches *made)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        free(made->keys[layer]);
        free(made->values[layer]);
        free(made->queries[layer]);
    }
    free(made);
}

static btx_boundary boundary_of(caches *of, int64_t first, int64_t num_steps)
{
    const int64_t block_shape[2] = {SEQUENCES, BLOCKS}, query_shape[2] = {SEQUENCES, PAGES};
    return (btx_boundary){
        .kv_cache = &of->kv_cache,
        .query_cache = &of->query_cache,
        .steps = &of->steps[first],
        .num_steps = num_steps,
        .block_table = btx_tensor_contiguous(of->block_table, BTX_I32, 2, block_shape),
        .query_table = btx_tensor_contiguous(of->query_table, BTX_I32, 2, query_shape),
    };
}

static void check_same(const caches *found, const caches *wanted, const char *what)
{
    for (int layer = 0; layer < LAYERS; layer++) {
        if (memcmp(found->keys[layer], wanted->keys[layer], all_elements * wanted->size) != 0 ||
            memcmp(found->values[layer], wanted->values[layer], all_elements * wanted->size) != 0)
            fail(what, "the cache differs from what one thread makes of it");
    }
}

static int64_t window_begin(const btx_step *step)
{
    const int64_t length = step->step_end - step->step_begin;
    return step->step_end - (length < WINDOW ? length : WINDOW);
}

static int64_t longest_prior(const caches *of)
{
    int64_t longest = 0;
    for (int64_t s = 0; s < SEQUENCES; s++) {
        const int64_t prior = window_begin(&of->steps[s]) - of->steps[s].sequence_begin;
        longest = prior > longest ? prior : longest;
    }
    return longest;
}

static btx_workspace *make_workspace(const btx_backend *backend, int num_threads)
{
    btx_workspace *workspace = NULL;
    btx_error error = {{0}};
    must(btx_workspace_create(backend, 0, num_threads, &workspace, &error), &error, "btx_workspace_create");
    return workspace;
}

/* ---- threads ----------------------------------------------------------------------------------------------------- */

typedef struct task {
    int index;
    uint64_t round;
    const btx_backend *backend;
    const btx_processor *processor;
    caches *shared;
    const caches *wanted, *original;
    pthread_barrier_t *barrier;
} task;

static void measure(const task *task, btx_workspace *workspace)
{
    const int64_t shape[3] = {LAYERS, SEQUENCES, longest_prior(task->original)};
    float *mass = allocate((size_t)(shape[0] * shape[1] * shape[2] + 1) * sizeof *mass);
    btx_tensor out = btx_tensor_contiguous(mass, BTX_F32, 3, shape);
    const btx_boundary boundary = boundary_of(task->shared, 0, SEQUENCES);
    btx_error error = {{0}};
    must(btx_attention_mass(task->backend, workspace, &boundary, WINDOW, &out, &error), &error, "btx_attention_mass");
    if (btx_attention_mass(task->backend, NULL, &boundary, WINDOW, &out, &error) != BTX_INVALID_ARGUMENT)
        fail("btx_attention_mass", "no workspace was not refused");
    free(mass);
}

/* A cache of the thread's own, first with what has to be refused. */
static void rewrite_own(const task *task, btx_workspace *workspace, const btx_processor *processor)
{
    caches *own = make_caches(task->wanted->dtype, task->round), *untouched = make_caches(own->dtype, task->round);
    btx_boundary boundary = boundary_of(own, 0, SEQUENCES);
    const btx_step *step = &own->steps[task->index];
    int32_t *block = &own->block_table[task->index][(step->step_end - 1) / BLOCK_SIZE], right = *block;
    btx_error error = {{0}};
    *block = ALL_BLOCKS;
    if (btx_rewrite(processor, workspace, &boundary, NULL, &error) != BTX_INVALID_ARGUMENT)
        fail("btx_rewrite", "a block that does not exist was not refused");
    *block = right;
    /* Found by whichever thread comes to it, while others compute. */
    const int64_t position = step->step_end - 1, row = right * BLOCK_SIZE + position % BLOCK_SIZE;
    char *value = own->values[1] + (size_t)row * KV_HEADS * HEAD_DIM * own->size, kept[4];
    const float nan = NAN;
    const uint16_t half_nan = 0x7fc0;
    memcpy(kept, value, own->size);
    memcpy(value, own->dtype == BTX_F32 ? (const void *)&nan : (const void *)&half_nan, own->size);
    if (btx_rewrite(processor, workspace, &boundary, NULL, &error) != BTX_INVALID_ARGUMENT ||
        strstr(error.message, "is not finite") == NULL)
        fail("btx_rewrite", "a value that is not a number was not refused");
    memcpy(value, kept, own->size);
    check_same(own, untouched, "after refusals");
    must(btx_rewrite(processor, workspace, &boundary, NULL, &error), &error, "btx_rewrite");
    check_same(own, task->wanted, "a cache of a thread's own");
    free_caches(own);
    free_caches(untouched);
}

static void *work(void *argument)
{
    const task *task = argument;
    btx_workspace *workspace = make_workspace(task->backend, 1 + task->index % 3);
    const btx_boundary boundary = boundary_of(task->shared, task->index, 1);
    btx_error error = {{0}};
    pthread_barrier_wait(task->barrier);
    measure(task, workspace);
    pthread_barrier_wait(task->barrier); /* from here on it is written */
    must(btx_rewrite(task->processor, workspace, &boundary, NULL, &error), &error, "btx_rewrite");
    rewrite_own(task, workspace, task->processor);
    btx_workspace_destroy(workspace);
    workspace = make_workspace(task->backend, 3);
    btx_processor *own = make_processor(task->backend, btx_processor_config(task->processor)->weight_dtype,
                                        btx_processor_config(task->processor)->key_space == BTX_KEYS_UNROTATED);
    rewrite_own(task, workspace, own);
    btx_processor_destroy(own);
    btx_workspace_destroy(workspace);
    return NULL;
}

static void run_threads(const btx_backend *backend, uint64_t round)
{
    const btx_dtype dtype = round % 2 ? BTX_F32 : BTX_BF16;
    btx_processor *processor = make_processor(backend, round / 2 % 2 ? BTX_F32 : BTX_BF16, round / 4 % 2);
    caches *original = make_caches(dtype, round), *wanted = make_caches(dtype, round);
    caches *shared = make_caches(dtype, round);
    btx_workspace *workspace = make_workspace(backend, 1);
    btx_error error = {{0}};
    btx_boundary all = boundary_of(wanted, 0, SEQUENCES), last = boundary_of(shared, THREADS, SEQUENCES - THREADS);
    must(btx_rewrite(processor, workspace, &all, NULL, &error), &error, "btx_rewrite");
    pthread_t threads[THREADS];
    task tasks[THREADS];
    pthread_barrier_t barrier;
    pthread_barrier_init(&barrier, NULL, THREADS);
    for (int i = 0; i < THREADS; i++) {
        tasks[i] = (task){i, round, backend, processor, shared, wanted, original, &barrier};
        if (pthread_create(&threads[i], NULL, work, &tasks[i]) != 0)
            fail("core", "no thread could be started");
    }
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    pthread_barrier_destroy(&barrier);
    must(btx_rewrite(processor, workspace, &last, NULL, &error), &error, "btx_rewrite");
    check_same(shared, wanted, "a cache that threads share");
    btx_workspace_destroy(workspace);
    btx_processor_destroy(processor);
    free_caches(original);
    free_caches(wanted);
    free_caches(shared);
}

/* ---- memory ------------------------------------------------------------------------------------------------------ */

/* Forbids all but what the steps [first, first + count) may read. */
static void forbid_the_rest(const caches *of, int64_t first, int64_t count)
{
    const size_t row = (size_t)KV_HEADS * HEAD_DIM * of->size, query_row = (size_t)QUERY_HEADS * HEAD_DIM * of->size;
    for (int layer = 0; layer < LAYERS; layer++) {
        VALGRIND_MAKE_MEM_NOACCESS(of->keys[layer], all_elements * of->size);
        VALGRIND_MAKE_MEM_NOACCESS(of->values[layer], all_elements * of->size);
        VALGRIND_MAKE_MEM_NOACCESS(of->queries[layer], all_query_elements * of->size);
        for (int64_t s = first; s < first + count; s++) {
            const btx_step *step = &of->steps[s];
            for (int64_t p = step->sequence_begin; p < step->step_end; p++) {
                const size_t at = (size_t)(of->block_table[s][p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE);
                VALGRIND_MAKE_MEM_DEFINED(of->keys[layer] + at * row, row);
                VALGRIND_MAKE_MEM_DEFINED(of->values[layer] + at * row, row);
            }
            for (int64_t p = window_begin(step); p < step->step_end; p++) {
                const size_t at = (size_t)(of->query_table[s][p / PAGE_SIZE % PAGES] * PAGE_SIZE + p % PAGE_SIZE);
                VALGRIND_MAKE_MEM_DEFINED(of->queries[layer] + at * query_row, query_row);
            }
        }
    }
}

/* Returns it with every row that the steps may have written looked at. */
static void allow_all(const caches *of, int64_t first, int64_t count)
{
    const size_t row = (size_t)KV_HEADS * HEAD_DIM * of->size;
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int64_t s = first; s < first + count; s++) {
            for (int64_t p = of->steps[s].sequence_begin; p < of->steps[s].step_end; p++) {
                const size_t at = (size_t)(of->block_table[s][p / BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE);
                if (VALGRIND_CHECK_MEM_IS_DEFINED(of->keys[layer] + at * row, row) != 0 ||
                    VALGRIND_CHECK_MEM_IS_DEFINED(of->values[layer] + at * row, row) != 0)
                    fail("btx_rewrite", "what was written depends on memory that nobody has written");
            }
        }
        VALGRIND_MAKE_MEM_DEFINED(of->keys[layer], all_elements * of->size);
        VALGRIND_MAKE_MEM_DEFINED(of->values[layer], all_elements * of->size);
        VALGRIND_MAKE_MEM_DEFINED(of->queries[layer], all_query_elements * of->size);
    }
}

/* One call with this workspace, whose memory counts as never written. */
static void rewrite_watched(const btx_processor *processor, btx_workspace *workspace, caches *of, int64_t first,
                            int64_t count, float max_relative_edit)
{
    int64_t recalled[LAYERS][SEQUENCES][TOP_K];
    float norms[2][LAYERS][SEQUENCES];
    int32_t skipped[SEQUENCES];
    const int64_t shape[3] = {LAYERS, count, TOP_K}, skipped_shape[1] = {count};
    btx_report report = {
        .recalled = btx_tensor_contiguous(recalled, BTX_I64, 3, shape),
        .delta_norm = btx_tensor_contiguous(norms[0], BTX_F32, 2, shape),
        .row_norm = btx_tensor_contiguous(norms[1], BTX_F32, 2, shape),
        .skipped = btx_tensor_contiguous(skipped, BTX_I32, 1, skipped_shape),
    };
    btx_boundary boundary = boundary_of(of, first, count);
    btx_error error = {{0}};
    boundary.max_relative_edit = max_relative_edit;
    if (btx_workspace_bytes(workspace) > 0)
        VALGRIND_MAKE_MEM_UNDEFINED(btx_workspace_memory(workspace), btx_workspace_bytes(workspace));
    forbid_the_rest(of, first, count);
    must(btx_rewrite(processor, workspace, &boundary, &report, &error), &error, "btx_rewrite");
    allow_all(of, first, count);
    if (VALGRIND_CHECK_MEM_IS_DEFINED(recalled, sizeof recalled[0][0] * (size_t)(LAYERS * count)) != 0 ||
        VALGRIND_CHECK_MEM_IS_DEFINED(norms[0], sizeof(float) * (size_t)(LAYERS * count)) != 0 ||
        VALGRIND_CHECK_MEM_IS_DEFINED(norms[1], sizeof(float) * (size_t)(LAYERS * count)) != 0 ||
        VALGRIND_CHECK_MEM_IS_DEFINED(skipped, sizeof(int32_t) * (size_t)count) != 0)
        fail("btx_report", "it holds what nobody has written");
}

static void capture_watched(const btx_backend *backend, btx_dtype dtype)
{
    enum { TOKENS = 7, MAPPED = 3 };
    const int64_t query_shape[3] = {TOKENS, QUERY_HEADS, HEAD_DIM}, slot_shape[1] = {TOKENS}, block_shape[1] = {MAPPED};
    const int64_t page_shape[4] = {MAPPED, PAGE_SIZE, QUERY_HEADS, HEAD_DIM};
    const size_t size = btx_dtype_size(dtype), row = (size_t)QUERY_HEADS * HEAD_DIM * size;
    int64_t slots[TOKENS] = {4, -1, 0, 11, -3, 14, 10};
    int32_t block_to_page[MAPPED] = {2, -1, 0};
    uint64_t state = 5;
    char *query = make_elements(dtype, (size_t)TOKENS * QUERY_HEADS * HEAD_DIM, &state);
    char *pages = allocate((size_t)MAPPED * PAGE_ELEMENTS * size);
    const btx_tensor query_view = btx_tensor_contiguous(query, dtype, 3, query_shape);
    const btx_tensor slot_view = btx_tensor_contiguous(slots, BTX_I64, 1, slot_shape);
    const btx_tensor block_view = btx_tensor_contiguous(block_to_page, BTX_I32, 1, block_shape);
    const btx_tensor page_view = btx_tensor_contiguous(pages, dtype, 4, page_shape);
    btx_error error = {{0}};
    VALGRIND_MAKE_MEM_NOACCESS(pages, (size_t)MAPPED * PAGE_ELEMENTS * size);
    for (int token = 0; token < TOKENS; token++) {
        const int64_t page = slots[token] < 0 ? -1 : block_to_page[slots[token] / PAGE_SIZE];
        if (page < 0)
            VALGRIND_MAKE_MEM_NOACCESS(query + (size_t)token * row, row);
        else
            VALGRIND_MAKE_MEM_UNDEFINED(pages + (size_t)(page * PAGE_SIZE + slots[token] % PAGE_SIZE) * row, row);
    }
    must(btx_capture_queries(backend, 0, &query_view, &slot_view, &block_view, &page_view, NULL, &error), &error,
         "btx_capture_queries");
    VALGRIND_MAKE_MEM_DEFINED(query, (size_t)TOKENS * row);
    for (int token = 0; token < TOKENS; token++) {
        const int64_t page = slots[token] < 0 ? -1 : block_to_page[slots[token] / PAGE_SIZE];
        const char *captured = pages + (size_t)(page * PAGE_SIZE + slots[token] % PAGE_SIZE) * row;
        if (page >= 0 && memcmp(captured, query + (size_t)token * row, row) != 0)
            fail("btx_capture_queries", "a query is not where it belongs");
    }
    free(query);
    free(pages);
}

static int64_t run_memory(const btx_backend *backend)
{
    int64_t num_calls = 0;
    for (int variant = 0; variant < 8; variant++) {
        const btx_dtype dtype = variant % 2 ? BTX_F32 : BTX_BF16;
        btx_processor *processor = make_processor(backend, variant / 2 % 2 ? BTX_F32 : BTX_BF16, variant / 4);
        btx_workspace *workspace = make_workspace(backend, 1);
        for (uint64_t seed = 0; seed < 3; seed++) {
            caches *of = make_caches(dtype, seed);
            rewrite_watched(processor, workspace, of, 0, SEQUENCES, 0.0f); /* the largest first: later ones reuse it */
            rewrite_watched(processor, workspace, of, 1, 1, 0.0f);
            rewrite_watched(processor, workspace, of, 2, 2, 0.3f);
            num_calls += 3;
            free_caches(of);
        }
        btx_workspace_destroy(workspace);
        btx_processor_destroy(processor);
        capture_watched(backend, dtype);
        num_calls++;
    }
    return num_calls;
}

int main(int argc, char **argv)
{
    const btx_backend *backend = NULL;
    int32_t device_index = 0;
    btx_error error = {{0}};
    const int threads = argc == 4 && strcmp(argv[1], "threads") == 0;
    if (!threads && !(argc == 3 && strcmp(argv[1], "memory") == 0)) {
        fprintf(stderr, "usage: %s threads BACKEND ROUNDS | memory BACKEND\n", argv[0]);
        return 2;
    }
    must(btx_backend_find(argv[2], &backend, &device_index, &error), &error, "btx_backend_find");
    if (threads) {
        const long rounds = strtol(argv[3], NULL, 10);
        for (long round = 0; round < rounds; round++)
            run_threads(backend, (uint64_t)round);
        printf("%s: %ld rounds of %d threads, no difference\n", argv[2], rounds, (int)THREADS);
        return 0;
    }
    const int64_t num_calls = run_memory(backend);
    printf("%s: %lld calls read nothing that they may not, and wrote nothing that is undefined\n", argv[2],
           (long long)num_calls);
    return 0;
}
