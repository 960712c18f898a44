/* rewrite.c - fuzz target: one boundary. Views of keys, values and queries, block and query tables, steps, reports;
 * btx_rewrite and btx_attention_mass.
 *
 * What must hold, besides what the sanitizers watch:
 *   - a refused call wrote nothing: caches, queries, tables and report are as before, bit for bit;
 *   - an accepted one wrote only rows that it reports, or may choose, and in them only elements of the views;
 *   - it read nothing of blocks and pages that are nobody's, nor of positions before or behind a sequence (poisoned);
 *   - the same caches without gaps give the same status and the same bits. */
#include <math.h>

#include "fuzz.h"

enum { MAX_LAYERS = 3, MAX_STEPS = 4, KEYS = 0, VALUES = 1, QUERIES = 2, NUM_KINDS = 3 };

/* Shapes of backbone and Processor: layers, KV heads, query heads, head_dim, D, heads, F, top_k, recent_window. */
static const int32_t shapes[][9] = {
    {1, 1, 1, 2, 4, 2, 3, 3, 4},     {2, 1, 2, 4, 4, 2, 5, 0, 4},   {2, 2, 4, 8, 8, 1, 3, 4, 8},
    {3, 2, 2, 6, 6, 3, 7, 5, 6},     {1, 3, 6, 16, 8, 2, 9, 2, 7},  {2, 1, 4, 10, 5, 5, 4, 8, 3},
    {1, 2, 2, 34, 20, 2, 20, 6, 20}, {1, 2, 6, 4, 4, 1, 1, 40, 24},
};
enum { NUM_SHAPES = sizeof shapes / sizeof *shapes };

static btx_config make_config(int64_t shape, int unrotated, btx_dtype weight_dtype)
{
    static const float inv_freq[32] = {1.0f, 0.4f, 0.16f, 0.06f, 0.02f, 0.01f, 4e-3f, 1e-3f};
    const int32_t *of = shapes[shape];
    return (btx_config){
        .num_layers = of[0],
        .num_kv_heads = of[1],
        .num_query_heads = of[2],
        .head_dim = of[3],
        .processor_dim = of[4],
        .processor_heads = of[5],
        .processor_mlp_dim = of[6],
        .top_k = of[7],
        .recent_window = of[8],
        .norm_eps = 1e-6f,
        .key_space = unrotated ? BTX_KEYS_UNROTATED : BTX_KEYS_ROTATED,
        .rope_inv_freq = unrotated ? inv_freq : NULL,
        .weight_dtype = weight_dtype,
    };
}

/* Made at the first use, then kept. */
static const btx_processor *find_processor(const btx_backend *backend, int64_t shape, int unrotated, int halved)
{
    static struct {
        const btx_backend *backend;
        btx_processor *processor;
    } made[16][NUM_SHAPES][2][2];
    int slot = 0;
    while (made[slot][shape][unrotated][halved].backend != NULL &&
           made[slot][shape][unrotated][halved].backend != backend)
        slot++;
    if (made[slot][shape][unrotated][halved].backend == backend)
        return made[slot][shape][unrotated][halved].processor;
    const btx_config config = make_config(shape, unrotated, halved ? BTX_BF16 : BTX_F32);
    btx_tensor weights[MAX_LAYERS * BTX_NUM_WEIGHTS];
    btx_error error = {{0}};
    for (int i = 0; i < config.num_layers * BTX_NUM_WEIGHTS; i++) {
        int64_t dims[2] = {1, 1};
        const int32_t num_dims = btx_weight_shape(&config, (btx_weight)(i % BTX_NUM_WEIGHTS), dims);
        float *data = malloc((size_t)(dims[0] * dims[1]) * sizeof *data);
        for (int64_t j = 0; data != NULL && j < dims[0] * dims[1]; j++)
            data[j] = (float)(fuzz_mix((uint32_t)i, (uint32_t)j) >> 8) * 0x1p-24f - 0.5f;
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, dims);
    }
    FUZZ_REQUIRE(btx_processor_create(backend, 0, &config, weights, &made[slot][shape][unrotated][halved].processor,
                                      &error) == BTX_OK,
                 error.message);
    for (int i = 0; i < config.num_layers * BTX_NUM_WEIGHTS; i++)
        free(weights[i].data);
    made[slot][shape][unrotated][halved].backend = backend;
    return made[slot][shape][unrotated][halved].processor;
}

