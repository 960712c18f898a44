/* fault.c - what becomes of the caches, and of memory, when something fails (test_fault.py).
 *
 * A life is everything the C API does: a Processor, a workspace, query capture, attention mass, boundaries with a
 * report and without, a selection, a product, and the end of it all. It is lived again and again, and each time one
 * thing fails: the n-th allocation, for every n; or the n-th call of the backend's table, for every n and every status,
 * where the backend is the scalar one under another name, once as a CPU and once as a device with memory of its own.
 *
 *   - A call that fails for want of memory says so, and the same call, made again, gives what it gives otherwise.
 *   - Unless the status is REBUILD_NEEDED, the caches are as they were before the call, bit for bit; and it is
 *     REBUILD_NEEDED from the first call of write_kv on.
 *   - In the end nothing is left allocated.
 *
 * The linker hands over all that the core allocates (-Wl,--wrap=malloc and so on), in whatever file it does so; this
 * file allocates nothing. Prints a line per check that fails; exit status 0 when none does. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/cpu/cpu.h"
#include "inputs.h"

enum {
    LAYERS = 3,
    KV_HEADS = 2,
    QUERY_HEADS = 4,
    HEAD_DIM = 8,
    WIDTH = 2 * KV_HEADS * HEAD_DIM,
    TOP_K = 4,
    WINDOW = 6,
    SEQUENCES = 3,
    BLOCK_SIZE = 8,
    BLOCKS = 5, /* of a sequence */
    CACHE_SIZE = SEQUENCES * BLOCKS * BLOCK_SIZE * KV_HEADS * HEAD_DIM,
    QUERY_SIZE = SEQUENCES * WINDOW * QUERY_HEADS * HEAD_DIM,
    MAX_PRIOR = BLOCKS * BLOCK_SIZE,
    NUM_STATUSES = BTX_REBUILD_NEEDED + 1,
};

static int num_failed;

#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("fault.c:%d: not so: %s: ", __LINE__, #condition);                                                  \
            printf(__VA_ARGS__);                                                                                       \
            printf("\n");                                                                                              \
            num_failed++;                                                                                              \
        }                                                                                                              \
    } while (0)

/* ---- allocations that fail ------------------------------------------------------------------------------ */

static atomic_long num_allocations, num_live, num_threads_started;
static long failing_allocation, failing_thread; /* counted from 1; 0: none */

void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t bytes);
int __real_posix_memalign(void **memory, size_t alignment, size_t bytes);
void __real_free(void *memory);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);
void *__wrap_malloc(size_t bytes);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t bytes);
int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes);
void __wrap_free(void *memory);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument);

static int allocation_fails(void)
{
    return atomic_fetch_add(&num_allocations, 1) + 1 == failing_allocation;
}

static void *counted(void *memory)
{
    atomic_fetch_add(&num_live, memory != NULL);
    return memory;
}

void *__wrap_malloc(size_t bytes)
{
    return allocation_fails() ? NULL : counted(__real_malloc(bytes));
}

void *__wrap_calloc(size_t count, size_t size)
{
    return allocation_fails() ? NULL : counted(__real_calloc(count, size));
}

void *__wrap_realloc(void *memory, size_t bytes)
{
    if (allocation_fails())
        return NULL;
    void *grown = __real_realloc(memory, bytes);
    return memory == NULL ? counted(grown) : grown;
}

int __wrap_posix_memalign(void **memory, size_t alignment, size_t bytes)
{
    if (allocation_fails())
        return 12; /* ENOMEM; *memory is left as it was, as POSIX allows */
    int failed = __real_posix_memalign(memory, alignment, bytes);
    atomic_fetch_add(&num_live, failed == 0);
    return failed;
}

void __wrap_free(void *memory)
{
    atomic_fetch_sub(&num_live, memory != NULL);
    __real_free(memory);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*main)(void *), void *argument)
{
    if (atomic_fetch_add(&num_threads_started, 1) + 1 == failing_thread)
        return 11; /* EAGAIN */
    return __real_pthread_create(thread, attributes, main, argument);
}

/* ---- a backend that fails ------------------------------------------------------------------------------- */

