/* operations.c - fuzz target: all of the C API but a boundary (rewrite.c): Processors from configurations and weights,
 * workspaces, names of backends, query capture, selection, one product, and the check for overlaps.
 *
 * The first byte chooses. A refused call must have written nothing; an accepted one what its description says, and
 * nothing beside it. Shapes may be huge where their strides make them one element. */
#include <math.h>

#include "fuzz.h"

enum { MOST_WORK = 1 << 20 }; /* elements that a call is given time for */

/* A dimension: small, seldom huge. */
static int64_t dimension(fuzz_bytes *from, int64_t limit)
{
    const int64_t small = fuzz_byte(from);
    return small < 224 ? small % limit : fuzz_number(from);
}

static fuzz_tensor make_tensor(fuzz_bytes *from, btx_dtype dtype, int32_t num_dims, int64_t a, int64_t b, int64_t c,
                               int64_t d)
{
    const int64_t shape[4] = {a, b, c, d};
    fuzz_tensor made = {.view = {.dtype = dtype, .num_dims = num_dims}};
    memcpy(made.view.shape, shape, sizeof shape);
    for (int32_t i = 0; i < num_dims; i++) {
        if (shape[i] > FUZZ_MAX_BYTES || shape[i] < 0)
            made.view.shape[i] = 1;
    }
    fuzz_lay_out(from, &made.view);
    for (int32_t i = 0; i < num_dims; i++) {
        if (made.view.shape[i] != shape[i])
            made.view.stride[i] = 0;
    }
    memcpy(made.view.shape, shape, sizeof shape);
    if (fuzz_byte(from) >= 240)
        fuzz_mutate(from, &made.view);
    return made;
}

static int back_and_fill(fuzz_bytes *from, fuzz_tensor *tensor)
{
    if (!fuzz_back(tensor))
        return 0;
    const int64_t seed = fuzz_byte(from);
    fuzz_fill(tensor, (uint32_t)seed, seed % 16 == 15);
    return 1;
}

static int64_t product(int64_t a, int64_t b)
{
    int64_t of;
    return a < 0 || b < 0 || __builtin_mul_overflow(a, b, &of) ? INT64_MAX : of;
}

/* Now and then an element of an integer tensor is anything. */
static void strange_entries(fuzz_bytes *from, fuzz_tensor *tensor)
{
    for (int64_t left = fuzz_byte(from) % 8; left > 4 && tensor->bytes >= 8; left--) {
        const int64_t entry = fuzz_number(from), size = (int64_t)btx_dtype_size(tensor->view.dtype);
        const int64_t place = fuzz_byte(from) % ((int64_t)tensor->bytes / size) * size;
        memcpy(tensor->memory + place, &entry, (size_t)size);
    }
}

/* ---- selection ---- */

static void select_rows(fuzz_bytes *from)
{
    btx_workspace *workspace;
    const btx_backend *backend = fuzz_backend(from, &workspace);
    const int64_t rows = dimension(from, 6), n = dimension(from, 40), top_k = dimension(from, 12);
    fuzz_tensor mass = make_tensor(from, BTX_F32, 2, rows, n, 0, 0);
    fuzz_tensor lengths = make_tensor(from, BTX_I64, 1, rows, 0, 0, 0);
    fuzz_tensor out = make_tensor(from, BTX_I64, 2, rows, top_k, 0, 0);
    btx_error error = {{0}};
    const int has_memory = back_and_fill(from, &mass) & back_and_fill(from, &lengths) & back_and_fill(from, &out);
    strange_entries(from, &lengths);
    fuzz_remember(&mass);
    fuzz_remember(&lengths);
    fuzz_remember(&out);
    /* Too many rows to remember have to be refused. */
    const int is_short = product(out.view.shape[0], mass.view.shape[1]) < MOST_WORK &&
                         product(out.view.shape[0], out.view.shape[1]) < MOST_WORK;
    if (has_memory && (is_short || out.view.shape[0] > (int64_t)1 << 32)) {
        const btx_status status = btx_select_top_k(backend, &mass.view, &lengths.view, &out.view, &error);
        fuzz_check_status(status, &error);
        for (int64_t row = 0; status == BTX_OK && row < out.view.shape[0] && out.bytes > 0; row++) {
            const int64_t at[1] = {row};
            int64_t length, last = -1;
            memcpy(&length, lengths.memory + fuzz_at(&lengths, at), 8);
            for (int64_t i = 0; i < out.view.shape[1]; i++) {
                const int64_t index[2] = {row, i}, place = fuzz_at(&out, index);
                int64_t found;
                memcpy(&found, out.memory + place, 8);
                FUZZ_REQUIRE(i < length ? found > last && found < length : found == -1, "a selected position is none");
                last = found;
                memcpy(out.memory + place, out.before + place, 8);
            }
        }
        FUZZ_REQUIRE(fuzz_is_unchanged(&mass) && fuzz_is_unchanged(&lengths) && fuzz_is_unchanged(&out),
                     "bytes were written that may not be");
    }
    fuzz_free(&mass);
    fuzz_free(&lengths);
    fuzz_free(&out);
}