/* ---- one input ---- */

typedef struct fuzz_case {
    btx_config config;
    int64_t num_layers; /* of the caches */
    fuzz_tensor tensors[NUM_KINDS][MAX_LAYERS];
    btx_tensor views[NUM_KINDS][MAX_LAYERS]; /* as the API takes them */
    btx_kv_cache kv_cache;
    btx_query_cache query_cache;
    fuzz_tensor block_table, query_table;
    btx_step steps[MAX_STEPS];
    btx_boundary boundary;
    fuzz_tensor recalled, delta_norm, row_norm, skipped, mass;
    btx_report report;
    int is_packed;   /* values lie between the keys, in their memory */
    int is_changed;  /* some descriptor is not what it was made as */
    int is_too_much; /* some view describes more than there is memory for: checks alone may see it */
} fuzz_case;

static void for_each_tensor(fuzz_case *of, void (*function)(fuzz_tensor *))
{
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int64_t layer = 0; layer < of->num_layers; layer++)
            function(&of->tensors[kind][layer]);
    }
    function(&of->block_table);
    function(&of->query_table);
    function(&of->recalled);
    function(&of->delta_norm);
    function(&of->row_norm);
    function(&of->skipped);
    function(&of->mass);
}

static void must_be_unchanged(fuzz_tensor *tensor)
{
    FUZZ_REQUIRE(fuzz_is_unchanged(tensor), "bytes were written that may not be");
}

static fuzz_tensor make_tensor(btx_dtype dtype, int32_t num_dims, int64_t a, int64_t b, int64_t c, int64_t d)
{
    const int64_t shape[4] = {a, b, c, d};
    return (fuzz_tensor){.view = btx_tensor_contiguous(NULL, dtype, num_dims, shape)};
}

/* Keys and values of a layer as halves of rows twice as long. */
static void pack_values(fuzz_case *of, int64_t layer)
{
    fuzz_tensor *keys = &of->tensors[KEYS][layer], *values = &of->tensors[VALUES][layer];
    const int64_t head_dim = keys->view.shape[3];
    keys->view.shape[3] = 2 * head_dim;
    keys->view = btx_tensor_contiguous(NULL, keys->view.dtype, 4, keys->view.shape);
    if (!fuzz_back(keys))
        of->is_too_much = 1;
    *values = (fuzz_tensor){.view = keys->view};
    values->view.data =
        keys->memory == NULL ? NULL : keys->memory + head_dim * (int64_t)btx_dtype_size(keys->view.dtype);
    keys->view.shape[3] = values->view.shape[3] = head_dim;
}

