/* executor.cu - a device's memory, and the calls on it: the plan goes there in one copy, work is ordered on the
 * caller's stream, and what the device refuses is told by a page-locked word that nobody waits for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "operations.cuh"

/* Errors after which every call on the device fails until the process ends. */
static int is_sticky(cudaError_t failure)
{
    switch (failure) {
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorMisalignedAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorECCUncorrectable:
        return 1;
    default:
        return 0;
    }
}

btx_status cuda_fail(cudaError_t failure, const char *what, btx_error *error)
{
    cudaGetLastError(); /* what can be forgotten is */
    if (failure == cudaErrorMemoryAllocation)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of device memory while %s", what);
    if (failure == cudaErrorInsufficientDriver)
        return btx_fail(error, BTX_DEVICE_ERROR, "%s failed: the CUDA driver is too old for this build; update it",
                        what);
    if (failure == cudaErrorNoKernelImageForDevice)
        return btx_fail(error, BTX_DEVICE_ERROR,
                        "%s failed: the kernels are not compiled for this device; build with its architecture in "
                        "BOTTLENECKED_CUDA_ARCHS",
                        what);
    return btx_fail(error, BTX_DEVICE_ERROR, "%s failed: %s (%s)%s", what, cudaGetErrorName(failure),
                    cudaGetErrorString(failure),
                    is_sticky(failure) ? "; the CUDA context of this process is lost: restart the process" : "");
}

btx_status cuda_prepare(cuda_executor *executor, const void *kernel, int most, btx_error *error)
{
    for (int i = 0; i < executor->num_prepared; i++) {
        if (executor->prepared[i] == kernel)
            return BTX_OK;
    }
    BTX_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), "preparing a kernel");
    if (executor->num_prepared < BTX_MAX_PREPARED) /* kernels beyond are prepared each time */
        executor->prepared[executor->num_prepared++] = kernel;
    return BTX_OK;
}

btx_status cuda_enter_device(int32_t device, device_scope *scope, btx_error *error)
{
    int count = 0;
    scope->previous = -1;
    BTX_CUDA_TRY(cudaGetDeviceCount(&count), "looking for a CUDA device");
    if (device < 0 || device >= count)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "there is no cuda:%d; this process sees %d CUDA device%s",
                        (int)device, count, count == 1 ? "" : "s");
    BTX_CUDA_TRY(cudaGetDevice(&scope->previous), "asking for the current device");
    if (scope->previous != device)
        BTX_CUDA_TRY(cudaSetDevice(device), "choosing the device");
    return BTX_OK;
}

void cuda_leave_device(int32_t device, const device_scope *scope)
{
    if (scope->previous >= 0 && scope->previous != device)
        cudaSetDevice(scope->previous);
}

int cuda_available(void)
{
    int count = 0;
    if (cudaGetDeviceCount(&count) == cudaSuccess && count > 0)
        return 1;
    cudaGetLastError();
    return 0;
}

btx_status cuda_allocate(int32_t device, size_t bytes, void **memory, btx_error *error)
{
    device_scope scope;
    *memory = NULL;
    btx_status status = cuda_enter_device(device, &scope, error);
    if (status != BTX_OK)
        return status;
    cudaError_t failure = cudaMalloc(memory, bytes > 0 ? bytes : 1);
    cuda_leave_device(device, &scope);
    if (failure == cudaErrorMemoryAllocation) {
        cudaGetLastError();
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of device memory: cuda:%d has no %zu bytes left", (int)device,
                        bytes);
    }
    BTX_CUDA_TRY(failure, "allocating device memory");
    return BTX_OK;
}

void cuda_release(void *memory)
{
    if (memory != NULL)
        cudaFree(memory);
}

btx_status cuda_upload(int32_t device, void *memory, const void *from, size_t bytes, btx_error *error)
{
    device_scope scope;
    btx_status status = cuda_enter_device(device, &scope, error);
    if (status != BTX_OK)
        return status;
    cudaError_t failure = cudaMemcpy(memory, from, bytes, cudaMemcpyHostToDevice);
    cuda_leave_device(device, &scope);
    BTX_CUDA_TRY(failure, "copying to the device");
    return BTX_OK;
}

/* ---- slots --------------------------------------------------------------------------------------------------------
 */

static void release_slot(plan_slot *slot)
{
    if (slot->host != NULL)
        cudaFreeHost(slot->host);
    if (slot->device != NULL)
        cudaFree(slot->device);
    if (slot->copied != NULL)
        cudaEventDestroy(slot->copied);
    if (slot->done != NULL)
        cudaEventDestroy(slot->done);
    free(slot->sequences);
    memset(slot, 0, sizeof *slot);
}