/* ---- query capture ---- */

/* What an accepted call has to leave in the pages; 0 where two tokens share a row, which callers must not do. */
static int expect_captured(const fuzz_tensor *query, const fuzz_tensor *slots, const fuzz_tensor *mapping,
                           fuzz_tensor *pages)
{
    const int64_t page_size = pages->view.shape[1], size = (int64_t)btx_dtype_size(query->view.dtype);
    char taken[256] = {0};
    for (int64_t token = 0; token < slots->view.shape[0]; token++) {
        const int64_t at[1] = {token};
        int64_t slot;
        int32_t page;
        memcpy(&slot, slots->memory + fuzz_at(slots, at), 8);
        if (slot < 0)
            continue;
        const int64_t block[1] = {slot / page_size};
        memcpy(&page, mapping->memory + fuzz_at(mapping, block), 4);
        if (page < 0)
            continue;
        const int64_t row = page * page_size + slot % page_size;
        if (row >= 256 || taken[row]++)
            return 0;
        const int64_t heads = query->view.shape[2] > 0 ? query->view.shape[1] : 0; /* there may be 2^61 of nothing */
        for (int64_t head = 0; head < heads; head++) {
            for (int64_t i = 0; i < query->view.shape[2]; i++) {
                const int64_t source[3] = {token, head, i}, target[4] = {page, slot % page_size, head, i};
                memcpy(pages->before + fuzz_at(pages, target), query->memory + fuzz_at(query, source), (size_t)size);
            }
        }
    }
    return 1;
}

static void capture(fuzz_bytes *from)
{
    static const btx_dtype dtypes[4] = {BTX_F32, BTX_BF16, BTX_F16, BTX_I32};
    btx_workspace *workspace;
    const btx_backend *backend = fuzz_backend(from, &workspace);
    const btx_dtype dtype = dtypes[fuzz_below(from, 4)];
    const int64_t tokens = dimension(from, 8), heads = dimension(from, 4), head_dim = dimension(from, 20);
    fuzz_tensor query = make_tensor(from, dtype, 3, tokens, heads, head_dim, 0);
    fuzz_tensor slots = make_tensor(from, BTX_I64, 1, dimension(from, 8), 0, 0, 0);
    fuzz_tensor mapping = make_tensor(from, BTX_I32, 1, dimension(from, 10), 0, 0, 0);
    const int64_t num_pages = dimension(from, 6);
    fuzz_tensor pages = make_tensor(from, dtype, 4, num_pages, dimension(from, 6), heads, head_dim);
    fuzz_tensor *const all[4] = {&query, &slots, &mapping, &pages};
    btx_error error = {{0}};
    int has_memory = 1;
    for (int i = 0; i < 4; i++)
        has_memory &= back_and_fill(from, all[i]);
    strange_entries(from, &slots);
    strange_entries(from, &mapping);
    for (int i = 0; i < 4; i++)
        fuzz_remember(all[i]);
    const int64_t work = product(product(slots.view.shape[0], query.view.shape[1]), query.view.shape[2]);
    if (has_memory && work < MOST_WORK && slots.view.shape[0] < MOST_WORK) {
        const btx_status status =
            btx_capture_queries(backend, 0, &query.view, &slots.view, &mapping.view, &pages.view, NULL, &error);
        fuzz_check_status(status, &error);
        const int expected = status != BTX_OK || expect_captured(&query, &slots, &mapping, &pages);
        FUZZ_REQUIRE(fuzz_is_unchanged(&query) && fuzz_is_unchanged(&slots) && fuzz_is_unchanged(&mapping),
                     "what is only read was written");
        FUZZ_REQUIRE(!expected || fuzz_is_unchanged(&pages), "the pages are not what they have to be");
    }
    for (int i = 0; i < 4; i++)
        fuzz_free(all[i]);
}