static void make_views(fuzz_bytes *from, fuzz_case *of)
{
    static const btx_dtype dtypes[3] = {BTX_F32, BTX_BF16, BTX_F16};
    const btx_config *config = &of->config;
    const btx_dtype dtype = dtypes[fuzz_below(from, 3)];
    const int64_t num_blocks = 1 + fuzz_below(from, 12), block_size = 1 + fuzz_below(from, 9);
    const int64_t num_pages = 1 + fuzz_below(from, 8), page_size = 1 + fuzz_below(from, 9);
    for (int64_t layer = 0; layer < of->num_layers; layer++) {
        of->tensors[KEYS][layer] = of->tensors[VALUES][layer] =
            make_tensor(dtype, 4, num_blocks, block_size, config->num_kv_heads, config->head_dim);
        of->tensors[QUERIES][layer] =
            make_tensor(dtype, 4, num_pages, page_size, config->num_query_heads, config->head_dim);
    }
    of->is_packed = fuzz_byte(from) % 4 == 3;
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int64_t layer = 0; layer < of->num_layers; layer++)
            fuzz_lay_out(from, &of->tensors[kind][layer].view);
    }
    int64_t mutations = fuzz_byte(from);
    for (mutations = mutations < 128 ? 0 : mutations % 4; mutations > 0; mutations--) {
        fuzz_mutate(from, &of->tensors[fuzz_below(from, NUM_KINDS)][fuzz_below(from, of->num_layers)].view);
        of->is_changed = 1;
    }
    const int strange = fuzz_byte(from) % 8 == 7;
    const uint32_t seed = (uint32_t)fuzz_byte(from);
    for (int64_t layer = 0; layer < of->num_layers; layer++) {
        for (int kind = 0; kind < NUM_KINDS; kind++) {
            if (of->is_packed && !of->is_changed && kind == VALUES)
                continue;
            if (of->is_packed && !of->is_changed && kind == KEYS)
                pack_values(of, layer);
            else if (!fuzz_back(&of->tensors[kind][layer]))
                of->is_too_much = 1;
        }
        for (int kind = 0; kind < NUM_KINDS; kind++) {
            fuzz_tensor *tensor = &of->tensors[kind][layer];
            const uint32_t its_seed = seed + (uint32_t)(16 * layer + kind);
            fuzz_tensor whole = *tensor;
            if (tensor->memory == NULL && kind == VALUES && of->is_packed && !of->is_changed) {
                whole.memory = of->tensors[KEYS][layer].memory; /* where its elements are counted from */
                whole.bytes = of->tensors[KEYS][layer].bytes;
            }
            fuzz_fill(&whole, its_seed, strange);
            of->views[kind][layer] = tensor->view;
        }
    }
    of->kv_cache = (btx_kv_cache){(int32_t)of->num_layers, of->views[KEYS], of->views[VALUES]};
    of->query_cache = (btx_query_cache){(int32_t)of->num_layers, of->views[QUERIES]};
}

/* Tables, and how far they reach in memory: a table that describes more has its first row alone. */
typedef struct reach {
    int64_t sequences, columns;
} reach;

static reach make_table(fuzz_bytes *from, fuzz_tensor *table, int64_t rows, int64_t num_entries, int *changed)
{
    const int64_t columns = 1 + fuzz_below(from, 12);
    int64_t step = fuzz_byte(from), start = fuzz_byte(from);
    reach reach = {rows, columns};
    *table = make_tensor(BTX_I32, 2, rows, columns, 0, 0);
    table->view.stride[0] += fuzz_below(from, 4) == 3 ? 5 : 0;
    if (fuzz_byte(from) >= 224) {
        fuzz_mutate(from, &table->view);
        *changed = 1;
    }
    if (!fuzz_back(table)) {
        btx_tensor described = table->view;
        *table = make_tensor(BTX_I32, 2, 1, columns, 0, 0);
        fuzz_back(table);
        described.data = table->view.data;
        reach.sequences = 1;
        for (int64_t i = 0; i < columns; i++)
            ((int32_t *)table->view.data)[i] = (int32_t)((start + i * (step | 1)) % num_entries);
        table->view = described;
        return reach;
    }
    if (table->view.dtype != BTX_I32 || table->view.num_dims != 2)
        return reach; /* zeros; refused */
    reach.sequences = table->view.shape[0];
    reach.columns = table->view.shape[1];
    for (int64_t s = 0; table->bytes > 0 && s < reach.sequences && s < 64; s++) {
        for (int64_t i = 0; i < reach.columns && i < 64; i++) {
            const int64_t index[2] = {s, i};
            const int32_t entry = (int32_t)((start + (s * reach.columns + i) * (step | 1)) % num_entries);
            memcpy(table->memory + fuzz_at(table, index), &entry, 4);
        }
    }
    for (int64_t wrong = fuzz_byte(from); table->bytes >= 4 && wrong >= 240; wrong--) {
        const int32_t entry = (int32_t)fuzz_number(from);
        const int64_t index[2] = {fuzz_byte(from) % reach.sequences, fuzz_byte(from) % reach.columns};
        memcpy(table->memory + fuzz_at(table, index), &entry, 4);
    }
    return reach;
}

