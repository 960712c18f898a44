/* device.c - what the core does for a device, in plain C (test_simd.py).
 *
 * The device is the scalar CPU backend behind a wall: the host cannot touch its memory, which is open to its operations
 * alone, so that whatever the core wants there it must upload and download. It keeps no rows, takes the mass by head,
 * and remembers a boundary that is not finite until it is asked. Its results are to be those of the scalar backend, bit
 * for bit.
 *
 * Prints a line per check that fails; exit status 0 when none does. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "btx.h"
#include "inputs.h"

enum {
    NUM_LAYERS = 9, /* of which a unit takes four, two or one */
    NUM_KV_HEADS = 2,
    NUM_QUERY_HEADS = 4,
    HEAD_DIM = 8,
    WIDTH = 2 * NUM_KV_HEADS * HEAD_DIM,
    TOP_K = 5,
    RECENT_WINDOW = 7,
    ROWS_PER_PASS = 4 * (TOP_K + RECENT_WINDOW),
    NUM_SEQUENCES = 6,
    MAX_TOKENS = 41,
    CACHE_SIZE = NUM_SEQUENCES * MAX_TOKENS * NUM_KV_HEADS * HEAD_DIM,
    QUERY_SIZE = NUM_SEQUENCES * RECENT_WINDOW * NUM_QUERY_HEADS * HEAD_DIM,
    MAX_REGIONS = 8,
};

static int num_failed;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            printf("device.c:%d: not so: %s\n", __LINE__, #condition);                                                 \
            num_failed++;                                                                                              \
        }                                                                                                              \
    } while (0)

/* ---- the device --------------------------------------------------------------------------------------- */

static const btx_backend *scalar;

static struct {
    void *memory;
    size_t bytes;
} regions[MAX_REGIONS];

static struct {
    float rows[NUM_LAYERS * NUM_SEQUENCES * (TOP_K + RECENT_WINDOW) * WIDTH];
    int refused;                           /* the latest boundary */
    int num_waits, num_marks, num_uploads; /* so far */
    int32_t num_selected;                  /* layers of the latest boundary whose rows are */
    int norms_wanted;                      /* by the latest boundary */
    int timed;
    int reserves; /* what grows is for no call */
    void *stream;
    btx_stage last_stage;
    const char *failing; /* the function that fails, or NULL */
} device;

static void protect(int protection)
{
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (regions[i].memory != NULL)
            mprotect(regions[i].memory, regions[i].bytes, protection);
    }
}

static int is_on_device(const void *place)
{
    for (int i = 0; i < MAX_REGIONS; i++) {
        const char *memory = regions[i].memory;
        if (memory != NULL && (const char *)place >= memory && (const char *)place < memory + regions[i].bytes)
            return 1;
    }
    return 0;
}

static btx_status fail_as_told(const char *function, btx_error *error)
{
    if (device.failing == NULL || strcmp(device.failing, function) != 0)
        return BTX_OK;
    return btx_fail(error, BTX_DEVICE_ERROR, "%s failed", function);
}

/* An operation: the wall is open while it runs. */
#define OPERATION(name, call)                                                                                          \
    do {                                                                                                               \
        btx_status status_ = fail_as_told(name, error);                                                                \
        if (status_ != BTX_OK)                                                                                         \
            return status_;                                                                                            \
        protect(PROT_READ | PROT_WRITE);                                                                               \
        status_ = (call);                                                                                              \
        protect(PROT_NONE);                                                                                            \
        return status_;                                                                                                \
    } while (0)

static int available(void)
{
    return 1;
}

static btx_status allocate(int32_t device_index, size_t bytes, void **memory, btx_error *error)
{
    if (device_index > 1)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "there is no cuda:%d", (int)device_index);
    *memory = NULL;
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (regions[i].memory != NULL)
            continue;
        void *mapped = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED)
            break;
        regions[i].memory = *memory = mapped;
        regions[i].bytes = bytes;
        return BTX_OK;
    }
    return btx_fail(error, BTX_OUT_OF_MEMORY, "the device is full");
}

