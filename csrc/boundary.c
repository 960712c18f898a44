/* boundary.c - checks one boundary completely and lays out its rows.
 *
 * Nothing behind this file checks an index again: every block and page that a step can reach is looked at here,
 * before anything is computed or written.
 *
 *     sequence_begin          window_begin      step_end
 *     |-------- prior ---------|---- window ----|          step_begin <= window_begin
 *       num_recalled of these  + all of these   = rows of the step
 */
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static btx_status check_queries(const btx_query_cache *cache, const btx_tensor *keys, int32_t num_layers,
                                int32_t num_query_heads, int32_t head_dim, btx_error *error)
{
    if (cache->num_layers != num_layers)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "the query cache has %d layers; the KV cache has %d",
                        (int)cache->num_layers, (int)num_layers);
    for (int32_t layer = 0; layer < num_layers; layer++) {
        const btx_tensor *view = &cache->queries[layer];
        if (view->num_dims != 4)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "queries of layer %d have %d dimensions; they must be "
                            "[num_pages, page_size, num_query_heads, head_dim]",
                            (int)layer, (int)view->num_dims);
        if (view->dtype != keys->dtype)
            return btx_fail(error, BTX_INVALID_ARGUMENT, "queries of layer %d are %s, keys are %s; use one dtype",
                            (int)layer, btx_dtype_name(view->dtype), btx_dtype_name(keys->dtype));
        if (view->device.type != keys->device.type || view->device.index != keys->device.index)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "queries of layer %d are on another device than the keys; keep them together", (int)layer);
        if (view->shape[2] != num_query_heads || view->shape[3] != head_dim)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "queries of layer %d have %" PRId64 " heads of size %" PRId64
                            "; expected %d heads of size %d",
                            (int)layer, view->shape[2], view->shape[3], (int)num_query_heads, (int)head_dim);
        if (view->data == NULL || view->shape[0] < 1 || view->shape[1] < 1)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "queries of layer %d are empty: %" PRId64 " pages of %" PRId64 " rows", (int)layer,
                            view->shape[0], view->shape[1]);
        if (view->shape[0] != cache->queries[0].shape[0] || view->shape[1] != cache->queries[0].shape[1])
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "queries of layer %d have another number of pages or rows than those of layer 0",
                            (int)layer);
    }
    return BTX_OK;
}

/* Tables are read through plain row pointers. */
static btx_status check_table(const btx_tensor *table, const char *name, btx_error *error)
{
    const int64_t any[2] = {-1, -1};
    btx_status status = btx_tensor_check(table, name, BTX_I32, 2, any, 0, error);
    if (status != BTX_OK)
        return status;
    if (table->shape[0] < 1 || table->shape[1] < 1)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%s is empty: [%" PRId64 ", %" PRId64 "]; it needs a row per sequence", name, table->shape[0],
                        table->shape[1]);
    if (table->shape[1] > 1 && table->stride[1] != 1)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "rows of the %s have stride %" PRId64 "; make them contiguous",
                        name, table->stride[1]);
    return BTX_OK;
}

/* One table: the caller's rows, and the plan's own copy of what is used of them, which is what gets checked. The
 * caller's memory may change while the plan is in use. */
typedef struct table_copy {
    const btx_tensor *from; /* i32 [num_sequences, n] */
    int32_t *to;            /* [num_sequences, n] */
    const char *name, *entry_name;
    int64_t num_entries; /* entries are in [0, num_entries) */
    int64_t *owner;      /* [num_entries], 1 + the sequence that uses an entry; NULL: sequences may share */
} table_copy;

/* Copies and checks entries [begin, end), modulo the row's length, of one sequence. */
static btx_status claim(const table_copy *table, int64_t sequence, int64_t begin, int64_t end, btx_error *error)
{
    const int32_t *from = (const int32_t *)table->from->data + sequence * table->from->stride[0];
    int64_t length = table->from->shape[1];
    for (int64_t i = begin; i < end; i++) {
        int64_t column = i % length;
        int32_t entry = from[column];
        table->to[sequence * length + column] = entry;
        if (entry < 0 || entry >= table->num_entries)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "%s[%" PRId64 ", %" PRId64 "] is %d; there are %" PRId64 " %ss", table->name, sequence,
                            column, (int)entry, table->num_entries, table->entry_name);
        if (table->owner == NULL)
            continue;
        if (table->owner[entry] != 0)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "%s %d belongs to sequences %" PRId64 " and %" PRId64
                            "; each rewritten sequence needs %ss of its own, listed once",
                            table->entry_name, (int)entry, table->owner[entry] - 1, sequence, table->entry_name);
        table->owner[entry] = sequence + 1;
    }
    return BTX_OK;
}

