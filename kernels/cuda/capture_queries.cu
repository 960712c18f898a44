/* capture_queries.cu - query capture: the queries of tokens just computed, to the pages of their blocks. One launch per
 * layer of the stack's attention, on buffers that keep their addresses, so that a CUDA graph may hold it. */
#include "operations.cuh"

#define THREADS 128

typedef struct capture_views {
    const void *query;
    void *pages;
    const int64_t *slots;
    const int32_t *block_to_page;
    int64_t query_stride[3], page_stride[4]; /* in elements */
    int64_t slot_stride, block_stride, page_size, num_blocks, num_pages;
    int32_t heads, head_dim;
} capture_views;

/* Block: a token. T: an unsigned integer, of an element or, where all rows allow it, of 16 bytes; strides and head_dim
 * are then in these. */
template <typename T> __global__ void __launch_bounds__(THREADS) capture_kernel(const capture_views views)
{
    const int64_t token = blockIdx.x, slot = views.slots[token * views.slot_stride], block = slot / views.page_size;
    if (slot < 0 || block >= views.num_blocks)
        return;
    const int64_t page = views.block_to_page[block * views.block_stride];
    if (page < 0 || page >= views.num_pages)
        return;
    const T *from = (const T *)views.query + token * views.query_stride[0];
    T *to = (T *)views.pages + page * views.page_stride[0] + slot % views.page_size * views.page_stride[1];
    for (int32_t i = threadIdx.x; i < views.heads * views.head_dim; i += THREADS) {
        const int32_t head = i / views.head_dim, column = i - head * views.head_dim;
        to[head * views.page_stride[2] + column * views.page_stride[3]] =
            from[head * views.query_stride[1] + column * views.query_stride[2]];
    }
}

/* Whether every head of a view begins on 16 bytes and lies in one piece. */
static int is_vector(const btx_tensor *view, int64_t lanes)
{
    const int32_t last = view->num_dims - 1;
    int vector = view->stride[last] == 1 && view->shape[last] % lanes == 0 && (uintptr_t)view->data % 16 == 0;
    for (int32_t d = 0; d < last; d++)
        vector = vector && view->stride[d] % lanes == 0;
    return vector;
}

static btx_status launch(const btx_tensor *query, const btx_tensor *slots, const btx_tensor *block_to_page,
                         const btx_tensor *pages, cudaStream_t stream, btx_error *error)
{
    const int64_t size = query->dtype == BTX_F32 ? 4 : 2, lanes = 16 / size;
    const int vector = is_vector(query, lanes) && is_vector(pages, lanes);
    const int64_t unit = vector ? lanes : 1;
    capture_views views;
    views.query = query->data;
    views.pages = pages->data;
    views.slots = (const int64_t *)slots->data;
    views.block_to_page = (const int32_t *)block_to_page->data;
    for (int32_t d = 0; d < 3; d++)
        views.query_stride[d] = d == 2 ? query->stride[d] : query->stride[d] / unit;
    for (int32_t d = 0; d < 4; d++)
        views.page_stride[d] = d == 3 ? pages->stride[d] : pages->stride[d] / unit;
    views.slot_stride = slots->stride[0];
    views.block_stride = block_to_page->stride[0];
    views.page_size = pages->shape[1];
    views.num_blocks = block_to_page->shape[0];
    views.num_pages = pages->shape[0];
    views.heads = (int32_t)query->shape[1];
    views.head_dim = (int32_t)(query->shape[2] / unit);
    const dim3 grid((unsigned)slots->shape[0]);
    if (vector)
        BTX_LAUNCH((capture_kernel<uint4>), grid, THREADS, 0, stream, views);
    else if (size == 4)
        BTX_LAUNCH((capture_kernel<unsigned>), grid, THREADS, 0, stream, views);
    else
        BTX_LAUNCH((capture_kernel<unsigned short>), grid, THREADS, 0, stream, views);
    BTX_CUDA_CHECK("launching capture_kernel");
    return BTX_OK;
}

btx_status cuda_capture_queries(int32_t device_index, const btx_tensor *query, const btx_tensor *slots,
                                const btx_tensor *block_to_page, const btx_tensor *pages, void *stream,
                                btx_error *error)
{
    device_scope scope;
    if (slots->shape[0] == 0)
        return BTX_OK;
    btx_status status = cuda_enter_device(device_index, &scope, error);
    if (status != BTX_OK)
        return status;
    status = launch(query, slots, block_to_page, pages, (cudaStream_t)stream, error);
    cuda_leave_device(device_index, &scope);
    return status;
}