static void release(void *memory)
{
    for (int i = 0; memory != NULL && i < MAX_REGIONS; i++) {
        if (regions[i].memory != memory)
            continue;
        munmap(memory, regions[i].bytes);
        regions[i].memory = NULL;
    }
}

static btx_status executor_create(int32_t device_index, int32_t num_threads, void **executor, btx_error *error)
{
    (void)device_index, (void)error;
    CHECK(num_threads == 1);
    *executor = &device;
    return BTX_OK;
}

static void executor_destroy(void *executor)
{
    CHECK(executor == &device);
}

static btx_status executor_run(void *executor, int64_t num_units, btx_unit_function fn, void *context, btx_error *error)
{
    btx_status status = BTX_OK;
    CHECK(executor == &device);
    for (int64_t unit = 0; unit < num_units && status == BTX_OK; unit++)
        status = fn(context, unit, 0, error);
    return status;
}

static btx_status copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    return BTX_OK;
}

static btx_status upload(int32_t device_index, void *memory, const void *from, size_t bytes, btx_error *error)
{
    (void)device_index;
    device.num_uploads++;
    OPERATION("upload", copy(memory, from, bytes));
}

static btx_status download(void *executor, void *to, const void *memory, size_t bytes, btx_error *error)
{
    CHECK(executor == &device);
    OPERATION("download", copy(to, memory, bytes));
}

static btx_status tell_refusal(btx_error *error)
{
    if (!device.refused)
        return BTX_OK;
    device.refused = 0;
    return btx_fail(error, BTX_INVALID_ARGUMENT, "the device refused");
}

static btx_status check_wait(void *executor, void *stream, btx_error *error)
{
    CHECK(executor == &device && stream == &device);
    return fail_as_told("check_wait", error);
}

static btx_status check_growth(void *executor, void *const *stream, btx_error *error)
{
    CHECK(executor == &device && (stream == NULL ? device.reserves : *stream == &device));
    return fail_as_told("check_growth", error);
}

static btx_status begin(void *executor, const btx_plan *plan, void *stream, int timed, btx_error *error)
{
    CHECK(executor == &device);
    CHECK(plan->rope_inv_freq == NULL || is_on_device(plan->rope_inv_freq));
    device.stream = stream;
    device.timed = timed;
    device.norms_wanted = 0;
    device.num_marks = 0;
    device.num_selected = 0;
    device.last_stage = BTX_STAGE_WRITE;
    return tell_refusal(error);
}

static void mark(void *executor, btx_stage stage)
{
    CHECK(executor == &device);
    /* The rows of all layers are selected, then every unit is gathered and processed, then all is written. */
    const btx_stage last = device.last_stage;
    CHECK(stage == BTX_STAGE_MASS     ? last == BTX_STAGE_WRITE || last == BTX_STAGE_TOP_K
          : stage == BTX_STAGE_GATHER ? last == BTX_STAGE_TOP_K || last == BTX_STAGE_PROCESSOR
                                      : stage == last + 1);
    device.last_stage = stage;
    device.num_marks++;
}

static btx_status synchronize(void *executor, double *stage_seconds, btx_error *error)
{
    CHECK(executor == &device);
    device.num_waits++;
    btx_status status = fail_as_told("synchronize", error);
    for (int stage = 0; stage_seconds != NULL && stage < BTX_NUM_STAGES; stage++)
        stage_seconds[stage] += 1 + stage;
    return status == BTX_OK ? tell_refusal(error) : status;
}

static btx_status mass_of_heads(const btx_pass *pass, float *mass, btx_error *error)
{
    btx_status status = BTX_OK;
    btx_pass one = *pass;
    for (one.layer_begin = pass->layer_begin; one.layer_begin < pass->layer_end; one.layer_begin++) {
        one.layer_end = one.layer_begin + 1;
        for (int32_t head = 0; head < NUM_KV_HEADS && status == BTX_OK; head++, mass += btx_pass_prior(pass))
            status = scalar->attention_mass(&one, head, head + 1, mass, error);
    }
    return status;
}