/* ---- one product ---- */

static void multiply(fuzz_bytes *from)
{
    btx_workspace *workspace;
    const btx_backend *backend = fuzz_backend(from, &workspace);
    const int64_t choice = fuzz_byte(from), layers = dimension(from, 4);
    const int64_t out_dim = dimension(from, 40), in_dim = dimension(from, 40), rows = dimension(from, 24);
    const int64_t other = choice % 16 == 15 ? rows / 2 : rows;
    fuzz_tensor weight = make_tensor(from, BTX_F32, 3, layers, out_dim, in_dim, 0);
    fuzz_tensor bias = make_tensor(from, BTX_F32, 2, layers, out_dim, 0, 0);
    fuzz_tensor x = make_tensor(from, BTX_F32, 3, layers, rows, in_dim, 0);
    fuzz_tensor out = make_tensor(from, BTX_F32, 3, layers, other, out_dim, 0);
    btx_packed_linear *linear = NULL;
    btx_error error = {{0}};
    int has_memory =
        back_and_fill(from, &weight) & back_and_fill(from, &bias) & back_and_fill(from, &x) & back_and_fill(from, &out);
    if (choice % 8 == 7 && x.bytes > 0 && out.bytes > 0 && out.bytes <= x.bytes) { /* out within x */
        fuzz_free(&out);
        out.bytes = 0;
        out.view.data = x.memory + fuzz_byte(from) % (x.bytes - (x.bytes > 4 ? 4 : 0)) / 4 * 4;
        has_memory &= (size_t)((char *)out.view.data - x.memory) == 0 && out.view.stride[0] >= 0;
        has_memory &= out.view.stride[1] >= 0 && out.view.stride[2] >= 0;
    }
    fuzz_remember(&weight);
    fuzz_remember(&bias);
    fuzz_remember(&x);
    fuzz_remember(&out);
    has_memory &= product(product(weight.view.shape[0], weight.view.shape[1]), weight.view.shape[2]) < MOST_WORK;
    has_memory &= product(product(layers, rows), in_dim > out_dim ? in_dim : out_dim) < MOST_WORK;
    if (has_memory) {
        btx_status status = btx_packed_linear_create(backend, &weight.view, choice & 1 ? &bias.view : NULL,
                                                     choice & 2 ? BTX_BF16 : BTX_F32, &linear, &error);
        fuzz_check_status(status, &error);
        FUZZ_REQUIRE((status == BTX_OK) == (linear != NULL), "a product and a failure");
        if (linear != NULL) {
            FUZZ_REQUIRE(btx_packed_linear_bytes(linear) > 0, "a product of nothing");
            status = btx_packed_linear_apply(linear, workspace, &x.view, choice >> 2 & 1, &out.view, &error);
            fuzz_check_status(status, &error);
            FUZZ_REQUIRE(status == BTX_OK || fuzz_is_unchanged(&out), "a refused product wrote");
        }
        btx_packed_linear_destroy(linear);
        FUZZ_REQUIRE(fuzz_is_unchanged(&weight) && fuzz_is_unchanged(&bias) && fuzz_is_unchanged(&x),
                     "what is only read was written");
    }
    fuzz_free(&weight);
    fuzz_free(&bias);
    fuzz_free(&x);
    fuzz_free(&out);
}

/* ---- Processors ---- */

static float inv_freq[2048];