static const btx_backend *scalar;

/* The scalar backend is all that is needed: these stand for the others in the list of backend.c. */
static int never(void)
{
    return 0;
}

#define ABSENT(its_variant) {.name = "cpu", .variant = its_variant, .available = never}
const btx_backend btx_cpu_backend_avx2 = ABSENT("avx2");
const btx_backend btx_cpu_backend_avx512 = ABSENT("avx512");
const btx_backend btx_cpu_backend_avx512_bf16 = ABSENT("avx512_bf16");
const btx_backend btx_cpu_backend_neon = ABSENT("neon");

/* In the order of the table. */
enum {
    ALLOCATE,
    EXECUTOR_CREATE,
    EXECUTOR_RUN,
    UPLOAD,
    CHECK_WAIT,
    CHECK_GROWTH,
    BEGIN,
    DOWNLOAD,
    SYNCHRONIZE,
    ATTENTION_MASS,
    STORE_MASS,
    TOP_K_OF_MASS,
    GATHER_KV,
    ROUND,
    RMS_NORM,
    LINEAR,
    LINEAR_SWIGLU,
    ATTENTION,
    STAGE_KV,
    WRITE_KV,
    CAPTURE_QUERIES,
    NUM_FUNCTIONS
};

static const char *const function_names[NUM_FUNCTIONS] = {
    "allocate", "executor_create", "executor_run",   "upload",     "check_wait", "check_growth", "begin",
    "download", "synchronize",     "attention_mass", "store_mass", "top_k",      "gather_kv",    "round",
    "rms_norm", "linear",          "linear_swiglu",  "attention",  "stage_kv",   "write_kv",     "capture_queries",
};

static struct {
    long num_calls, failing_call; /* counted from 1; 0: none fails */
    btx_status status;
    int failed; /* the function that did, or NUM_FUNCTIONS */
    long calls_of[NUM_FUNCTIONS];
    long num_writes; /* of write_kv that were done in this call of the API */
    int write_called;
} fake;

static btx_status enter(int function, btx_error *error)
{
    fake.calls_of[function]++;
    fake.write_called |= function == WRITE_KV;
    if (++fake.num_calls != fake.failing_call)
        return BTX_OK;
    fake.failed = function;
    return btx_fail(error, fake.status, "%s failed as it was told", function_names[function]);
}

#define CALL(function, call)                                                                                           \
    do {                                                                                                               \
        btx_status status_ = enter(function, error);                                                                   \
        return status_ != BTX_OK ? status_ : (call);                                                                   \
    } while (0)

static btx_status fake_allocate(int32_t device_index, size_t bytes, void **memory, btx_error *error)
{
    *memory = NULL;
    CALL(ALLOCATE, scalar->allocate(device_index, bytes, memory, error));
}

static btx_status fake_executor_create(int32_t device_index, int32_t num_threads, void **executor, btx_error *error)
{
    *executor = NULL;
    CALL(EXECUTOR_CREATE, scalar->executor_create(device_index, num_threads, executor, error));
}

static btx_status fake_executor_run(void *executor, int64_t num_units, btx_unit_function fn, void *context,
                                    btx_error *error)
{
    CALL(EXECUTOR_RUN, scalar->executor_run(executor, num_units, fn, context, error));
}

static btx_status copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    return BTX_OK;
}

static btx_status fake_upload(int32_t device_index, void *memory, const void *from, size_t bytes, btx_error *error)
{
    (void)device_index;
    CALL(UPLOAD, copy(memory, from, bytes));
}

static btx_status fake_check_wait(void *executor, void *stream, btx_error *error)
{
    (void)executor, (void)stream;
    CALL(CHECK_WAIT, BTX_OK);
}

static btx_status fake_check_growth(void *executor, void *const *stream, btx_error *error)
{
    (void)executor, (void)stream;
    CALL(CHECK_GROWTH, BTX_OK);
}

static btx_status fake_begin(void *executor, const btx_plan *plan, void *stream, int timed, btx_error *error)
{
    (void)executor, (void)plan, (void)stream, (void)timed;
    CALL(BEGIN, BTX_OK);
}