static void make_tables_and_steps(fuzz_bytes *from, fuzz_case *of)
{
    const btx_tensor *keys = &of->views[KEYS][0], *queries = &of->views[QUERIES][0];
    const int64_t rows = 1 + fuzz_below(from, 5);
    const int64_t num_blocks = keys->shape[0] > 0 && keys->shape[0] < 256 ? keys->shape[0] : 1;
    const int64_t num_pages = queries->shape[0] > 0 && queries->shape[0] < 256 ? queries->shape[0] : 1;
    const int64_t block_size = keys->shape[1] > 0 && keys->shape[1] < 256 ? keys->shape[1] : 1;
    const reach blocks = make_table(from, &of->block_table, rows, num_blocks, &of->is_changed);
    const reach pages = make_table(from, &of->query_table, rows, num_pages, &of->is_changed);
    /* Steps of rows that a table describes, but has no memory for, cannot be asked for: it would be the caller's lie.
     */
    const int are_real =
        blocks.sequences == of->block_table.view.shape[0] && pages.sequences == of->query_table.view.shape[0] &&
        of->query_table.view.shape[1] == pages.columns && of->block_table.view.shape[1] == blocks.columns;
    const int64_t num_steps = fuzz_below(from, MAX_STEPS + 1);
    for (int64_t s = 0; s < num_steps; s++) {
        btx_step *step = &of->steps[s];
        const int64_t most = (blocks.columns > 0 && blocks.columns < 16 ? blocks.columns : 16) * block_size;
        step->sequence = s;
        step->step_end = 1 + fuzz_byte(from) % (most > 0 ? most : 1);
        step->step_begin = fuzz_byte(from) % step->step_end;
        step->sequence_begin = fuzz_byte(from) % (step->step_begin + 1);
        step->top_k = fuzz_below(from, 4) != 3 ? 0 : fuzz_number(from);
        if (fuzz_byte(from) >= 224 && are_real) {
            int64_t *const fields[4] = {&step->sequence, &step->sequence_begin, &step->step_begin, &step->step_end};
            *fields[fuzz_below(from, 4)] = fuzz_number(from);
        }
        if (!are_real) { /* the first row of both, as far as it is there */
            step->sequence = 0;
            step->step_end = 1;
            step->step_begin = step->sequence_begin = 0;
        }
    }
    of->boundary = (btx_boundary){
        .kv_cache = &of->kv_cache,
        .query_cache = &of->query_cache,
        .steps = of->steps,
        .num_steps = num_steps,
        .block_table = of->block_table.view,
        .query_table = of->query_table.view,
        .softmax_scale = fuzz_float(from),
        .max_relative_edit = fuzz_float(from),
    };
}

/* A result's memory; one that cannot have any is not wanted. */
static btx_tensor make_result(fuzz_bytes *from, fuzz_tensor *result, fuzz_tensor made, int *changed)
{
    const int64_t choice = fuzz_byte(from);
    *result = made;
    if (choice % 8 == 7) {
        result->view.data = NULL;
        return result->view;
    }
    fuzz_lay_out(from, &result->view);
    if (choice >= 240) {
        fuzz_mutate(from, &result->view);
        *changed = 1;
    }
    if (!fuzz_back(result))
        *result = (fuzz_tensor){0};
    else
        fuzz_fill(result, 77, 0);
    return result->view;
}