static refusal *host_refusal(const plan_slot *slot)
{
    return (refusal *)(void *)slot->host;
}

static btx_status grow_slot(plan_slot *slot, size_t bytes, int64_t num_steps, btx_error *error)
{
    if (slot->copied == NULL)
        BTX_CUDA_TRY(cudaEventCreateWithFlags(&slot->copied, cudaEventDisableTiming), "creating an event");
    if (slot->done == NULL)
        BTX_CUDA_TRY(cudaEventCreateWithFlags(&slot->done, cudaEventDisableTiming), "creating an event");
    if (bytes > slot->capacity) {
        unsigned char *host = NULL, *device = NULL;
        size_t capacity = bytes + bytes / 2 + 4096;
        BTX_CUDA_TRY(cudaMallocHost((void **)&host, capacity), "allocating page-locked memory");
        cudaError_t failure = cudaMalloc((void **)&device, capacity);
        if (failure != cudaSuccess) {
            cudaFreeHost(host);
            return cuda_fail(failure, "allocating memory for the plan", error);
        }
        if (slot->host != NULL)
            cudaFreeHost(slot->host);
        if (slot->device != NULL)
            cudaFree(slot->device);
        slot->host = host;
        slot->device = device;
        slot->capacity = capacity;
        host_refusal(slot)->mass = host_refusal(slot)->edit = BTX_NOT_REFUSED;
        host_refusal(slot)->skipped = slot->skipped_told = 0;
    }
    if (num_steps > slot->max_steps) {
        int64_t *sequences = (int64_t *)realloc(slot->sequences, (size_t)num_steps * sizeof *sequences);
        if (sequences == NULL)
            return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for a plan of %lld steps", (long long)num_steps);
        slot->sequences = sequences;
        slot->max_steps = num_steps;
    }
    return BTX_OK;
}

/* Takes note of the steps a slot's calls have skipped. The device's count is never set back, for it may be counting. */
static void collect_skipped(cuda_executor *executor, plan_slot *slot)
{
    if (slot->host == NULL)
        return;
    const unsigned skipped = ((volatile refusal *)host_refusal(slot))->skipped;
    executor->num_skipped += skipped - slot->skipped_told;
    slot->skipped_told = skipped;
}

static void collect_all_skipped(cuda_executor *executor)
{
    for (int i = 0; i < BTX_PLAN_SLOTS; i++)
        collect_skipped(executor, &executor->slots[i]);
    collect_skipped(executor, &executor->capture_slot);
}

/* Tells once what the device refused of a slot's call: when that is done, for until then it may be refused again. */
static btx_status tell_refusal(plan_slot *slot, btx_error *error)
{
    if (slot->host == NULL || slot->num_steps == 0)
        return BTX_OK;
    volatile refusal *found = (volatile refusal *)host_refusal(slot);
    if (found->mass == BTX_NOT_REFUSED && found->edit == BTX_NOT_REFUSED)
        return BTX_OK;
    if (slot->in_use && cudaEventQuery(slot->done) == cudaErrorNotReady) {
        cudaGetLastError(); /* or the next launch would be taken to have failed */
        return BTX_OK;
    }
    const unsigned mass = found->mass, edit = found->edit; /* the first place of all, now that they are final */
    found->mass = found->edit = BTX_NOT_REFUSED;
    const unsigned place = mass != BTX_NOT_REFUSED ? mass : edit;
    const long long layer = place / slot->num_steps, sequence = slot->sequences[place % slot->num_steps];
    if (mass != BTX_NOT_REFUSED)
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "the attention of sequence %lld in layer %lld is not finite: its queries or keys hold NaN or "
                        "infinity, or were never captured; nothing was written",
                        sequence, layer);
    return btx_fail(error, BTX_INVALID_ARGUMENT,
                    "the edit of sequence %lld in layer %lld is not finite: its cache or the weights hold NaN, "
                    "infinity or too large values; nothing was written",
                    sequence, layer);
}

/* ---- executor -----------------------------------------------------------------------------------------------------
 */

void cuda_executor_destroy(void *memory)
{
    cuda_executor *executor = (cuda_executor *)memory;
    device_scope scope;
    btx_error ignored;
    if (executor == NULL)
        return;
    cuda_enter_device(executor->device, &scope, &ignored); /* a lost device is left all the same */
    for (int i = 0; i < BTX_PLAN_SLOTS; i++) {
        if (executor->slots[i].in_use)
            cudaEventSynchronize(executor->slots[i].done);
        release_slot(&executor->slots[i]);
    }
    release_slot(&executor->capture_slot);
    for (int i = 0; i <= BTX_MAX_MARKS; i++) {
        if (executor->marks[i] != NULL)
            cudaEventDestroy(executor->marks[i]);
    }
    cuda_linear_destroy(executor->linear);
    cuda_leave_device(executor->device, &scope);
    cudaGetLastError();
    free(executor);
}