static btx_config make_config(fuzz_bytes *from)
{
    btx_config config = {
        .num_layers = (int32_t)(1 + fuzz_below(from, 3)),
        .num_kv_heads = (int32_t)(1 + fuzz_below(from, 3)),
        .head_dim = (int32_t)(2 * (1 + fuzz_below(from, 10))),
        .processor_heads = (int32_t)(1 + fuzz_below(from, 3)),
        .processor_mlp_dim = (int32_t)(1 + fuzz_below(from, 24)),
        .top_k = (int32_t)fuzz_below(from, 40),
        .recent_window = (int32_t)(1 + fuzz_below(from, 40)),
        .norm_eps = 1e-6f,
    };
    config.num_query_heads = config.num_kv_heads * (int32_t)(1 + fuzz_below(from, 3));
    config.processor_dim = config.processor_heads * (int32_t)(1 + fuzz_below(from, 9));
    const int64_t kind = fuzz_byte(from);
    config.weight_dtype = kind & 1 ? BTX_BF16 : BTX_F32;
    config.key_space = kind & 2 ? BTX_KEYS_UNROTATED : BTX_KEYS_ROTATED;
    config.rope_inv_freq = kind & 2 ? inv_freq : NULL;
    for (int64_t changes = kind >= 128 ? kind / 4 % 4 : 0; changes > 0; changes--) {
        int32_t *const fields[9] = {
            &config.num_layers, &config.num_kv_heads,  &config.num_query_heads,
            &config.head_dim,   &config.processor_dim, &config.processor_heads,
            &config.top_k,      &config.recent_window, &config.processor_mlp_dim,
        };
        const int64_t field = fuzz_below(from, 14);
        if (field < 9)
            *fields[field] = (int32_t)fuzz_number(from);
        else if (field == 9)
            config.norm_eps = fuzz_float(from);
        else if (field == 10)
            config.key_space = (btx_key_space)fuzz_below(from, 4);
        else if (field == 11)
            config.weight_dtype = (btx_dtype)fuzz_below(from, 6);
        else if (field == 12)
            config.rope_inv_freq = NULL;
        else
            inv_freq[fuzz_below(from, 8)] = fuzz_float(from);
    }
    return config;
}

/* Largest boundaries planned: more of anything never needs less. */
static void plan_workspaces(fuzz_bytes *from, const btx_processor *processor)
{
    const int32_t threads = (int32_t)dimension(from, 9);
    const int64_t sequences = dimension(from, 200), tokens = dimension(from, 250);
    const btx_dtype dtype = (btx_dtype)fuzz_below(from, 6);
    size_t bytes = 0, more = 0;
    btx_error error = {{0}};
    btx_status status = btx_processor_workspace_bytes(processor, threads, sequences, tokens, dtype, &bytes, &error);
    fuzz_check_status(status, &error);
    if (status == BTX_OK && tokens < INT32_MAX &&
        btx_processor_workspace_bytes(processor, threads, sequences, tokens + 1, dtype, &more, &error) == BTX_OK)
        FUZZ_REQUIRE(more >= bytes, "longer sequences need less");
    if (status == BTX_OK && sequences < 65536 &&
        btx_processor_workspace_bytes(processor, threads, sequences + 1, tokens, dtype, &more, &error) == BTX_OK)
        FUZZ_REQUIRE(more >= bytes, "more sequences need less");
}

static void create_processor(fuzz_bytes *from)
{
    enum { MAX_TENSORS = 4 * BTX_NUM_WEIGHTS };
    static fuzz_tensor tensors[MAX_TENSORS];
    static btx_tensor views[MAX_TENSORS];
    btx_workspace *workspace;
    const btx_backend *backend = fuzz_backend(from, &workspace);
    for (int i = 0; i < 8; i++)
        inv_freq[i] = 1.0f / (float)(i + 1);
    const btx_config config = make_config(from);
    btx_processor *processor = NULL;
    btx_error error = {{0}};
    btx_status status = btx_config_check(&config, &error);
    fuzz_check_status(status, &error);
    if (status != BTX_OK) {
        btx_error again = {{0}};
        FUZZ_REQUIRE(btx_processor_create(backend, 0, &config, NULL, &processor, &again) == status && processor == NULL,
                     "a Processor of a configuration that is none");
        FUZZ_REQUIRE(strcmp(error.message, again.message) == 0, "another sentence the second time");
        return;
    }
    const int64_t width = 2 * (int64_t)config.num_kv_heads * config.head_dim;
    const int64_t widest = width > config.processor_mlp_dim ? width : config.processor_mlp_dim;
    const int count = config.num_layers * BTX_NUM_WEIGHTS;
    if (count > MAX_TENSORS || product(config.processor_dim, widest) > 1 << 13 || config.processor_dim > 64)
        return;
    const int64_t changed = fuzz_byte(from) < 128 ? -1 : fuzz_byte(from) % count, layout = fuzz_byte(from);
    int has_memory = 1;
    for (int i = 0; i < count; i++) {
        int64_t shape[2] = {1, 1};
        fuzz_bytes none = {NULL, NULL};
        const int32_t num_dims = btx_weight_shape(&config, (btx_weight)(i % BTX_NUM_WEIGHTS), shape);
        tensors[i] = make_tensor(layout % 8 == 7 ? from : &none, BTX_F32, num_dims, shape[0], shape[1], 0, 0);
        tensors[i].view.dtype = (btx_dtype)(layout % 3);
        if (i == changed)
            fuzz_mutate(from, &tensors[i].view);
        has_memory &= fuzz_back(&tensors[i]);
        fuzz_fill(&tensors[i], (uint32_t)i, i == changed && layout & 32);
        views[i] = tensors[i].view;
    }
    if (has_memory) {
        status = btx_processor_create(backend, 0, &config, views, &processor, &error);
        fuzz_check_status(status, &error);
        FUZZ_REQUIRE((status == BTX_OK) == (processor != NULL), "a Processor and a failure");
        if (processor != NULL) {
            FUZZ_REQUIRE(btx_processor_bytes(processor) > 0 && btx_processor_backend(processor) == backend,
                         "a Processor of nothing");
            plan_workspaces(from, processor);
        }
        btx_processor_destroy(processor);
    }
    for (int i = 0; i < count; i++)
        fuzz_free(&tensors[i]);
}