static btx_status attention_mass(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                                 btx_error *error)
{
    CHECK(pass->executor == &device);
    CHECK(head_begin == 0 && head_end == NUM_KV_HEADS);
    OPERATION("attention_mass", mass_of_heads(pass, mass, error));
}

static btx_status store_mass(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                             btx_error *error)
{
    CHECK(num_parts == NUM_KV_HEADS);
    OPERATION("store_mass", scalar->store_mass(pass, num_parts, mass, out, error));
}

static btx_status top_k(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions, btx_error *error)
{
    CHECK(num_parts == NUM_KV_HEADS);
    CHECK(pass->layer_begin == device.num_selected && pass->layer_end > pass->layer_begin);
    CHECK(pass->step_begin == 0 && pass->step_end == pass->plan->num_steps);
    device.num_selected = pass->layer_end;
    OPERATION("top_k", scalar->top_k(pass, num_parts, mass, positions, error));
}

static btx_status gather_kv(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight, float eps,
                            btx_dtype dtype, void *normed, btx_error *error)
{
    /* All steps, and as many layers as have ROWS_PER_PASS rows, were all steps as long as the longest. */
    const int64_t num_steps = pass->plan->num_steps;
    int64_t all_rows = 0;
    for (int64_t s = 0; s < num_steps; s++) {
        const int64_t of_step = pass->plan->steps[s].num_recalled + pass->plan->steps[s].num_window;
        all_rows = num_steps * of_step > all_rows ? num_steps * of_step : all_rows;
    }
    const int64_t num_layers = ROWS_PER_PASS / all_rows > 1 ? ROWS_PER_PASS / all_rows : 1;
    CHECK(device.num_selected == NUM_LAYERS);
    CHECK(pass->layer_begin % num_layers == 0);
    CHECK(pass->layer_end == NUM_LAYERS || pass->layer_end - pass->layer_begin == num_layers);
    CHECK(pass->step_begin == 0 && pass->step_end == num_steps);
    CHECK(rows == NULL);
    OPERATION("gather_kv", scalar->gather_kv(pass, positions, device.rows, weight, eps, dtype, normed, error));
}

static btx_status round_rows(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out,
                             btx_error *error)
{
    OPERATION("round", scalar->round(pass, x, dim, dtype, out, error));
}

static btx_status rms_norm(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                           btx_dtype dtype, void *out, btx_error *error)
{
    OPERATION("rms_norm", scalar->rms_norm(pass, x, dim, weight, eps, dtype, out, error));
}

static btx_status linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                         btx_error *error)
{
    CHECK(is_on_device(weights->packed) && (weights->bias == NULL || is_on_device(weights->bias)));
    OPERATION("linear", scalar->linear(pass, weights, x, accumulate, out, error));
}

static btx_status linear_swiglu(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                btx_error *error)
{
    OPERATION("linear_swiglu", scalar->linear_swiglu(pass, weights, x, out, error));
}

static btx_status attention(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                            void *out, btx_error *error)
{
    OPERATION("attention", scalar->attention(pass, qkv, dim, heads, dtype, out, error));
}

static btx_status stage_rows(const btx_pass *pass, const int32_t *positions, const float *gate, float *delta,
                             void *staged, float *delta_norm, float *row_norm, btx_error *error)
{
    const int64_t count = (pass->layer_end - pass->layer_begin) * (pass->step_end - pass->step_begin);
    float edits[NUM_LAYERS * NUM_SEQUENCES], rows[NUM_LAYERS * NUM_SEQUENCES];
    btx_status status = scalar->stage_kv(pass, positions, gate, device.rows, delta, staged, edits, rows, error);
    for (int64_t i = 0; i < count; i++)
        device.refused |= !isfinite(edits[i]);
    CHECK((delta_norm == NULL) == (row_norm == NULL));
    if (delta_norm == NULL)
        return status;
    device.norms_wanted = 1;
    memcpy(delta_norm, edits, (size_t)count * sizeof *edits);
    memcpy(row_norm, rows, (size_t)count * sizeof *rows);
    return status;
}