#ifndef BTX_CUDA_ARCHITECTURES /* setup.py says which */
#define BTX_CUDA_ARCHITECTURES ""
#endif

#ifndef BTX_EMULATE
/* Never runs. Whether the device would run code of sm_90a shows in how much shared memory this takes. */
#define SM90A_PROBE_BYTES 8192

static __global__ void sm90a_probe(int *out)
{
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    __shared__ int probe[SM90A_PROBE_BYTES / sizeof(int)];
    probe[threadIdx.x] = out[0];
    __syncthreads();
    out[0] = probe[blockDim.x - 1 - threadIdx.x];
#endif
    (void)out;
}

static btx_status fill_sm90a(cuda_executor *executor, btx_error *error)
{
    cudaFuncAttributes attributes;
    cudaDriverEntryPointQueryResult result;
    if (executor->compute_capability != 90)
        return BTX_OK;
    BTX_CUDA_TRY(cudaFuncGetAttributes(&attributes, sm90a_probe), "asking for a kernel's attributes");
    executor->sm90a = attributes.sharedSizeBytes >= SM90A_PROBE_BYTES;
    if (!executor->sm90a)
        return BTX_OK;
#if CUDART_VERSION >= 12050
    cudaError_t failure = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &executor->encode_tensor_map,
                                                           12000, cudaEnableDefault, &result);
#else
    cudaError_t failure =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &executor->encode_tensor_map, cudaEnableDefault, &result);
#endif
    if (failure != cudaSuccess || result != cudaDriverEntryPointSuccess) {
        cudaGetLastError();
        executor->encode_tensor_map = NULL;
    }
    return BTX_OK;
}
#else
static btx_status fill_sm90a(cuda_executor *executor, btx_error *error)
{
    (void)error;
    executor->sm90a = btx_emulation_sm90a();
    return BTX_OK;
}
#endif

/* Whether products are to be plain arithmetic and plain stores: neither cuBLASLt's nor those of linear_swiglu_sm90.cu.
 * Slower, and for tools that do not see bulk stores (tests/sanitize_cuda.py). */
static btx_status wants_general_products(int *general, btx_error *error)
{
    const char *products = getenv("BOTTLENECKED_CUDA_PRODUCTS");
    *general = products != NULL && strcmp(products, "general") == 0;
    if (products == NULL || products[0] == '\0' || *general)
        return BTX_OK;
    return btx_fail(error, BTX_INVALID_ARGUMENT, "BOTTLENECKED_CUDA_PRODUCTS is \"%.100s\", which is not \"general\"",
                    products);
}

static btx_status fill_executor(cuda_executor *executor, btx_error *error)
{
    int major = 0, minor = 0, general = 0;
    btx_status status = wants_general_products(&general, error);
    if (status != BTX_OK)
        return status;
    BTX_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, executor->device),
                 "asking for the device's architecture");
    BTX_CUDA_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, executor->device),
                 "asking for the device's architecture");
    executor->compute_capability = 10 * major + minor;
    BTX_CUDA_TRY(cudaDeviceGetAttribute(&executor->num_processors, cudaDevAttrMultiProcessorCount, executor->device),
                 "asking for the device's size");
    BTX_CUDA_TRY(
        cudaDeviceGetAttribute(&executor->shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, executor->device),
        "asking for the device's shared memory");
    status = fill_sm90a(executor, error);
    if (status != BTX_OK)
        return status;
    if (general) {
        executor->encode_tensor_map = NULL;
        return BTX_OK;
    }
    return cuda_linear_create(executor->device, &executor->linear, error);
}

btx_status cuda_executor_create(int32_t device, int32_t num_threads, void **out, btx_error *error)
{
    device_scope scope;
    (void)num_threads; /* the caller's own is enough to launch */
    *out = NULL;
    btx_status status = cuda_enter_device(device, &scope, error);
    if (status != BTX_OK)
        return status;
    cuda_executor *executor = (cuda_executor *)calloc(1, sizeof *executor);
    if (executor == NULL) {
        cuda_leave_device(device, &scope);
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for an executor");
    }
    executor->device = device;
    status = fill_executor(executor, error);
    cuda_leave_device(device, &scope);
    if (status != BTX_OK) {
        cuda_executor_destroy(executor);
        return status;
    }
    *out = executor;
    return BTX_OK;
}