static btx_status check_step(const btx_step *step, int64_t index, const btx_plan *plan, int64_t num_sequences,
                             int64_t max_blocks, btx_error *error)
{
    if (step->sequence < 0 || step->sequence >= num_sequences)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "step %" PRId64 " is of sequence %" PRId64 "; the tables have %" PRId64 " rows", index,
                        step->sequence, num_sequences);
    if (step->sequence_begin < 0 || step->step_begin < step->sequence_begin || step->step_end <= step->step_begin)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "step %" PRId64 " spans [%" PRId64 ", %" PRId64 ") of a sequence that begins at %" PRId64
                        "; a step is not empty and lies within its sequence",
                        index, step->step_begin, step->step_end, step->sequence_begin);
    if (step->step_end > INT32_MAX)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "step %" PRId64 " ends at %" PRId64 "; positions are below 2^31",
                        index, step->step_end);
    if ((step->step_end - 1) / plan->block_size >= max_blocks)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "step %" PRId64 " ends at %" PRId64 "; the block table covers %" PRId64 " positions", index,
                        step->step_end, max_blocks * plan->block_size);
    return BTX_OK;
}

static btx_status lay_out(const btx_boundary *boundary, int32_t top_k, int32_t recent_window, int for_writing,
                          btx_boundary_plan *out, const table_copy *blocks, const table_copy *pages, btx_error *error)
{
    btx_plan *plan = &out->plan;
    int64_t num_sequences = boundary->block_table.shape[0];
    int64_t max_blocks = boundary->block_table.shape[1];
    int64_t ring;
    if (__builtin_mul_overflow(plan->pages_per_sequence, plan->page_size, &ring))
        ring = INT64_MAX;
    for (int64_t i = 0; i < boundary->num_steps; i++) {
        const btx_step *step = &boundary->steps[i];
        btx_status status = check_step(step, i, plan, num_sequences, max_blocks, error);
        if (status != BTX_OK)
            return status;
        for (int64_t j = 0; j < i; j++) {
            if (boundary->steps[j].sequence == step->sequence)
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "sequence %" PRId64 " is listed twice; one call rewrites one step of a sequence",
                                step->sequence);
        }
        if (step->top_k < -1 || (for_writing && step->top_k > top_k))
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "step %" PRId64 " is to recall %" PRId64 " positions; its top_k must be 0 to %d, the "
                            "Processor's",
                            i, step->top_k, (int)top_k);
        btx_plan_step *planned = &out->steps[i];
        int64_t length = step->step_end - step->step_begin;
        planned->sequence = step->sequence;
        planned->sequence_begin = step->sequence_begin;
        planned->num_window = length < recent_window ? length : recent_window;
        planned->window_begin = step->step_end - planned->num_window;
        planned->step_end = step->step_end;
        planned->num_prior = planned->window_begin - step->sequence_begin;
        int64_t recall = step->top_k == 0 || !for_writing ? top_k : step->top_k < 0 ? 0 : step->top_k;
        planned->num_recalled = planned->num_prior < recall ? planned->num_prior : recall;
        planned->prior_offset = plan->total_prior;
        planned->row_offset = plan->total_rows;
        plan->total_prior += planned->num_prior;
        plan->total_rows += planned->num_recalled + planned->num_window;
        if (planned->num_window > ring)
            return btx_fail(error, BTX_INVALID_ARGUMENT,
                            "the window of step %" PRId64 " has %" PRId64 " positions; the query cache keeps %" PRId64
                            " of a sequence: make it at least recent_window long",
                            i, planned->num_window, ring);
        status = claim(blocks, step->sequence, step->sequence_begin / plan->block_size,
                       (step->step_end - 1) / plan->block_size + 1, error);
        if (status != BTX_OK)
            return status;
        int64_t first_page = planned->window_begin / plan->page_size;
        int64_t end_page = (step->step_end - 1) / plan->page_size + 1;
        if (end_page - first_page > plan->pages_per_sequence) /* the last page wraps into the first one's rows */
            end_page = first_page + plan->pages_per_sequence;
        status = claim(pages, step->sequence, first_page, end_page, error);
        if (status != BTX_OK)
            return status;
    }
    if (plan->total_rows > INT32_MAX || plan->total_prior > INT64_MAX / 16)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "one call rewrites %" PRId64 " rows; split it", plan->total_rows);
    return BTX_OK;
}