static btx_status stage_kv(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                           float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error)
{
    CHECK(rows == NULL);
    OPERATION("stage_kv", stage_rows(pass, positions, gate, delta, staged, delta_norm, row_norm, error));
}

static btx_status write_kv(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error)
{
    CHECK(pass->layer_begin == 0 && pass->layer_end == NUM_LAYERS);
    OPERATION("write_kv", device.refused ? BTX_OK : scalar->write_kv(pass, positions, staged, error));
}

static btx_backend make_device(void)
{
    btx_backend made = *scalar;
    made.name = "cuda";
    made.variant = "";
    made.device_type = BTX_CUDA;
    made.layers_per_pass = 0;
    made.rows_per_pass = ROWS_PER_PASS;
    made.mass_by_head = 1;
    made.keeps_rows = 0;
    made.available = available;
    made.allocate = allocate;
    made.release = release;
    made.executor_create = executor_create;
    made.executor_destroy = executor_destroy;
    made.executor_run = executor_run;
    made.upload = upload;
    made.check_wait = check_wait;
    made.check_growth = check_growth;
    made.begin = begin;
    made.mark = mark;
    made.download = download;
    made.synchronize = synchronize;
    made.attention_mass = attention_mass;
    made.store_mass = store_mass;
    made.top_k = top_k;
    made.gather_kv = gather_kv;
    made.round = round_rows;
    made.rms_norm = rms_norm;
    made.linear = linear;
    made.linear_swiglu = linear_swiglu;
    made.attention = attention;
    made.stage_kv = stage_kv;
    made.write_kv = write_kv;
    return made;
}

/* ---- boundaries --------------------------------------------------------------------------------------- */

typedef struct caches {
    float keys[NUM_LAYERS][CACHE_SIZE], values[NUM_LAYERS][CACHE_SIZE];
} caches;

typedef struct results {
    caches caches;
    int64_t recalled[NUM_LAYERS * NUM_SEQUENCES * TOP_K];
    float delta_norm[NUM_LAYERS * NUM_SEQUENCES], row_norm[NUM_LAYERS * NUM_SEQUENCES];
    float mass[NUM_LAYERS * NUM_SEQUENCES * MAX_TOKENS];
} results;

static const float inv_freq[HEAD_DIM / 2] = {1.0f, 0.3f, 0.1f, 0.03f};
static caches original;
static float queries[NUM_LAYERS][QUERY_SIZE];
static float weight_data[NUM_LAYERS * 8192];
static btx_tensor weights[NUM_LAYERS * BTX_NUM_WEIGHTS];

static const btx_config config = {
    .num_layers = NUM_LAYERS,
    .num_kv_heads = NUM_KV_HEADS,
    .num_query_heads = NUM_QUERY_HEADS,
    .head_dim = HEAD_DIM,
    .processor_dim = 12,
    .processor_heads = 3,
    .processor_mlp_dim = 20,
    .top_k = TOP_K,
    .recent_window = RECENT_WINDOW,
    .norm_eps = 1e-6f,
    .key_space = BTX_KEYS_UNROTATED,
    .rope_inv_freq = inv_freq,
    .weight_dtype = BTX_F32,
};

/* Of different lengths. */
static const btx_step mixed_steps[NUM_SEQUENCES] = {
    {.sequence = 0, .step_begin = 30, .step_end = MAX_TOKENS},
    {.sequence = 3, .sequence_begin = 4, .step_begin = 9, .step_end = 12},
    {.sequence = 1, .step_begin = 0, .step_end = 5},
    {.sequence = 2, .step_begin = 20, .step_end = 22},
    {.sequence = 5, .step_begin = 3, .step_end = 33},
    {.sequence = 4, .sequence_begin = 1, .step_begin = 10, .step_end = 38},
};

static const btx_step longest_steps[NUM_SEQUENCES] = {
    {.sequence = 0, .step_begin = 9, .step_end = MAX_TOKENS}, {.sequence = 1, .step_begin = 9, .step_end = MAX_TOKENS},
    {.sequence = 2, .step_begin = 9, .step_end = MAX_TOKENS}, {.sequence = 3, .step_begin = 9, .step_end = MAX_TOKENS},
    {.sequence = 4, .step_begin = 9, .step_end = MAX_TOKENS}, {.sequence = 5, .step_begin = 9, .step_end = MAX_TOKENS},
};