static void fake_mark(void *executor, btx_stage stage)
{
    (void)executor, (void)stage;
}

static btx_status fake_download(void *executor, void *to, const void *memory, size_t bytes, btx_error *error)
{
    (void)executor;
    CALL(DOWNLOAD, copy(to, memory, bytes));
}

static btx_status fake_synchronize(void *executor, double *stage_seconds, btx_error *error)
{
    (void)executor, (void)stage_seconds;
    CALL(SYNCHRONIZE, BTX_OK);
}

static int64_t fake_num_skipped(const void *executor)
{
    (void)executor;
    return 0;
}

/* A device takes the mass by head, of several layers at once; the scalar backend one at a time. */
static btx_status mass_of_layers(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                                 btx_error *error)
{
    if (pass->layer_end == pass->layer_begin + 1 && pass->plan->num_layers > 1 && head_end == head_begin + 1)
        return scalar->attention_mass(pass, head_begin, head_end, mass, error);
    btx_status status = BTX_OK;
    btx_pass one = *pass;
    for (one.layer_begin = pass->layer_begin; one.layer_begin < pass->layer_end; one.layer_begin++) {
        one.layer_end = one.layer_begin + 1;
        for (int32_t head = head_begin; head < head_end && status == BTX_OK; head++, mass += btx_pass_prior(pass))
            status = scalar->attention_mass(&one, head, head + 1, mass, error);
    }
    return status;
}

static btx_status fake_mass(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass, btx_error *error)
{
    CALL(ATTENTION_MASS, scalar->attention_mass(pass, head_begin, head_end, mass, error));
}

static btx_status fake_mass_by_head(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                                    btx_error *error)
{
    CALL(ATTENTION_MASS, mass_of_layers(pass, head_begin, head_end, mass, error));
}

static btx_status fake_store_mass(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                                  btx_error *error)
{
    CALL(STORE_MASS, scalar->store_mass(pass, num_parts, mass, out, error));
}

static btx_status fake_top_k(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions, btx_error *error)
{
    CALL(TOP_K_OF_MASS, scalar->top_k(pass, num_parts, mass, positions, error));
}

static btx_status fake_gather(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight,
                              float eps, btx_dtype dtype, void *normed, btx_error *error)
{
    CALL(GATHER_KV, scalar->gather_kv(pass, positions, rows, weight, eps, dtype, normed, error));
}

static btx_status fake_round(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out,
                             btx_error *error)
{
    CALL(ROUND, scalar->round(pass, x, dim, dtype, out, error));
}

static btx_status fake_rms_norm(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                                btx_dtype dtype, void *out, btx_error *error)
{
    CALL(RMS_NORM, scalar->rms_norm(pass, x, dim, weight, eps, dtype, out, error));
}

static btx_status fake_linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate,
                              float *out, btx_error *error)
{
    CALL(LINEAR, scalar->linear(pass, weights, x, accumulate, out, error));
}

static btx_status fake_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                              btx_error *error)
{
    CALL(LINEAR_SWIGLU, scalar->linear_swiglu(pass, weights, x, out, error));
}

static btx_status fake_attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                                 void *out, btx_error *error)
{
    CALL(ATTENTION, scalar->attention(pass, qkv, dim, heads, dtype, out, error));
}

static btx_status fake_stage(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                             float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error)
{
    float unwanted[2]
                  [LAYERS * SEQUENCES]; /* a device may be asked for no norms, the scalar backend always gives them */
    CALL(STAGE_KV,
         scalar->stage_kv(pass, positions, gate, rows, delta, staged, delta_norm != NULL ? delta_norm : unwanted[0],
                          row_norm != NULL ? row_norm : unwanted[1], error));
}

static btx_status fake_write(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error)
{
    btx_status status = enter(WRITE_KV, error);
    if (status == BTX_OK)
        status = scalar->write_kv(pass, positions, staged, error);
    fake.num_writes += status == BTX_OK;
    return status;
}