/* Whether what was captured on the executor's stream may still become a graph. */
static int is_capture_active(const cuda_executor *executor)
{
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusActive;
    if (cudaStreamIsCapturing(executor->stream, &capture) == cudaSuccess)
        return capture == cudaStreamCaptureStatusActive;
    cudaGetLastError(); /* or the next launch would be taken to have failed */
    return 1;
}

/* The latest call, as far as the next one on another stream must wait for it. What is captured is the graph's from the
 * first run on, unless one fails and ends the capture: then there is no graph that anybody could use. */
static btx_status mark_done(cuda_executor *executor, int failed, btx_error *error)
{
    if (executor->capturing)
        executor->captured = !failed || is_capture_active(executor);
    if (executor->slot == NULL || executor->capturing)
        return BTX_OK;
    BTX_CUDA_TRY(cudaEventRecord(executor->slot->done, executor->stream), "recording an event");
    executor->slot->in_use = 1;
    executor->latest = executor->slot;
    executor->latest_stream = executor->stream;
    return BTX_OK;
}

btx_status cuda_executor_run(void *memory, int64_t num_units, btx_unit_function fn, void *context, btx_error *error)
{
    cuda_executor *executor = (cuda_executor *)memory;
    device_scope scope;
    btx_status status = cuda_enter_device(executor->device, &scope, error);
    if (status != BTX_OK)
        return status;
    for (int64_t unit = 0; unit < num_units && status == BTX_OK; unit++)
        status = fn(context, unit, 0, error);
    btx_error ignored;
    btx_status recorded = mark_done(executor, status != BTX_OK, status == BTX_OK ? error : &ignored);
    cuda_leave_device(executor->device, &scope);
    return status == BTX_OK ? recorded : status;
}

/* ---- the plan -----------------------------------------------------------------------------------------------------
 */

static int is_vector(const btx_tensor *view, int32_t head_dim)
{
    const int64_t lanes = view->dtype == BTX_F32 ? 4 : 8;
    return head_dim % 8 == 0 && view->stride[3] == 1 && (uintptr_t)view->data % 16 == 0 &&
           view->stride[0] % lanes == 0 && view->stride[1] % lanes == 0 && view->stride[2] % lanes == 0;
}

/* See device_view. */
static int32_t unit_of_rows(const btx_tensor *view)
{
    const int64_t block = view->stride[0], row = view->stride[1];
    int32_t log2 = view->dtype == BTX_F32 ? 2 : 3;
    if (block < 0 || row < 0)
        return 0;
    while (log2 < 20 && ((block | row) >> log2) % 2 == 0)
        log2++;
    /* A strided extent of 2^63 elements would not be in memory. */
    return (view->shape[0] * block + view->shape[1] * row) >> log2 <= INT32_MAX ? 1 << log2 : 0;
}

static device_view make_view(const btx_tensor *view, int32_t head_dim)
{
    device_view made = {view->data, {view->stride[0], view->stride[1], view->stride[2], view->stride[3]}, 0, 0};
    made.vector = is_vector(view, head_dim);
    if (made.vector)
        made.unit = unit_of_rows(view);
    return made;
}

static int64_t round_up(int64_t value, int64_t unit)
{
    return (value + unit - 1) / unit * unit;
}

/* Keys of a split: as many as make at most BTX_LSE_MAX_SPLITS of them. */
static int64_t keys_per_split(int64_t num_keys)
{
    int64_t keys = round_up((num_keys + BTX_LSE_MAX_SPLITS - 1) / BTX_LSE_MAX_SPLITS, BTX_LSE_MIN_KEYS);
    return keys > BTX_LSE_MIN_KEYS ? keys : BTX_LSE_MIN_KEYS;
}

static int64_t keys_per_range(int64_t num_prior)
{
    int64_t keys = round_up((num_prior + 15) / 16, BTX_MASS_MIN_KEYS);
    keys = keys > BTX_MASS_MIN_KEYS ? keys : BTX_MASS_MIN_KEYS;
    return keys < BTX_MASS_MAX_KEYS ? keys : BTX_MASS_MAX_KEYS;
}

/* Where the parts of a plan lie in its block. */
typedef struct plan_layout {
    size_t refused, skipped, layers, steps, blocks, pages, row_step, splits, ranges, bytes;
    int64_t num_blocks, num_splits, num_ranges, most_splits, most_ranges, split_rows;
    int64_t max_window, max_prior;
} plan_layout;

static size_t place(size_t *bytes, int64_t count, size_t size)
{
    size_t at = *bytes;
    *bytes = (size_t)round_up((int64_t)(*bytes + (size_t)count * size), 16);
    return at;
}