static void make_inputs(void)
{
    fill(&original.keys[0][0], NUM_LAYERS * CACHE_SIZE, 2);
    fill(&original.values[0][0], NUM_LAYERS * CACHE_SIZE, 2);
    fill(&queries[0][0], NUM_LAYERS * QUERY_SIZE, 2);
    fill_weights(&config, weights, weight_data, 0.4f);
}

/* One call on the results' caches: a rewrite with a report or without, or the mass. */
typedef struct call {
    const btx_backend *backend;
    btx_workspace *workspace;
    const btx_processor *processor; /* NULL: the mass */
    const btx_step *steps;
    int64_t num_steps;
    int reports;
    int32_t device_index; /* of the caches */
} call;

static btx_status run(const call *call, results *out, double *seconds, btx_error *error)
{
    const int64_t cache_shape[4] = {NUM_SEQUENCES, MAX_TOKENS, NUM_KV_HEADS, HEAD_DIM};
    const int64_t query_shape[4] = {NUM_SEQUENCES, RECENT_WINDOW, NUM_QUERY_HEADS, HEAD_DIM};
    const int64_t table_shape[2] = {NUM_SEQUENCES, 1}, shape[3] = {NUM_LAYERS, call->num_steps, TOP_K};
    const int64_t mass_shape[3] = {NUM_LAYERS, call->num_steps, MAX_TOKENS - RECENT_WINDOW};
    const btx_device place = {call->backend->device_type, call->device_index};
    int32_t table[NUM_SEQUENCES];
    btx_tensor keys[NUM_LAYERS], values[NUM_LAYERS], query_views[NUM_LAYERS];
    for (int i = 0; i < NUM_SEQUENCES; i++)
        table[i] = i;
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        keys[layer] = btx_tensor_contiguous(out->caches.keys[layer], BTX_F32, 4, cache_shape);
        values[layer] = btx_tensor_contiguous(out->caches.values[layer], BTX_F32, 4, cache_shape);
        query_views[layer] = btx_tensor_contiguous(queries[layer], BTX_F32, 4, query_shape);
        keys[layer].device = values[layer].device = query_views[layer].device = place;
    }
    const btx_kv_cache kv_cache = {NUM_LAYERS, keys, values};
    const btx_query_cache query_cache = {NUM_LAYERS, query_views};
    const btx_boundary boundary = {
        .kv_cache = &kv_cache,
        .query_cache = &query_cache,
        .steps = call->steps,
        .num_steps = call->num_steps,
        .block_table = btx_tensor_contiguous(table, BTX_I32, 2, table_shape),
        .query_table = btx_tensor_contiguous(table, BTX_I32, 2, table_shape),
        .stream = &device,
    };
    if (call->processor == NULL) {
        btx_tensor mass = btx_tensor_contiguous(out->mass, BTX_F32, 3, mass_shape);
        mass.device = place;
        return btx_attention_mass(call->backend, call->workspace, &boundary, RECENT_WINDOW, &mass, error);
    }
    btx_report report = {
        .recalled = btx_tensor_contiguous(out->recalled, BTX_I64, 3, shape),
        .delta_norm = btx_tensor_contiguous(out->delta_norm, BTX_F32, 2, shape),
        .row_norm = btx_tensor_contiguous(out->row_norm, BTX_F32, 2, shape),
    };
    btx_status status = btx_rewrite(call->processor, call->workspace, &boundary, call->reports ? &report : NULL, error);
    if (seconds != NULL)
        memcpy(seconds, report.stage_seconds, sizeof report.stage_seconds);
    return status;
}

static void start(results *out)
{
    memset(out, 0, sizeof *out);
    out->caches = original;
}

static int is_untouched(const results *got)
{
    return memcmp(&got->caches, &original, sizeof original) == 0;
}

/* ---- checks ------------------------------------------------------------------------------------------- */