btx_status btx_boundary_plan_create(const btx_boundary *boundary, btx_device device, int32_t num_layers,
                                    int32_t num_kv_heads, int32_t num_query_heads, int32_t head_dim, int32_t top_k,
                                    int32_t recent_window, int for_writing, btx_boundary_plan *out, btx_error *error)
{
    int64_t *owners = NULL; /* Owned: blocks, then pages. */
    size_t table_bytes = 0, block_table_at = 0, query_table_at = 0;
    memset(out, 0, sizeof *out);
    if (boundary == NULL || boundary->kv_cache == NULL || boundary->query_cache == NULL ||
        (boundary->num_steps > 0 && boundary->steps == NULL) || boundary->num_steps < 0)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "the boundary lacks a KV cache, a query cache or its steps");
    btx_status status = btx_kv_cache_check(boundary->kv_cache, num_layers, num_kv_heads, head_dim, for_writing, error);
    if (status != BTX_OK)
        return status;
    const btx_tensor *keys = boundary->kv_cache->keys;
    status = btx_device_check(&keys[0], "the KV cache", device, error);
    if (status == BTX_OK)
        status = check_queries(boundary->query_cache, keys, num_layers, num_query_heads, head_dim, error);
    if (status == BTX_OK)
        status = check_table(&boundary->block_table, "block_table", error);
    if (status == BTX_OK)
        status = check_table(&boundary->query_table, "query_table", error);
    if (status != BTX_OK)
        return status;
    if (boundary->block_table.shape[0] != boundary->query_table.shape[0])
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "block_table has %" PRId64 " rows, query_table has %" PRId64 "; each has one per sequence",
                        boundary->block_table.shape[0], boundary->query_table.shape[0]);
    float scale = boundary->softmax_scale;
    if (scale == 0.0f)
        scale = 1.0f / sqrtf((float)head_dim);
    if (!(scale >= 1e-30f) || !isfinite(scale)) /* times the lowest float32, it still is below all scores */
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "softmax_scale is %g; it must be finite and 1e-30 or more, or 0 for 1 / sqrt(head_dim)",
                        (double)scale);

    const float limit = boundary->max_relative_edit;
    if (!(limit >= 0.0f) || !isfinite(limit))
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "max_relative_edit is %g; it must be positive and finite, or 0 for no limit", (double)limit);

    const btx_tensor *queries = boundary->query_cache->queries;
    out->plan = (btx_plan){
        .num_steps = boundary->num_steps,
        .keys = keys,
        .values = boundary->kv_cache->values,
        .queries = queries,
        .block_table_stride = boundary->block_table.shape[1],
        .query_table_stride = boundary->query_table.shape[1],
        .pages_per_sequence = boundary->query_table.shape[1],
        .block_size = keys[0].shape[1],
        .page_size = queries[0].shape[1],
        .num_layers = num_layers,
        .num_kv_heads = num_kv_heads,
        .num_query_heads = num_query_heads,
        .head_dim = head_dim,
        .softmax_scale = scale,
        .max_relative_edit = limit,
    };
    if (boundary->num_steps == 0)
        return BTX_OK;

    int64_t num_blocks = keys[0].shape[0], num_pages = queries[0].shape[0];
    /* A sequence is listed at most once, which bounds the steps before anything is allocated for them. */
    if (boundary->num_steps > boundary->block_table.shape[0])
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "%" PRId64 " steps for %" PRId64 " sequences; one call rewrites one step of a sequence",
                        boundary->num_steps, boundary->block_table.shape[0]);
    const btx_tensor *block_table = &boundary->block_table, *query_table = &boundary->query_table;
    if (!btx_reserve(&table_bytes, &block_table_at, block_table->shape[0], (size_t)block_table->shape[1] * 4) ||
        !btx_reserve(&table_bytes, &query_table_at, query_table->shape[0], (size_t)query_table->shape[1] * 4)) {
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "the tables exceed the address space");
        goto cleanup;
    }
    out->steps = calloc((size_t)boundary->num_steps, sizeof *out->steps);
    out->tables = malloc(table_bytes); /* only what steps use is written, the rest never becomes real memory */
    if (for_writing)
        owners = calloc((size_t)num_blocks + (size_t)num_pages, sizeof *owners);
    if (out->steps == NULL || out->tables == NULL || (for_writing && owners == NULL)) {
        status =
            btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for the plan of %" PRId64 " steps", boundary->num_steps);
        goto cleanup;
    }
    out->plan.steps = out->steps;
    out->plan.block_table = (int32_t *)(out->tables + block_table_at);
    out->plan.query_table = (int32_t *)(out->tables + query_table_at);
    const table_copy blocks = {
        block_table, (int32_t *)(out->tables + block_table_at), "block_table", "block", num_blocks, owners};
    const table_copy pages = {query_table, (int32_t *)(out->tables + query_table_at), "query_table", "page",
                              num_pages,   for_writing ? owners + num_blocks : NULL};
    status = lay_out(boundary, top_k, recent_window, for_writing, out, &blocks, &pages, error);

cleanup:
    free(owners);
    if (status != BTX_OK)
        btx_boundary_plan_destroy(out);
    return status;
}

void btx_boundary_plan_destroy(btx_boundary_plan *plan)
{
    free(plan->steps);
    free(plan->tables);
    memset(plan, 0, sizeof *plan);
}