static btx_status fake_capture(int32_t device_index, const btx_tensor *query, const btx_tensor *slots,
                               const btx_tensor *block_to_page, const btx_tensor *pages, void *stream, btx_error *error)
{
    CALL(CAPTURE_QUERIES, scalar->capture_queries(device_index, query, slots, block_to_page, pages, stream, error));
}

static btx_backend make_fake(int is_device)
{
    btx_backend made = *scalar;
    made.allocate = fake_allocate;
    made.executor_create = fake_executor_create;
    made.executor_run = fake_executor_run;
    made.attention_mass = fake_mass;
    made.store_mass = fake_store_mass;
    made.top_k = fake_top_k;
    made.gather_kv = fake_gather;
    made.round = fake_round;
    made.rms_norm = fake_rms_norm;
    made.linear = fake_linear;
    made.linear_swiglu = fake_swiglu;
    made.attention = fake_attention;
    made.stage_kv = fake_stage;
    made.write_kv = fake_write;
    made.capture_queries = fake_capture;
    if (!is_device)
        return made;
    made.layers_per_pass = 0;
    made.rows_per_pass = 2 * (TOP_K + WINDOW);
    made.mass_by_head = 1;
    made.attention_mass = fake_mass_by_head;
    made.upload = fake_upload;
    made.check_wait = fake_check_wait;
    made.check_growth = fake_check_growth;
    made.begin = fake_begin;
    made.mark = fake_mark;
    made.download = fake_download;
    made.synchronize = fake_synchronize;
    made.num_skipped = fake_num_skipped;
    return made;
}

/* ---- a life ------------------------------------------------------------------------------------------- */

typedef struct caches {
    float keys[LAYERS][CACHE_SIZE], values[LAYERS][CACHE_SIZE];
} caches;

typedef struct results {
    caches once, twice; /* after the boundary with a report, and after that without */
    int64_t recalled[LAYERS * SEQUENCES * TOP_K], best[TOP_K];
    float norms[2][LAYERS * SEQUENCES];
    int32_t skipped[SEQUENCES];
    float mass[LAYERS * SEQUENCES * MAX_PRIOR];
    float product[2 * 3];
} results;

static caches original, now;
static float queries[LAYERS][QUERY_SIZE];
static float weight_data[LAYERS * 4096];
static btx_tensor weights[LAYERS * BTX_NUM_WEIGHTS];
static results got, wanted;

static const btx_config config = {
    .num_layers = LAYERS,
    .num_kv_heads = KV_HEADS,
    .num_query_heads = QUERY_HEADS,
    .head_dim = HEAD_DIM,
    .processor_dim = 12,
    .processor_heads = 3,
    .processor_mlp_dim = 10,
    .top_k = TOP_K,
    .recent_window = WINDOW,
    .norm_eps = 1e-6f,
    .key_space = BTX_KEYS_UNROTATED,
    .rope_inv_freq = (const float[HEAD_DIM / 2]){1.0f, 0.3f, 0.1f, 0.03f},
};

static const btx_step steps[SEQUENCES] = {
    {.sequence = 0, .step_begin = 30, .step_end = 39},
    {.sequence = 2, .sequence_begin = 3, .step_begin = 9, .step_end = 13},
    {.sequence = 1, .step_begin = 0, .step_end = 4},
};

static void make_inputs(void)
{
    fill(&original.keys[0][0], LAYERS * CACHE_SIZE, 1.0f);
    fill(&original.values[0][0], LAYERS * CACHE_SIZE, 1.0f);
    fill(&queries[0][0], LAYERS * QUERY_SIZE, 1.0f);
    fill_weights(&config, weights, weight_data, 0.5f);
}

typedef struct setting {
    const btx_backend *backend;
    int32_t num_threads;
    float max_relative_edit;
    int lacks_memory; /* an allocation is to fail */
} setting;