static void check_results(const call *on_host, const call *on_device)
{
    static results expected, got;
    double seconds[BTX_NUM_STAGES] = {0};
    btx_error error = {{0}};
    call host = *on_host, there = *on_device;
    for (int64_t num_steps = 1; num_steps <= NUM_SEQUENCES; num_steps++) {
        host.num_steps = there.num_steps = num_steps;
        start(&expected);
        start(&got);
        CHECK(run(&host, &expected, NULL, &error) == BTX_OK);
        CHECK(run(&there, &got, seconds, &error) == BTX_OK);
        CHECK(!is_untouched(&got));
        CHECK(memcmp(&expected, &got, sizeof got) == 0);
        CHECK(device.norms_wanted && device.timed && device.stream == &device);
        CHECK(seconds[BTX_STAGE_MASS] == 1 && seconds[BTX_STAGE_WRITE] == 5);
        CHECK(device.num_marks >= BTX_NUM_STAGES && device.num_marks % 2 == 1);

        /* Without a report: not waited for, no norms, the same caches. */
        int num_waits = device.num_waits;
        start(&got);
        there.reports = 0;
        CHECK(run(&there, &got, NULL, &error) == BTX_OK);
        there.reports = 1;
        CHECK(memcmp(&expected.caches, &got.caches, sizeof got.caches) == 0);
        CHECK(!device.norms_wanted && !device.timed && device.num_waits == num_waits);
        CHECK(btx_workspace_synchronize(there.workspace, &error) == BTX_OK && device.num_waits == num_waits + 1);

        start(&expected);
        start(&got);
        host.processor = there.processor = NULL;
        CHECK(run(&host, &expected, NULL, &error) == BTX_OK);
        CHECK(run(&there, &got, NULL, &error) == BTX_OK);
        CHECK(memcmp(&expected, &got, sizeof got) == 0);
        CHECK(is_untouched(&got) && device.num_marks == 0);
        host.processor = on_host->processor;
        there.processor = on_device->processor;
    }
}

/* A boundary that is not finite is told by the call itself, by synchronize or by the next call, once. */
static void check_refusals(const call *on_device)
{
    static results got;
    btx_error error = {{0}};
    call there = *on_device;
    float *spoilt = &original.values[3][(size_t)(MAX_TOKENS - 1) * NUM_KV_HEADS * HEAD_DIM], before = *spoilt;
    *spoilt = NAN;
    start(&got);
    CHECK(run(&there, &got, NULL, &error) == BTX_INVALID_ARGUMENT && is_untouched(&got));
    there.reports = 0;
    CHECK(run(&there, &got, NULL, &error) == BTX_OK && is_untouched(&got));
    CHECK(btx_workspace_synchronize(there.workspace, &error) == BTX_INVALID_ARGUMENT);
    CHECK(btx_workspace_synchronize(there.workspace, &error) == BTX_OK);
    CHECK(run(&there, &got, NULL, &error) == BTX_OK && is_untouched(&got));
    *spoilt = before;
    start(&got);
    for (there.reports = 0; there.reports < 2; there.reports++) { /* the next call does nothing else */
        device.refused = 1;
        CHECK(run(&there, &got, NULL, &error) == BTX_INVALID_ARGUMENT && is_untouched(&got));
    }
    there.reports = 1;
    CHECK(run(&there, &got, NULL, &error) == BTX_OK && !is_untouched(&got));
}

/* A device that lets no memory be allocated is asked before; a call that needs no more does not ask. */
static void check_refused_growth(const call *on_device)
{
    static results got;
    btx_error error = {{0}};
    call there = *on_device;
    CHECK(btx_workspace_create(there.backend, 0, 1, &there.workspace, &error) == BTX_OK);
    there.num_steps = 1;
    start(&got);
    device.failing = NULL;
    CHECK(run(&there, &got, NULL, &error) == BTX_OK);
    const size_t bytes = btx_workspace_bytes(there.workspace);
    device.failing = "check_growth";
    start(&got);
    CHECK(run(&there, &got, NULL, &error) == BTX_OK);
    there.num_steps = NUM_SEQUENCES;
    start(&got);
    CHECK(run(&there, &got, NULL, &error) == BTX_DEVICE_ERROR && is_untouched(&got));
    device.reserves = 1;
    CHECK(btx_workspace_reserve(there.workspace, 2 * bytes, &error) == BTX_DEVICE_ERROR);
    device.reserves = 0;
    CHECK(btx_workspace_bytes(there.workspace) == bytes);
    device.failing = NULL;
    CHECK(run(&there, &got, NULL, &error) == BTX_OK);
    btx_workspace_destroy(there.workspace);
}