static void make_results(fuzz_bytes *from, fuzz_case *of)
{
    const int64_t layers = of->config.num_layers, steps = of->boundary.num_steps;
    of->report.recalled =
        make_result(from, &of->recalled, make_tensor(BTX_I64, 3, layers, steps, of->config.top_k, 0), &of->is_changed);
    of->report.delta_norm =
        make_result(from, &of->delta_norm, make_tensor(BTX_F32, 2, layers, steps, 0, 0), &of->is_changed);
    of->report.row_norm =
        make_result(from, &of->row_norm, make_tensor(BTX_F32, 2, layers, steps, 0, 0), &of->is_changed);
    of->report.skipped = make_result(from, &of->skipped, make_tensor(BTX_I32, 1, steps, 0, 0, 0), &of->is_changed);
}

/* ---- what a step may reach ---- */

/* Steps may be of any numbers, of which nothing is known before the API has looked at them. */
static int64_t minus(int64_t a, int64_t b)
{
    return (int64_t)((uint64_t)a - (uint64_t)b);
}

static int64_t window_begin(const btx_step *step, int64_t recent_window)
{
    const int64_t length = minus(step->step_end, step->step_begin);
    return minus(step->step_end, length < recent_window ? length : recent_window);
}

/* Calls for every element of a position of one view. */
static void for_each_element(const fuzz_case *of, int kind, int64_t layer, const btx_step *step, int64_t position,
                             void (*function)(fuzz_tensor *, int64_t at, int64_t size))
{
    const btx_tensor *view = &of->views[kind][layer],
                     *table = kind == QUERIES ? &of->boundary.query_table : &of->boundary.block_table;
    fuzz_tensor *tensor = (fuzz_tensor *)&of->tensors[kind][layer];
    if (tensor->memory == NULL) /* packed */
        tensor = (fuzz_tensor *)&of->tensors[KEYS][layer];
    int64_t column = position / view->shape[1];
    if (kind == QUERIES)
        column %= table->shape[1];
    const int64_t block = ((const int32_t *)table->data)[step->sequence * table->stride[0] + column];
    const int64_t size = (int64_t)btx_dtype_size(view->dtype);
    const int64_t row = (char *)view->data - tensor->memory +
                        size * (block * view->stride[0] + position % view->shape[1] * view->stride[1]);
    for (int64_t head = 0; head < view->shape[2]; head++) {
        for (int64_t i = 0; i < view->shape[3]; i++)
            function(tensor, row + size * (head * view->stride[2] + i * view->stride[3]), size);
    }
}

static unsigned char readable[FUZZ_MAX_BYTES];

static void mark_readable(fuzz_tensor *tensor, int64_t at, int64_t size)
{
    (void)tensor;
    memset(readable + at, 1, (size_t)size);
}

/* Poisons what no step may read, in whole granules of AddressSanitizer. Descriptors are as they were made. */
static void forbid_the_rest(fuzz_case *of, int64_t recent_window)
{
    for (int64_t layer = 0; layer < of->num_layers; layer++) {
        for (int kind = 0; kind < NUM_KINDS; kind++) {
            fuzz_tensor *tensor = &of->tensors[kind][layer];
            if (kind != VALUES || tensor->memory != NULL)
                memset(readable, 0, sizeof readable);
            for (int64_t s = 0; s < of->boundary.num_steps; s++) {
                const btx_step *step = &of->steps[s];
                const int64_t begin = kind == QUERIES ? window_begin(step, recent_window) : step->sequence_begin;
                for (int64_t p = begin; p < step->step_end; p++)
                    for_each_element(of, kind, layer, step, p, mark_readable);
            }
            if (kind == KEYS && of->is_packed)
                continue; /* with its values */
            if (kind == VALUES && of->is_packed)
                tensor = &of->tensors[KEYS][layer];
            for (size_t at = (8 - (uintptr_t)tensor->memory % 8) % 8; at + 8 <= tensor->bytes; at += 8) {
                if (memchr(readable + at, 1, 8) == NULL)
                    ASAN_POISON_MEMORY_REGION(tensor->memory + at, 8);
            }
        }
    }
}