/* A failure is known to be one, and left the caches as they were; returns whether the same call is to be made again. */
static int check_status(const setting *with, const char *call, btx_status status, const caches *before)
{
    static const char *const names[] = {"OK",           "INVALID_ARGUMENT", "UNSUPPORTED", "OUT_OF_MEMORY",
                                        "DEVICE_ERROR", "REBUILD_NEEDED"};
    if (with->lacks_memory) {
        CHECK(status == BTX_OK || status == BTX_OUT_OF_MEMORY, "%s, allocation %ld: %s", call, failing_allocation,
              names[status]);
    }
    else if (status != BTX_OK) {
        const int rewrites = strncmp(call, "rewrite", 7) == 0, failed = fake.failed;
        const int is_late = rewrites && (failed == WRITE_KV || failed == DOWNLOAD || fake.write_called);
        const int refused = is_late && failed == SYNCHRONIZE && fake.status == BTX_INVALID_ARGUMENT;
        const int may_be_late = rewrites && failed == EXECUTOR_RUN; /* which may have been that of the write */
        CHECK(status == (is_late && !refused ? BTX_REBUILD_NEEDED : fake.status) ||
                  (may_be_late && status == BTX_REBUILD_NEEDED),
              "%s: %s failed with %s, which was told as %s", call, function_names[failed], names[fake.status],
              names[status]);
        if (refused) /* a device that says so has written nothing (device.c); this one has */
            return 0;
    }
    if (status != BTX_OK && status != BTX_REBUILD_NEEDED)
        CHECK(memcmp(&now, before, sizeof now) == 0, "%s wrote to the caches and told %s", call, names[status]);
    return status == BTX_OUT_OF_MEMORY && with->lacks_memory;
}

/* Runs a call of the API, and once more where memory lacked; leaves the function on any other failure. */
#define LIVE(call_name, expression)                                                                                    \
    do {                                                                                                               \
        for (int again = 1; again; again--) {                                                                          \
            before = now;                                                                                              \
            fake.write_called = 0, fake.num_writes = 0;                                                                \
            status = (expression);                                                                                     \
            again += check_status(with, call_name, status, &before);                                                   \
        }                                                                                                              \
        if (status != BTX_OK)                                                                                          \
            goto cleanup;                                                                                              \
    } while (0)