static plan_layout lay_out(const btx_plan *plan)
{
    plan_layout layout = {0};
    for (int64_t s = 0; s < plan->num_steps; s++) {
        const btx_plan_step *step = &plan->steps[s];
        const int64_t keys = step->num_prior + step->num_window;
        const int64_t splits = (keys + keys_per_split(keys) - 1) / keys_per_split(keys);
        layout.num_blocks += (step->step_end - 1) / plan->block_size - step->sequence_begin / plan->block_size + 1;
        layout.num_splits += splits;
        layout.split_rows += splits * step->num_window;
        const int64_t ranges =
            (step->num_prior + keys_per_range(step->num_prior) - 1) / keys_per_range(step->num_prior);
        layout.num_ranges += ranges;
        layout.most_splits = splits > layout.most_splits ? splits : layout.most_splits;
        layout.most_ranges = ranges > layout.most_ranges ? ranges : layout.most_ranges;
        layout.max_window = step->num_window > layout.max_window ? step->num_window : layout.max_window;
        layout.max_prior = step->num_prior > layout.max_prior ? step->num_prior : layout.max_prior;
    }
    /* The host's refusal comes first and is not copied. */
    place(&layout.bytes, 1, sizeof(refusal));
    layout.refused = place(&layout.bytes, 1, sizeof(refusal));
    layout.skipped = place(&layout.bytes, plan->num_steps, sizeof(unsigned));
    layout.layers = place(&layout.bytes, plan->num_layers, sizeof(device_layer));
    layout.steps = place(&layout.bytes, plan->num_steps, sizeof(device_step));
    layout.blocks = place(&layout.bytes, layout.num_blocks, sizeof(int32_t));
    layout.pages = place(&layout.bytes, plan->num_steps * plan->pages_per_sequence, sizeof(int32_t));
    layout.row_step = place(&layout.bytes, plan->total_rows, sizeof(int32_t));
    layout.splits = place(&layout.bytes, layout.num_splits, sizeof(device_tile));
    layout.ranges = place(&layout.bytes, layout.num_ranges, sizeof(device_tile));
    return layout;
}

static void fill_steps(const btx_plan *plan, const plan_layout *layout, unsigned char *host, int64_t *sequences)
{
    device_step *steps = (device_step *)(void *)(host + layout->steps);
    int32_t *blocks = (int32_t *)(void *)(host + layout->blocks), *pages = (int32_t *)(void *)(host + layout->pages);
    int32_t *row_step = (int32_t *)(void *)(host + layout->row_step);
    device_tile *splits = (device_tile *)(void *)(host + layout->splits);
    device_tile *ranges = (device_tile *)(void *)(host + layout->ranges);
    int64_t block_offset = 0, split_offset = 0;
    for (int64_t s = 0; s < plan->num_steps; s++) {
        const btx_plan_step *from = &plan->steps[s];
        const int64_t keys = from->num_prior + from->num_window, first_block = from->sequence_begin / plan->block_size;
        const int64_t num_blocks = (from->step_end - 1) / plan->block_size - first_block + 1;
        device_step *to = &steps[s];
        sequences[s] = from->sequence;
        to->prior_offset = from->prior_offset;
        to->row_offset = (int32_t)from->row_offset;
        to->sequence_begin = (int32_t)from->sequence_begin;
        to->num_prior = (int32_t)from->num_prior;
        to->num_window = (int32_t)from->num_window;
        to->num_recalled = (int32_t)from->num_recalled;
        to->first_block = (int32_t)first_block;
        to->block_offset = (int32_t)block_offset;
        to->page_offset = (int32_t)(s * plan->pages_per_sequence);
        to->keys_per_split = (int32_t)keys_per_split(keys);
        to->num_splits = (int32_t)((keys + to->keys_per_split - 1) / to->keys_per_split);
        to->keys_per_range = (int32_t)keys_per_range(from->num_prior);
        to->split_offset = (int32_t)split_offset;
        memcpy(blocks + block_offset, plan->block_table + from->sequence * plan->block_table_stride + first_block,
               (size_t)num_blocks * sizeof *blocks);
        memcpy(pages + to->page_offset, plan->query_table + from->sequence * plan->query_table_stride,
               (size_t)plan->pages_per_sequence * sizeof *pages);
        block_offset += num_blocks;
        split_offset += (int64_t)to->num_splits * to->num_window;
        for (int64_t row = 0; row < from->num_recalled + from->num_window; row++)
            row_step[from->row_offset + row] = (int32_t)s;
        for (int32_t i = 0; i < to->num_splits; i++, splits++)
            splits->step = (int32_t)s, splits->index = i;
        for (int32_t i = 0; i * (int64_t)to->keys_per_range < from->num_prior; i++, ranges++)
            ranges->step = (int32_t)s, ranges->index = i;
    }
}