static void allow(fuzz_tensor *tensor)
{
    if (tensor->bytes > 0)
        ASAN_UNPOISON_MEMORY_REGION(tensor->memory, tensor->bytes);
}

static void undo(fuzz_tensor *tensor, int64_t at, int64_t size)
{
    memcpy(tensor->memory + at, tensor->before + at, (size_t)size);
}

/* Takes back all that an accepted rewrite may have written; then nothing may differ. */
static void check_written(fuzz_case *of)
{
    for (int64_t s = 0; s < of->boundary.num_steps; s++) {
        const btx_step *step = &of->steps[s];
        const int64_t begin = window_begin(step, of->config.recent_window), zero[1] = {s};
        int32_t skipped = 0;
        if (of->report.skipped.data != NULL)
            memcpy(&skipped, of->skipped.memory + fuzz_at(&of->skipped, zero), 4);
        FUZZ_REQUIRE(skipped == 0 || (skipped == 1 && of->boundary.max_relative_edit > 0.0f), "skipped is not a flag");
        for (int64_t layer = 0; layer < of->num_layers && !skipped; layer++) {
            for (int64_t p = step->sequence_begin; p < step->step_end; p++) {
                int may = p >= begin || of->report.recalled.data == NULL;
                for (int64_t i = 0; !may && i < of->config.top_k; i++) {
                    const int64_t index[3] = {layer, s, i};
                    int64_t found;
                    memcpy(&found, of->recalled.memory + fuzz_at(&of->recalled, index), 8);
                    may = found == p;
                }
                if (!may)
                    continue;
                for_each_element(of, KEYS, layer, step, p, undo);
                for_each_element(of, VALUES, layer, step, p, undo);
            }
        }
    }
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int64_t layer = 0; layer < of->num_layers; layer++)
            must_be_unchanged(&of->tensors[kind][layer]);
    }
    must_be_unchanged(&of->block_table);
    must_be_unchanged(&of->query_table);
}

/* recalled: ascending prior positions, as many as there should be, then -1. */
static void check_recalled(const fuzz_case *of)
{
    for (int64_t s = 0; s < of->boundary.num_steps && of->report.recalled.data != NULL; s++) {
        const btx_step *step = &of->steps[s];
        const int64_t prior = window_begin(step, of->config.recent_window) - step->sequence_begin;
        int64_t wanted = step->top_k == 0 ? of->config.top_k : step->top_k < 0 ? 0 : step->top_k;
        wanted = wanted < prior ? wanted : prior;
        for (int64_t layer = 0; layer < of->num_layers; layer++) {
            int64_t last = step->sequence_begin - 1;
            for (int64_t i = 0; i < of->config.top_k; i++) {
                const int64_t index[3] = {layer, s, i};
                int64_t found;
                memcpy(&found, of->recalled.memory + fuzz_at(&of->recalled, index), 8);
                FUZZ_REQUIRE(i < wanted ? found > last && found < step->sequence_begin + prior : found == -1,
                             "a recalled position is none");
                last = found;
            }
        }
    }
}

/* The same without gaps, in the same order of elements. */
static btx_tensor copy_tensor(const btx_tensor *view, const fuzz_tensor *memory)
{
    btx_tensor copy = btx_tensor_contiguous(NULL, view->dtype, view->num_dims, view->shape);
    const int64_t size = (int64_t)btx_dtype_size(view->dtype);
    int64_t count = 1, index[4] = {0};
    for (int32_t d = 0; d < view->num_dims; d++)
        count *= view->shape[d];
    char *to = malloc((size_t)(count * size));
    copy.data = to;
    for (int64_t i = 0; to != NULL && i < count; i++) {
        int64_t at = (char *)view->data - memory->memory;
        for (int32_t d = 0; d < view->num_dims; d++)
            at += index[d] * view->stride[d] * size;
        memcpy(to + i * size, memory->before + at, (size_t)size);
        for (int32_t d = view->num_dims - 1; d >= 0 && ++index[d] >= view->shape[d]; d--)
            index[d] = 0;
    }
    return copy;
}