/* Only what is waited for asks whether it may be, and before it waits for anything. */
static void check_refused_wait(const call *on_device)
{
    static results got;
    btx_error error = {{0}};
    call there = *on_device;
    const int num_waits = device.num_waits;
    device.failing = "check_wait";
    start(&got);
    CHECK(run(&there, &got, NULL, &error) == BTX_DEVICE_ERROR);
    there.processor = NULL;
    CHECK(run(&there, &got, NULL, &error) == BTX_DEVICE_ERROR && is_untouched(&got));
    there.processor = on_device->processor;
    there.reports = 0;
    CHECK(run(&there, &got, NULL, &error) == BTX_OK && device.num_waits == num_waits);
    device.failing = NULL;
}

/* What fails before the write leaves the caches; what fails after it says that nobody knows. */
static void check_failures(const call *on_device)
{
    static results got;
    static const char *const before[] = {"attention_mass", "top_k",         "gather_kv", "round",   "rms_norm",
                                         "linear",         "linear_swiglu", "attention", "stage_kv"};
    static const char *const after[] = {"write_kv", "download"};
    btx_error error = {{0}};
    for (size_t i = 0; i < sizeof before / sizeof *before; i++) {
        start(&got);
        device.failing = before[i];
        CHECK(run(on_device, &got, NULL, &error) == BTX_DEVICE_ERROR && is_untouched(&got));
    }
    for (size_t i = 0; i < sizeof after / sizeof *after; i++) {
        start(&got);
        device.failing = after[i];
        CHECK(run(on_device, &got, NULL, &error) == BTX_REBUILD_NEEDED);
    }
    start(&got);
    device.failing = "synchronize"; /* before it begins */
    CHECK(run(on_device, &got, NULL, &error) == BTX_DEVICE_ERROR && is_untouched(&got));
    device.failing = "upload";
    btx_processor *processor = NULL;
    CHECK(btx_processor_create(on_device->backend, 0, &config, weights, &processor, &error) == BTX_DEVICE_ERROR);
    CHECK(processor == NULL);
    check_refused_wait(on_device);
    check_refused_growth(on_device);
    device.failing = NULL;
}

/* Everything is of one device, and the sentence says of which. */
static void check_devices(const call *on_device)
{
    static results got;
    btx_error error = {{0}};
    btx_processor *processor = NULL;
    btx_workspace *other = NULL;
    call there = *on_device;
    start(&got);
    there.device_index = 1;
    CHECK(run(&there, &got, NULL, &error) == BTX_INVALID_ARGUMENT && is_untouched(&got));
    CHECK(strcmp(error.message, "the KV cache is on cuda:1; it must be on cuda:0: move it there") == 0);
    CHECK(btx_workspace_create(there.backend, 1, 4, &other, &error) == BTX_OK);
    CHECK(btx_workspace_num_threads(other) == 1);
    there.device_index = 0;
    there.workspace = other;
    CHECK(run(&there, &got, NULL, &error) == BTX_INVALID_ARGUMENT && strstr(error.message, "'cuda:0'") != NULL);
    btx_workspace_destroy(other);
    CHECK(btx_processor_create(there.backend, 2, &config, weights, &processor, &error) == BTX_INVALID_ARGUMENT);
    CHECK(btx_workspace_create(scalar, 1, 1, &other, &error) == BTX_INVALID_ARGUMENT);
    CHECK(btx_processor_create(scalar, 1, &config, weights, &processor, &error) == BTX_INVALID_ARGUMENT);

    const int64_t shape[3] = {1, 2, 3};
    int64_t lengths[1] = {2};
    btx_packed_linear *product = NULL;
    btx_tensor weight = btx_tensor_contiguous(weight_data, BTX_F32, 3, shape);
    btx_tensor mass = btx_tensor_contiguous(weight_data, BTX_F32, 2, shape);
    btx_tensor counts = btx_tensor_contiguous(lengths, BTX_I64, 1, shape);
    btx_tensor best = btx_tensor_contiguous(got.recalled, BTX_I64, 2, shape);
    CHECK(btx_packed_linear_create(there.backend, &weight, NULL, BTX_F32, &product, &error) == BTX_UNSUPPORTED);
    CHECK(btx_select_top_k(there.backend, &mass, &counts, &best, &error) == BTX_UNSUPPORTED);
}

