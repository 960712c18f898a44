/* paging.h - where a position lies: position -> block -> element, for keys, values and the query ring.
 *
 * The checks of a plan guarantee that every position it names lies in its tables and tensors, so nothing is
 * checked here. Offsets are in elements. */
#ifndef BTX_PAGING_H
#define BTX_PAGING_H

#include "btx.h"
#include "simd.h"

/* Element (position, head 0, 0) of a key or value view. */
static inline int64_t btx_kv_offset(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position)
{
    const int32_t *blocks = plan->block_table + sequence * plan->block_table_stride;
    return blocks[position / plan->block_size] * view->stride[0] + position % plan->block_size * view->stride[1];
}

/* Element (position, head 0, 0) of a query view: the pages of a sequence are a ring. */
static inline int64_t btx_query_offset(const btx_plan *plan, const btx_tensor *view, int64_t sequence, int64_t position)
{
    const int32_t *pages = plan->query_table + sequence * plan->query_table_stride;
    int32_t page = pages[position / plan->page_size % plan->pages_per_sequence];
    return page * view->stride[0] + position % plan->page_size * view->stride[1];
}

/* to[0 ... n) = n elements from an offset on, stride apart, widened exactly to f32. */
static inline void btx_load_elements(const btx_tensor *view, int64_t offset, int64_t stride, int64_t n, float *to)
{
    const float *single = view->data;
    const uint16_t *half = view->data;
    int64_t i = 0, whole = n - n % BTX_VL;
    int tail = (int)(n - whole);
    switch (view->dtype) {
    case BTX_F32:
        single += offset;
        if (stride != 1) {
            for (; i < n; i++)
                to[i] = single[i * stride];
            return;
        }
        for (; i < whole; i += BTX_VL)
            vf_store(to + i, vf_load(single + i));
        vf_store_n(to + i, vf_load_n(single + i, tail), tail);
        return;
    case BTX_BF16:
        half += offset;
        if (stride != 1) {
            for (; i < n; i++)
                to[i] = btx_bf16_to_f32(half[i * stride]);
            return;
        }
        for (; i < whole; i += BTX_VL)
            vf_store(to + i, vf_load_bf16(half + i));
        vf_store_n(to + i, vf_load_bf16_n(half + i, tail), tail);
        return;
    default: /* BTX_F16: checked views have no other dtype */
        half += offset;
        if (stride != 1) {
            for (; i < n; i++)
                to[i] = btx_f16_to_f32(half[i * stride]);
            return;
        }
        for (; i < whole; i += BTX_VL)
            vf_store(to + i, vf_load_f16(half + i));
        vf_store_n(to + i, vf_load_f16_n(half + i, tail), tail);
    }
}

/* Scratch starts on a cache line wherever the caller's memory does; BTX_SCRATCH_ALIGNMENT bytes are lost. */
#define BTX_SCRATCH_ALIGNMENT ((size_t)64)

static inline char *btx_scratch(const btx_pass *pass)
{
    uintptr_t misfit = (uintptr_t)pass->scratch % BTX_SCRATCH_ALIGNMENT;
    return (char *)pass->scratch + (misfit == 0 ? 0 : BTX_SCRATCH_ALIGNMENT - misfit);
}

#endif /* BTX_PAGING_H */