static void must_be_same(const btx_tensor *copy, const btx_tensor *view)
{
    const int64_t size = (int64_t)btx_dtype_size(view->dtype);
    int64_t count = 1, index[4] = {0};
    for (int32_t d = 0; d < view->num_dims; d++)
        count *= view->shape[d];
    for (int64_t i = 0; i < count; i++) {
        int64_t at = 0;
        for (int32_t d = 0; d < view->num_dims; d++)
            at += index[d] * view->stride[d] * size;
        FUZZ_REQUIRE(memcmp((const char *)copy->data + i * size, (const char *)view->data + at, (size_t)size) == 0,
                     "the layout decides about the result");
        for (int32_t d = view->num_dims - 1; d >= 0 && ++index[d] >= view->shape[d]; d--)
            index[d] = 0;
    }
}

/* Rewrites the same caches in plain layout. */
static void check_twin(fuzz_case *of, const btx_processor *processor, btx_workspace *workspace, btx_status status)
{
    btx_tensor copies[NUM_KINDS][MAX_LAYERS];
    const btx_kv_cache kv_cache = {(int32_t)of->num_layers, copies[KEYS], copies[VALUES]};
    const btx_query_cache query_cache = {(int32_t)of->num_layers, copies[QUERIES]};
    btx_boundary boundary = of->boundary;
    btx_error error = {{0}};
    boundary.kv_cache = &kv_cache;
    boundary.query_cache = &query_cache;
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int64_t layer = 0; layer < of->num_layers; layer++) {
            const fuzz_tensor *tensor = &of->tensors[kind][layer];
            copies[kind][layer] =
                copy_tensor(&of->views[kind][layer], tensor->memory != NULL ? tensor : &of->tensors[KEYS][layer]);
        }
    }
    FUZZ_REQUIRE(btx_rewrite(processor, workspace, &boundary, NULL, &error) == status,
                 "the layout decides about the status");
    for (int kind = 0; kind < NUM_KINDS; kind++) {
        for (int64_t layer = 0; layer < of->num_layers; layer++) {
            must_be_same(&copies[kind][layer], &of->views[kind][layer]);
            free(copies[kind][layer].data);
        }
    }
}

/* Whether every step is one that the descriptors allow, so that its rows may be looked for. */
static int checks_pass(const fuzz_case *of, int32_t recent_window, int for_writing)
{
    btx_boundary_plan plan;
    btx_error error = {{0}};
    const btx_config *config = &of->config;
    const btx_status status = btx_boundary_plan_create(&of->boundary, (btx_device){BTX_CPU, 0}, config->num_layers,
                                                       config->num_kv_heads, config->num_query_heads, config->head_dim,
                                                       config->top_k, recent_window, for_writing, &plan, &error);
    fuzz_check_status(status, &error);
    if (status == BTX_OK)
        btx_boundary_plan_destroy(&plan);
    return status == BTX_OK;
}

static void run_rewrite(fuzz_case *of, const btx_processor *processor, btx_workspace *workspace, int64_t choice)
{
    const int pass = checks_pass(of, of->config.recent_window, 1), plain = !of->is_changed;
    btx_error error = {{0}};
    if (of->is_too_much && pass)
        return;
    if (pass && plain && choice % 2)
        forbid_the_rest(of, of->config.recent_window);
    const btx_status status =
        btx_rewrite(processor, workspace, &of->boundary, choice % 4 < 2 ? &of->report : NULL, &error);
    for_each_tensor(of, allow);
    fuzz_check_status(status, &error);
    FUZZ_REQUIRE(pass || status != BTX_OK, "what is refused when it is checked was done");
    if (status != BTX_OK) {
        for_each_tensor(of, must_be_unchanged);
        if (pass && plain && choice % 4 >= 2 && status == BTX_INVALID_ARGUMENT)
            check_twin(of, processor, workspace, status);
        return;
    }
    if (choice % 4 >= 2) { /* no report */
        of->report = (btx_report){0};
        if (plain)
            check_twin(of, processor, workspace, status);
    }
    check_recalled(of);
    check_written(of);
}