/* What a boundary takes of a workspace of its own. */
static size_t memory_of(const call *on_device, const btx_step *steps, int64_t num_steps)
{
    static results got;
    btx_error error = {{0}};
    call there = *on_device;
    there.steps = steps;
    there.num_steps = num_steps;
    CHECK(btx_workspace_create(there.backend, 0, 1, &there.workspace, &error) == BTX_OK);
    start(&got);
    CHECK(run(&there, &got, NULL, &error) == BTX_OK);
    size_t bytes = btx_workspace_bytes(there.workspace);
    btx_workspace_destroy(there.workspace);
    return bytes;
}

/* The planned memory grows with the number of sequences; no boundary takes more, and the largest exactly that. */
static void check_planned_memory(const call *on_device)
{
    btx_error error = {{0}};
    size_t before = 0, planned = 0;
    for (int64_t num_sequences = 1; num_sequences <= NUM_SEQUENCES; num_sequences++) {
        CHECK(btx_processor_workspace_bytes(on_device->processor, 1, num_sequences, MAX_TOKENS, BTX_F32, &planned,
                                            &error) == BTX_OK);
        CHECK(planned >= before);
        CHECK(memory_of(on_device, longest_steps, num_sequences) == planned);
        for (int64_t num_steps = 1; num_steps <= num_sequences; num_steps++) {
            CHECK(memory_of(on_device, mixed_steps, num_steps) <= planned);
            CHECK(memory_of(on_device, longest_steps, num_steps) <= planned);
        }
        before = planned;
    }
}

int main(void)
{
    btx_error error = {{0}};
    int32_t device_index = 0;
    if (btx_backend_find("cpu:scalar", &scalar, &device_index, &error) != BTX_OK) {
        fprintf(stderr, "device: %s\n", error.message);
        return 2;
    }
    const btx_backend backend = make_device();
    btx_processor *processor = NULL, *host_processor = NULL;
    btx_workspace *workspace = NULL, *host_workspace = NULL;
    make_inputs();
    if (btx_processor_create(scalar, 0, &config, weights, &host_processor, &error) != BTX_OK ||
        btx_workspace_create(scalar, 0, 1, &host_workspace, &error) != BTX_OK ||
        btx_processor_create(&backend, 0, &config, weights, &processor, &error) != BTX_OK ||
        btx_workspace_create(&backend, 0, 4, &workspace, &error) != BTX_OK) {
        fprintf(stderr, "device: %s\n", error.message);
        return 2;
    }
    CHECK(device.num_uploads == 1);
    CHECK(btx_processor_config(processor)->rope_inv_freq[1] == inv_freq[1]);
    const call on_host = {scalar, host_workspace, host_processor, mixed_steps, 2, 1, 0};
    const call on_device = {&backend, workspace, processor, mixed_steps, 2, 1, 0};
    check_results(&on_host, &on_device);
    check_refusals(&on_device);
    check_failures(&on_device);
    check_devices(&on_device);
    check_planned_memory(&on_device);
    btx_processor_destroy(processor);
    btx_processor_destroy(host_processor);
    btx_workspace_destroy(workspace);
    btx_workspace_destroy(host_workspace);
    for (int i = 0; i < MAX_REGIONS; i++)
        CHECK(regions[i].memory == NULL);
    printf("%d failed\n", num_failed);
    return num_failed != 0;
}