static btx_status live(const setting *with, results *out)
{
    static caches before;
    btx_processor *processor = NULL;
    btx_workspace *workspace = NULL;
    btx_packed_linear *linear = NULL;
    btx_error error = {{0}};
    btx_status status;
    const btx_device device = {with->backend->device_type, 0};
    btx_tensor keys[LAYERS], values[LAYERS], query_views[LAYERS];
    int32_t block_table[SEQUENCES * BLOCKS], query_table[SEQUENCES] = {2, 0, 1};
    const int64_t kv_shape[4] = {SEQUENCES * BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM};
    const int64_t query_shape[4] = {SEQUENCES, WINDOW, QUERY_HEADS, HEAD_DIM};
    for (int layer = 0; layer < LAYERS; layer++) {
        keys[layer] = btx_tensor_contiguous(now.keys[layer], BTX_F32, 4, kv_shape);
        values[layer] = btx_tensor_contiguous(now.values[layer], BTX_F32, 4, kv_shape);
        query_views[layer] = btx_tensor_contiguous(queries[layer], BTX_F32, 4, query_shape);
    }
    for (int i = 0; i < SEQUENCES * BLOCKS; i++)
        block_table[i] = (i * 7) % (SEQUENCES * BLOCKS);
    const btx_kv_cache kv_cache = {LAYERS, keys, values};
    const btx_query_cache query_cache = {LAYERS, query_views};
    const int64_t table_shape[2] = {SEQUENCES, BLOCKS}, page_shape[2] = {SEQUENCES, 1};
    const btx_boundary boundary = {
        .kv_cache = &kv_cache,
        .query_cache = &query_cache,
        .steps = steps,
        .num_steps = SEQUENCES,
        .block_table = btx_tensor_contiguous(block_table, BTX_I32, 2, table_shape),
        .query_table = btx_tensor_contiguous(query_table, BTX_I32, 2, page_shape),
        .max_relative_edit = with->max_relative_edit,
    };
    const int64_t shape[3] = {LAYERS, SEQUENCES, TOP_K}, mass_shape[3] = {LAYERS, SEQUENCES, 39 - WINDOW};
    const int64_t step_shape[1] = {SEQUENCES};
    btx_report report = {
        .recalled = btx_tensor_contiguous(out->recalled, BTX_I64, 3, shape),
        .delta_norm = btx_tensor_contiguous(out->norms[0], BTX_F32, 2, shape),
        .row_norm = btx_tensor_contiguous(out->norms[1], BTX_F32, 2, shape),
        .skipped = btx_tensor_contiguous(out->skipped, BTX_I32, 1, step_shape),
    };
    btx_tensor mass = btx_tensor_contiguous(out->mass, BTX_F32, 3, mass_shape);
    now = original;

    LIVE("processor_create", btx_processor_create(with->backend, 0, &config, weights, &processor, &error));
    LIVE("workspace_create", btx_workspace_create(with->backend, 0, with->num_threads, &workspace, &error));
    LIVE("workspace_reserve", btx_workspace_reserve(workspace, 100, &error));
    {
        const int64_t token_shape[3] = {1, QUERY_HEADS, HEAD_DIM}, one[1] = {1};
        int64_t slots[1] = {3};
        int32_t pages[1] = {0};
        btx_tensor token = btx_tensor_contiguous(&queries[0][3 * QUERY_HEADS * HEAD_DIM], BTX_F32, 3, token_shape);
        btx_tensor slot = btx_tensor_contiguous(slots, BTX_I64, 1, one);
        btx_tensor page = btx_tensor_contiguous(pages, BTX_I32, 1, one);
        btx_tensor to = query_views[0]; /* itself, to itself */
        token.device = slot.device = page.device = to.device = device;
        LIVE("capture_queries", btx_capture_queries(with->backend, 0, &token, &slot, &page, &to, NULL, &error));
    }
    LIVE("attention_mass", btx_attention_mass(with->backend, workspace, &boundary, WINDOW, &mass, &error));
    LIVE("rewrite, with a report", btx_rewrite(processor, workspace, &boundary, &report, &error));
    out->once = now;
    LIVE("rewrite, without a report", btx_rewrite(processor, workspace, &boundary, NULL, &error));
    LIVE("synchronize", btx_workspace_synchronize(workspace, &error));
    out->twice = now;
    if (with->backend->begin == NULL) { /* these two are the host's alone */
        const int64_t row_shape[2] = {1, 33}, lengths_shape[1] = {1}, best_shape[2] = {1, TOP_K};
        const int64_t linear_shape[3] = {2, 3, 5}, x_shape[3] = {2, 1, 5}, out_shape[3] = {2, 1, 3};
        int64_t lengths[1] = {33};
        btx_tensor row = btx_tensor_contiguous(out->mass, BTX_F32, 2, row_shape);
        btx_tensor length = btx_tensor_contiguous(lengths, BTX_I64, 1, lengths_shape);
        btx_tensor best = btx_tensor_contiguous(out->best, BTX_I64, 2, best_shape);
        btx_tensor weight = btx_tensor_contiguous(weight_data, BTX_F32, 3, linear_shape);
        btx_tensor bias = btx_tensor_contiguous(weight_data + 30, BTX_F32, 2, linear_shape);
        btx_tensor x = btx_tensor_contiguous(weight_data + 40, BTX_F32, 3, x_shape);
        btx_tensor product = btx_tensor_contiguous(out->product, BTX_F32, 3, out_shape);
        LIVE("select_top_k", btx_select_top_k(with->backend, &row, &length, &best, &error));
        LIVE("linear_create", btx_packed_linear_create(with->backend, &weight, &bias, BTX_F32, &linear, &error));
        LIVE("linear_apply", btx_packed_linear_apply(linear, workspace, &x, 0, &product, &error));
    }

cleanup:
    if (status != BTX_OK)
        CHECK(error.message[0] != '\0', "a failure without a sentence");
    btx_packed_linear_destroy(linear);
    btx_workspace_destroy(workspace);
    btx_processor_destroy(processor);
    CHECK(atomic_load(&num_live) == 0, "%ld allocations are left", atomic_load(&num_live));
    return status;
}

/* ---- lives ------------------------------------------------------------------------------------------------ */