/* ---- the rest ---- */

static void create_workspace(fuzz_bytes *from)
{
    btx_workspace *workspace = NULL;
    const btx_backend *backend = fuzz_backend(from, &workspace);
    const int32_t threads = (int32_t)fuzz_number(from);
    const int64_t bytes = fuzz_number(from);
    btx_error error = {{0}};
    btx_status status = btx_workspace_create(backend, 0, threads, &workspace, &error);
    fuzz_check_status(status, &error);
    FUZZ_REQUIRE((status == BTX_OK) == (workspace != NULL), "a workspace and a failure");
    if (workspace == NULL)
        return;
    status = btx_workspace_reserve(workspace, (size_t)bytes, &error);
    fuzz_check_status(status, &error);
    FUZZ_REQUIRE(btx_workspace_bytes(workspace) == (status == BTX_OK ? (size_t)bytes : 0), "not what was reserved");
    btx_workspace_destroy(workspace);
}

static void find_backend(fuzz_bytes *from)
{
    char name[64] = {0};
    const btx_backend *backend = NULL;
    int32_t device_index = -1;
    btx_error error = {{0}};
    const size_t left = (size_t)(from->end - from->at), length = left < sizeof name ? left : sizeof name - 1;
    if (length > 0)
        memcpy(name, from->at, length);
    const btx_status status = btx_backend_find(name, &backend, &device_index, &error);
    fuzz_check_status(status, &error);
    FUZZ_REQUIRE((status == BTX_OK) == (backend != NULL), "a backend and a failure");
    FUZZ_REQUIRE(backend == NULL || backend->available(), "a backend that cannot run here");
}

/* Against all pairs of elements, where they can be counted: "no overlap" is never wrong. */
static void check_overlaps(fuzz_bytes *from)
{
    static unsigned char seen[2 * FUZZ_MAX_BYTES];
    btx_tensor view = {.num_dims = (int32_t)fuzz_below(from, BTX_MAX_DIMS + 1), .dtype = BTX_F16};
    int64_t index[BTX_MAX_DIMS] = {0}, count = 1, low = 0;
    size_t bytes, first;
    for (int32_t d = 0; d < view.num_dims; d++) {
        view.shape[d] = dimension(from, 5);
        const int64_t stride = fuzz_byte(from);
        view.stride[d] = stride < 224 ? stride % 30 - 4 : fuzz_number(from);
        count = product(count, view.shape[d]);
    }
    const int overlaps = btx_tensor_overlaps(&view);
    if (overlaps || count > 4096 || !fuzz_span(&view, &bytes, &first))
        return;
    memset(seen, 0, bytes + 2);
    low = (int64_t)first / 2;
    for (int64_t i = 0; i < count; i++) {
        int64_t at = low;
        for (int32_t d = 0; d < view.num_dims; d++)
            at += index[d] * view.stride[d];
        FUZZ_REQUIRE(!seen[at], "two indices reach one element");
        seen[at] = 1;
        for (int32_t d = view.num_dims - 1; d >= 0 && ++index[d] >= view.shape[d]; d--)
            index[d] = 0;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static void (*const calls[])(fuzz_bytes *) = {select_rows,      capture,      multiply,      create_processor,
                                                  create_workspace, find_backend, check_overlaps};
    fuzz_bytes from = {data, data + size};
    const int64_t choice = fuzz_below(&from, (int64_t)(sizeof calls / sizeof *calls));
    calls[choice](&from);
    return 0;
}