static void run_mass(fuzz_bytes *from, fuzz_case *of, const btx_backend *backend, btx_workspace *workspace,
                     int64_t choice)
{
    const int32_t recent_window = (int32_t)(choice % 8 == 5 ? fuzz_number(from) : of->config.recent_window);
    int64_t longest = 0;
    btx_error error = {{0}};
    for (int64_t s = 0; s < of->boundary.num_steps; s++) {
        const int64_t prior = minus(window_begin(&of->steps[s], recent_window), of->steps[s].sequence_begin);
        longest = prior > longest && prior < FUZZ_MAX_BYTES ? prior : longest;
    }
    make_result(from, &of->mass, make_tensor(BTX_F32, 3, of->num_layers, of->boundary.num_steps, longest, 0),
                &of->is_changed);
    fuzz_remember(&of->mass);
    if (of->is_too_much)
        return;
    const int valid = recent_window > 0 && recent_window <= BTX_MAX_RECENT_WINDOW;
    if (valid && !of->is_changed && choice % 2 && checks_pass(of, recent_window, 0))
        forbid_the_rest(of, recent_window);
    const btx_status status =
        btx_attention_mass(backend, workspace, &of->boundary, recent_window, &of->mass.view, &error);
    for_each_tensor(of, allow);
    fuzz_check_status(status, &error);
    fuzz_tensor mass = of->mass;
    of->mass = (fuzz_tensor){0};
    for_each_tensor(of, must_be_unchanged);
    for (int64_t layer = 0; status == BTX_OK && layer < mass.view.shape[0]; layer++) {
        for (int64_t s = 0; s < mass.view.shape[1]; s++) {
            const int64_t prior = minus(window_begin(&of->steps[s], recent_window), of->steps[s].sequence_begin);
            double total = 0.0;
            for (int64_t i = 0; i < mass.view.shape[2]; i++) {
                const int64_t index[3] = {layer, s, i};
                float value;
                char *at = mass.memory + fuzz_at(&mass, index);
                memcpy(&value, at, 4);
                FUZZ_REQUIRE(value >= 0.0f && (i < prior || value == 0.0f), "mass is negative, or behind the prior");
                total += (double)value;
                memcpy(at, mass.before + (at - mass.memory), 4);
            }
            FUZZ_REQUIRE(total < 1.001, "there is more mass than one");
        }
    }
    must_be_unchanged(&mass);
    fuzz_free(&mass);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_bytes from = {data, data + size};
    static fuzz_case of;
    btx_workspace *workspace;
    of = (fuzz_case){0};
    const btx_backend *backend = fuzz_backend(&from, &workspace);
    const int64_t shape = fuzz_below(&from, NUM_SHAPES), kind = fuzz_byte(&from), choice = fuzz_byte(&from);
    of.config = make_config(shape, kind & 1, kind & 2 ? BTX_BF16 : BTX_F32);
    of.num_layers = kind >= 240 ? 1 + kind % MAX_LAYERS : of.config.num_layers;
    make_views(&from, &of);
    make_tables_and_steps(&from, &of);
    if (kind & 4)
        make_results(&from, &of);
    for_each_tensor(&of, fuzz_remember);
    if (kind & 8)
        run_mass(&from, &of, backend, workspace, choice);
    else
        run_rewrite(&of, find_processor(backend, shape, kind & 1, kind >> 1 & 1), workspace, choice);
    for_each_tensor(&of, fuzz_free);
    return 0;
}