static device_plan make_plan(const btx_plan *plan, const plan_layout *layout, const plan_slot *slot)
{
    unsigned char *device = slot->device;
    device_plan made = {0};
    made.layers = (const device_layer *)(void *)(device + layout->layers);
    made.steps = (const device_step *)(void *)(device + layout->steps);
    made.blocks = (const int32_t *)(void *)(device + layout->blocks);
    made.pages = (const int32_t *)(void *)(device + layout->pages);
    made.row_step = (const int32_t *)(void *)(device + layout->row_step);
    made.splits = (const device_tile *)(void *)(device + layout->splits);
    made.ranges = (const device_tile *)(void *)(device + layout->ranges);
    made.refused = (refusal *)(void *)(device + layout->refused);
    made.refused_host = host_refusal(slot); /* one address for both sides */
    made.skipped = (unsigned *)(void *)(device + layout->skipped);
    made.rope_inv_freq = plan->rope_inv_freq;
    made.total_prior = plan->total_prior;
    made.total_rows = (int32_t)plan->total_rows;
    made.num_steps = (int32_t)plan->num_steps;
    made.num_splits = (int32_t)layout->num_splits;
    made.num_ranges = (int32_t)layout->num_ranges;
    made.most_splits = (int32_t)layout->most_splits;
    made.most_ranges = (int32_t)layout->most_ranges;
    made.split_rows = (int32_t)layout->split_rows;
    made.max_window = (int32_t)layout->max_window;
    made.max_prior = (int32_t)layout->max_prior;
    made.num_kv_heads = plan->num_kv_heads;
    made.group = plan->num_query_heads / plan->num_kv_heads;
    made.head_dim = plan->head_dim;
    /* A contiguous cache may have blocks beyond 2^31 positions: no position is. */
    made.block_size = (int32_t)(plan->block_size < INT32_MAX ? plan->block_size : INT32_MAX);
    made.block_shift = -1;
    for (int32_t shift = 0; shift < 31; shift++)
        made.block_shift = made.block_size == (int32_t)1 << shift ? shift : made.block_shift;
    made.page_size = (int32_t)(plan->page_size < INT32_MAX ? plan->page_size : INT32_MAX);
    made.pages_per_sequence = (int32_t)plan->pages_per_sequence;
    made.scale_log2 = plan->softmax_scale * 1.44269504f;
    made.mass_scale = 1.0f / (float)plan->num_query_heads;
    made.max_relative_edit = plan->max_relative_edit;
    return made;
}

/* What kernels index with 32 bits. */
static btx_status check_limits(const btx_plan *plan, const plan_layout *layout, btx_error *error)
{
    const int64_t rows = (int64_t)plan->num_layers * plan->total_rows;
    if (rows > INT32_MAX || layout->split_rows * plan->num_query_heads > INT32_MAX || plan->num_steps > 65535 ||
        layout->num_blocks > INT32_MAX || plan->num_steps * plan->pages_per_sequence > INT32_MAX)
        return btx_fail(error, BTX_UNSUPPORTED,
                        "one call of %lld steps and %lld rows is too large for the device; split it",
                        (long long)plan->num_steps, (long long)rows);
    return BTX_OK;
}

static btx_status refuse_of_graph(btx_error *error)
{
    return btx_fail(error, BTX_INVALID_ARGUMENT,
                    "this workspace belongs to a captured CUDA graph; use another one for other calls");
}

/* Refuses whatever is to come where a captured graph owns the executor, and says whether stream is being captured. */
static btx_status look_at_graphs(const cuda_executor *executor, cudaStream_t stream, int *capturing, btx_error *error)
{
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    const cudaError_t failure = cudaStreamIsCapturing(stream, &capture);
    if (failure == cudaErrorStreamCaptureImplicit) {
        cudaGetLastError(); /* or the next launch would be taken to have failed */
        return btx_fail(error, BTX_INVALID_ARGUMENT,
                        "a CUDA graph is captured on another stream, and the default stream cannot be used until that "
                        "has ended; name a stream of your own");
    }
    BTX_CUDA_TRY(failure, "looking at the stream");
    *capturing = capture != cudaStreamCaptureStatusNone;
    return executor->captured ? refuse_of_graph(error) : BTX_OK;
}

static btx_status refuse_to_wait(btx_error *error)
{
    return btx_fail(error, BTX_INVALID_ARGUMENT,
                    "what a CUDA graph captures cannot be waited for: of these calls capture only a rewrite without a "
                    "report");
}

