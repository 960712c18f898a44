/* capture_queries.c - query capture: the queries of tokens just computed, to the pages of their blocks. */
#include <inttypes.h>
#include <string.h>

#include "btx.h"

static btx_status btx_cpu_capture_queries(int32_t device_index, const btx_tensor *query, const btx_tensor *slots,
                                          const btx_tensor *block_to_page, const btx_tensor *pages, void *stream,
                                          btx_error *error)
{
    const int64_t page_size = pages->shape[1], num_blocks = block_to_page->shape[0], num_pages = pages->shape[0];
    const int64_t heads = query->shape[1], head_dim = query->shape[2], size = query->dtype == BTX_F32 ? 4 : 2;
    const int64_t *slot_of = slots->data;
    const int32_t *page_of = block_to_page->data;
    const int rows_are_whole = query->stride[2] == 1 && pages->stride[3] == 1;
    (void)device_index, (void)stream;
    for (int pass = 0; pass < 2; pass++) { /* first a look at every index */
        for (int64_t i = 0; i < slots->shape[0]; i++) {
            const int64_t slot = slot_of[i * slots->stride[0]], block = slot / page_size;
            if (slot < 0)
                continue;
            if (block >= num_blocks)
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "slots[%" PRId64 "] is %" PRId64 ", in block %" PRId64 "; block_to_page has %" PRId64
                                " entries",
                                i, slot, block, num_blocks);
            const int64_t page = page_of[block * block_to_page->stride[0]];
            if (page >= num_pages)
                return btx_fail(error, BTX_INVALID_ARGUMENT,
                                "block_to_page[%" PRId64 "] is %" PRId64 "; there are %" PRId64 " pages", block, page,
                                num_pages);
            if (page < 0 || pass == 0 || heads == 0 || head_dim == 0) /* empty tensors may have no data */
                continue;
            const char *from = (const char *)query->data + i * query->stride[0] * size;
            char *to = (char *)pages->data + (page * pages->stride[0] + slot % page_size * pages->stride[1]) * size;
            for (int64_t head = 0; head < heads; head++) {
                const char *from_head = from + head * query->stride[1] * size;
                char *to_head = to + head * pages->stride[2] * size;
                if (rows_are_whole) {
                    memcpy(to_head, from_head, (size_t)(head_dim * size));
                    continue;
                }
                for (int64_t c = 0; c < head_dim; c++)
                    memcpy(to_head + c * pages->stride[3] * size, from_head + c * query->stride[2] * size,
                           (size_t)size);
            }
        }
    }
    return BTX_OK;
}