static void reset(void)
{
    memset(&got, 0, sizeof got);
    memset(&fake, 0, sizeof fake);
    fake.failed = NUM_FUNCTIONS;
    atomic_store(&num_allocations, 0);
    atomic_store(&num_threads_started, 0);
    failing_allocation = failing_thread = 0;
}

/* What comes out when nothing fails. */
static void live_well(const setting *with)
{
    reset();
    memset(&wanted, 0, sizeof wanted);
    CHECK(live(with, &wanted) == BTX_OK, "a life without a failure");
    CHECK(memcmp(&wanted.once, &original, sizeof original) != 0, "the boundary wrote nothing");
    CHECK(memcmp(&wanted.twice, &wanted.once, sizeof original) != 0, "the second boundary wrote nothing");
}

static long fail_allocations(const setting *with)
{
    live_well(with);
    const long count = atomic_load(&num_allocations), threads = atomic_load(&num_threads_started);
    setting lacking = *with;
    lacking.lacks_memory = 1;
    for (long n = 1; n <= count; n++) {
        reset();
        failing_allocation = n;
        CHECK(live(&lacking, &got) == BTX_OK, "allocation %ld: the second try failed", n);
        CHECK(memcmp(&got, &wanted, sizeof got) == 0, "allocation %ld: the second try gave something else", n);
        CHECK(atomic_load(&num_allocations) > n, "allocation %ld was not asked for", n);
    }
    for (long n = 1; n <= threads; n++) { /* fewer threads are slower, not an error */
        reset();
        failing_thread = n;
        CHECK(live(with, &got) == BTX_OK, "thread %ld", n);
        CHECK(memcmp(&got, &wanted, sizeof got) == 0, "thread %ld: the results differ", n);
    }
    return count + threads;
}

static struct {
    long lives, rebuilds, partly_written;
} seen;

static void fail_backend(const setting *with)
{
    live_well(with);
    const long count = fake.num_calls;
    const int is_device = with->backend->begin != NULL;
    for (int function = 0; function < NUM_FUNCTIONS; function++) {
        const int of_devices = function == UPLOAD || function == CHECK_WAIT || function == CHECK_GROWTH ||
                               function == BEGIN || function == DOWNLOAD || function == SYNCHRONIZE;
        CHECK(fake.calls_of[function] > 0 || (of_devices && !is_device), "%s is never called",
              function_names[function]);
    }
    for (int status = BTX_INVALID_ARGUMENT; status < NUM_STATUSES; status++) {
        for (long n = 1; n <= count; n++) {
            reset();
            fake.failing_call = n;
            fake.status = (btx_status)status;
            const btx_status told = live(with, &got);
            CHECK(told != BTX_OK, "call %ld, %s, failed and nobody was told", n, function_names[fake.failed]);
            seen.lives++;
            seen.rebuilds += told == BTX_REBUILD_NEEDED;
            seen.partly_written += told == BTX_REBUILD_NEEDED && fake.num_writes > 0 && fake.failed == WRITE_KV;
        }
    }
}

int main(void)
{
    int32_t device_index = 0;
    long num_allocations_failed = 0;
    if (btx_backend_find("cpu:scalar", &scalar, &device_index, NULL) != BTX_OK)
        return 2;
    make_inputs();
    for (int kind = 0; kind < 2; kind++) {
        const btx_backend backend = make_fake(kind);
        for (int limited = 0; limited < 2; limited++) {
            for (int32_t threads = 1; threads <= (kind == 0 ? 3 : 1); threads += 2) {
                const setting with = {&backend, threads, limited ? 100.0f : 0.0f, 0};
                num_allocations_failed += fail_allocations(&with);
            }
            const setting alone = {&backend, 1, limited ? 100.0f : 0.0f, 0};
            fail_backend(&alone);
        }
    }
    CHECK(seen.partly_written > 0, "no write failed half way");
    printf("%ld allocations and threads failed, %ld calls of the backend did, %ld of them while it wrote (%ld half "
           "way)\n%d failed\n",
           num_allocations_failed, seen.lives, seen.rebuilds, seen.partly_written, num_failed);
    return num_failed != 0;
}