static btx_status refuse_to_allocate(btx_error *error)
{
    return btx_fail(error, BTX_INVALID_ARGUMENT,
                    "memory cannot be allocated while a CUDA graph is captured: make the same call once before");
}

/* refuse: what is said of a call on a stream that is being captured. */
static btx_status check_stream(const cuda_executor *executor, cudaStream_t stream,
                               btx_status (*refuse)(btx_error *error), btx_error *error)
{
    device_scope scope;
    int capturing = 0;
    btx_status status = cuda_enter_device(executor->device, &scope, error);
    if (status != BTX_OK)
        return status;
    status = look_at_graphs(executor, stream, &capturing, error);
    cuda_leave_device(executor->device, &scope);
    return status == BTX_OK && capturing ? refuse(error) : status;
}

btx_status cuda_check_wait(void *memory, void *stream, btx_error *error)
{
    return check_stream((const cuda_executor *)memory, (cudaStream_t)stream, refuse_to_wait, error);
}

btx_status cuda_check_growth(void *memory, void *const *stream, btx_error *error)
{
    const cuda_executor *executor = (const cuda_executor *)memory;
    if (stream == NULL)
        return executor->captured ? refuse_of_graph(error) : BTX_OK;
    return check_stream(executor, (cudaStream_t)*stream, refuse_to_allocate, error);
}

static btx_status begin_on_device(cuda_executor *executor, const btx_plan *plan, cudaStream_t stream, int timed,
                                  btx_error *error)
{
    const plan_layout layout = lay_out(plan);
    int capturing = 0;
    btx_status status = check_limits(plan, &layout, error);
    if (status == BTX_OK)
        status = look_at_graphs(executor, stream, &capturing, error);
    if (status != BTX_OK)
        return status;
    plan_slot *slot = capturing ? &executor->capture_slot : &executor->slots[executor->next_slot];
    if (capturing && (layout.bytes > slot->capacity || plan->num_steps > slot->max_steps))
        return refuse_to_allocate(error);
    if (!capturing) {
        if (slot->in_use) {
            BTX_CUDA_TRY(cudaEventSynchronize(slot->done), "waiting for an earlier boundary");
            slot->in_use = 0;
        }
        collect_all_skipped(executor);
        /* Failures that nobody waited for. */
        for (int i = 0; i < BTX_PLAN_SLOTS; i++) {
            plan_slot *earlier = &executor->slots[(executor->next_slot + i) % BTX_PLAN_SLOTS];
            status = tell_refusal(earlier, error);
            if (status != BTX_OK)
                return status;
        }
        status = grow_slot(slot, layout.bytes, plan->num_steps, error);
        if (status == BTX_OK)
            status = grow_slot(&executor->capture_slot, layout.bytes, plan->num_steps, error);
        if (status != BTX_OK)
            return status;
        /* The workspace's memory is the latest call's until that is done. */
        if (executor->latest != NULL && executor->latest->in_use && executor->latest_stream != stream)
            BTX_CUDA_TRY(cudaStreamWaitEvent(stream, executor->latest->done, 0), "ordering two streams");
        executor->next_slot = (executor->next_slot + 1) % BTX_PLAN_SLOTS;
    }
    slot->num_steps = plan->num_steps;
    refusal *refused = (refusal *)(void *)(slot->host + layout.refused);
    refused->mass = refused->edit = host_refusal(slot)->mass = host_refusal(slot)->edit = BTX_NOT_REFUSED;
    refused->skipped = 0; /* not used there */
    memset(slot->host + layout.skipped, 0, (size_t)plan->num_steps * sizeof(unsigned));
    device_layer *layers = (device_layer *)(void *)(slot->host + layout.layers);
    for (int32_t layer = 0; layer < plan->num_layers; layer++) {
        layers[layer].keys = make_view(&plan->keys[layer], plan->head_dim);
        layers[layer].values = make_view(&plan->values[layer], plan->head_dim);
        layers[layer].queries = make_view(&plan->queries[layer], plan->head_dim);
    }
    fill_steps(plan, &layout, slot->host, slot->sequences);
    executor->plan = make_plan(plan, &layout, slot);
    executor->slot = slot;
    executor->stream = stream;
    executor->capturing = capturing;
    executor->timed = timed; /* where it is, check_wait has seen that nothing is captured */
    executor->num_marks = 0;
    BTX_CUDA_TRY(cudaMemcpyAsync(slot->device + layout.refused, slot->host + layout.refused,
                                 layout.bytes - layout.refused, cudaMemcpyHostToDevice, stream),
                 "copying the plan to the device");
    if (executor->timed) {
        if (executor->marks[0] == NULL)
            BTX_CUDA_TRY(cudaEventCreate(&executor->marks[0]), "creating an event");
        BTX_CUDA_TRY(cudaEventRecord(executor->marks[0], stream), "recording an event");
    }
    return BTX_OK;
}

btx_status cuda_begin(void *memory, const btx_plan *plan, void *stream, int timed, btx_error *error)
{
    cuda_executor *executor = (cuda_executor *)memory;
    device_scope scope;
    btx_status status = cuda_enter_device(executor->device, &scope, error);
    if (status != BTX_OK)
        return status;
    status = begin_on_device(executor, plan, (cudaStream_t)stream, timed, error);
    cuda_leave_device(executor->device, &scope);
    return status;
}

void cuda_mark(void *memory, btx_stage stage)
{
    cuda_executor *executor = (cuda_executor *)memory;
    if (!executor->timed || executor->num_marks == BTX_MAX_MARKS)
        return;
    cudaEvent_t *mark = &executor->marks[executor->num_marks + 1];
    if ((*mark == NULL && cudaEventCreate(mark) != cudaSuccess) ||
        cudaEventRecord(*mark, executor->stream) != cudaSuccess) {
        executor->timed = 0;
        cudaGetLastError(); /* or the next launch would be taken to have failed */
        return;
    }
    executor->mark_stage[++executor->num_marks] = stage;
}

btx_status cuda_download(void *memory, void *to, const void *from, size_t bytes, btx_error *error)
{
    cuda_executor *executor = (cuda_executor *)memory;
    device_scope scope;
    btx_status status = cuda_enter_device(executor->device, &scope, error);
    if (status != BTX_OK)
        return status;
    cudaError_t failure = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, executor->stream);
    if (failure == cudaSuccess)
        failure = cudaStreamSynchronize(executor->stream);
    cuda_leave_device(executor->device, &scope);
    BTX_CUDA_TRY(failure, "copying from the device");
    return BTX_OK;
}

static btx_status synchronize_on_device(cuda_executor *executor, double *stage_seconds, btx_error *error)
{
    for (int i = 0; i < BTX_PLAN_SLOTS; i++) {
        plan_slot *slot = &executor->slots[(executor->next_slot + i) % BTX_PLAN_SLOTS];
        if (slot->in_use)
            BTX_CUDA_TRY(cudaEventSynchronize(slot->done), "running the boundary");
        slot->in_use = 0;
    }
    collect_all_skipped(executor);
    for (int i = 0; stage_seconds != NULL && executor->timed && i < executor->num_marks; i++) {
        float milliseconds = 0.0f;
        BTX_CUDA_TRY(cudaEventElapsedTime(&milliseconds, executor->marks[i], executor->marks[i + 1]),
                     "timing the boundary");
        stage_seconds[executor->mark_stage[i + 1]] += 1e-3 * (double)milliseconds;
    }
    for (int i = 0; i < BTX_PLAN_SLOTS; i++) {
        btx_status status = tell_refusal(&executor->slots[(executor->next_slot + i) % BTX_PLAN_SLOTS], error);
        if (status != BTX_OK)
            return status;
    }
    return tell_refusal(&executor->capture_slot, error);
}

int64_t cuda_num_skipped(const void *executor)
{
    return ((const cuda_executor *)executor)->num_skipped;
}

btx_status cuda_synchronize(void *memory, double *stage_seconds, btx_error *error)
{
    cuda_executor *executor = (cuda_executor *)memory;
    device_scope scope;
    if (executor->slot == NULL)
        return BTX_OK;
    btx_status status = cuda_enter_device(executor->device, &scope, error);
    if (status != BTX_OK)
        return status;
    status = synchronize_on_device(executor, stage_seconds, error);
    cuda_leave_device(executor->device, &scope);
    return status;
}

/* ---- description --------------------------------------------------------------------------------------------------
 */

void btx_cuda_describe(btx_cuda_info *info)
{
    int version = 0;
    memset(info, 0, sizeof *info);
    info->architectures = BTX_CUDA_ARCHITECTURES;
    info->available = cuda_available();
    if (cudaDriverGetVersion(&version) == cudaSuccess && version > 0)
        snprintf(info->driver, sizeof info->driver, "%d.%d", version / 1000, version % 1000 / 10);
    if (info->available) {
        struct cudaDeviceProp properties;
        if (cudaGetDeviceProperties(&properties, 0) == cudaSuccess)
            snprintf(info->device, sizeof info->device, "%.255s", properties.name);
    }
    size_t library = cuda_linear_version();
    if (library > 0)
        snprintf(info->cublaslt, sizeof info->cublaslt, "%zu.%zu.%zu", library / 10000, library / 100 % 100,
                 library % 100);
    cudaGetLastError();
}
