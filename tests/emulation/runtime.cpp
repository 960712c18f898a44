/* runtime.cpp - CUDA's runtime as far as kernels/cuda/ needs it, on the host: one device, of which tests may see
 * several, and one queue for all streams.
 *
 * Work is done when it is called for, or, deferred, when somebody waits for any of it: in order, all of it. */
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "internal.h"

struct CUstream_st {
    int unused;
};

struct CUevent_st {
    bool timed, recorded; /* recorded: since it was called for last */
    int64_t num_calls;
    std::chrono::steady_clock::time_point time;
};

namespace btx_emulation {
constexpr size_t GUARD = 256; /* bytes around device memory; AddressSanitizer does better without */
constexpr unsigned char GUARD_BYTE = 0xfb;
constexpr size_t DEFAULT_SHARED = 48 << 10;

struct allocation {
    size_t bytes;
    void *memory; /* what to free */
    bool on_host;
};

struct fault {
    int64_t at; /* the call that fails, counted from 1 by calls[function].count */
    bool after; /* and all after it */
    int error;  /* 0: its natural one */
};

struct function {
    int64_t count;
    std::vector<fault> faults;
};

struct runtime {
    std::recursive_mutex mutex;
    std::map<std::string, function> functions;
    std::map<const unsigned char *, allocation> allocations;
    std::map<CUevent_st *, std::shared_ptr<CUevent_st>> events;
    std::map<CUstream_st *, std::unique_ptr<CUstream_st>> streams;
    std::map<const void *, size_t> shared_limits; /* of kernels that asked for more */
    std::deque<std::function<void()>> queue;
    std::vector<std::function<void()>> graph; /* what the latest capture holds */
    bool defer = false, running_queue = false, capturing = false, invalidated = false;
    cudaError_t sticky = cudaSuccess, last = cudaSuccess;
    char message[2048] = "";
    int64_t launches = 0, launches_of_seed = 0;
    int num_devices = 1;
    std::map<int, int64_t> launches_by_device; /* since the devices were numbered */
    size_t max_shared = 227 << 10;             /* an H100's */
    uint64_t seed = 1;

    runtime()
    {
        const char *seed_text = getenv("BTX_EMULATE_SEED"), *defer_text = getenv("BTX_EMULATE_DEFER");
        if (seed_text != nullptr)
            seed = strtoull(seed_text, nullptr, 10);
        defer = defer_text != nullptr && atoi(defer_text) != 0;
        if (const char *kib = getenv("BTX_EMULATE_SHARED_KIB"))
            max_shared = strtoull(kib, nullptr, 10) << 10;
        add_faults(getenv("BTX_EMULATE_FAIL"));
    }

    void add_faults(const char *text)
    {
        const std::string all = text != nullptr ? text : "";
        for (size_t begin = 0; begin < all.size();) {
            size_t end = all.find(',', begin);
            end = end == std::string::npos ? all.size() : end;
            const std::string one = all.substr(begin, end - begin);
            const size_t colon = one.find(':');
            char *rest = nullptr;
            const long at = colon != std::string::npos ? strtol(one.c_str() + colon + 1, &rest, 10) : 0;
            if (at < 1) {
                fprintf(stderr, "emulation: '%s' is not 'function:number'\n", one.c_str());
                abort();
            }
            function &named = functions[one.substr(0, colon)];
            fault made = {named.count + at, *rest == '+', 0};
            rest += made.after;
            made.error = *rest == ':' ? atoi(rest + 1) : 0;
            named.faults.push_back(made);
            begin = end + 1;
        }
    }
};

static thread_local int current_device = 0;

static runtime &state(void)
{
    static runtime *made = new runtime; /* never destroyed: others may be, later */
    return *made;
}

static bool is_sticky(cudaError_t error)
{
    return error >= cudaErrorIllegalAddress && error <= cudaErrorLaunchFailure &&
           error != cudaErrorLaunchOutOfResources;
}

static cudaError_t remember(cudaError_t error)
{
    runtime &all = state();
    if (error == cudaSuccess || error == cudaErrorNotReady)
        return error;
    if (is_sticky(error) && all.sticky == cudaSuccess) {
        all.sticky = error;
        fprintf(stderr, "emulation: %s\n", all.message[0] != '\0' ? all.message : cudaGetErrorName(error));
    }
    return all.last = error;
}

/* What a call was made to fail with; some of it ends a capture. */
static cudaError_t error_of(const fault &planned, cudaError_t natural)
{
    const cudaError_t error = planned.error != 0 ? (cudaError_t)planned.error : natural;
    state().invalidated |= error == cudaErrorStreamCaptureUnsupported || error == cudaErrorStreamCaptureInvalidated;
    return error;
}

/* The start of a call: counts it; what it fails with, by the device's state or on demand. */
static cudaError_t called(const char *name, cudaError_t natural)
{
    runtime &all = state();
    function &own = all.functions[name];
    own.count++;
    for (const fault &planned : own.faults) {
        if (own.count == planned.at || (planned.after && own.count > planned.at)) {
            const cudaError_t error = error_of(planned, natural);
            if (is_sticky(error) && all.sticky == cudaSuccess)
                snprintf(all.message, sizeof all.message, "call %lld of %s was made to fail", (long long)own.count,
                         name);
            return remember(error);
        }
    }
    return all.sticky;
}

void submit(std::function<void()> what)
{
    runtime &all = state();
    if (all.capturing)
        all.graph.push_back(std::move(what));
    else if (all.defer)
        all.queue.push_back(std::move(what));
    else
        what();
}

static void do_one(void)
{
    runtime &all = state();
    std::function<void()> next = std::move(all.queue.front());
    all.queue.pop_front();
    all.running_queue = true;
    next();
    all.running_queue = false;
}

/* What must not be called while a stream is captured. */
static cudaError_t invalidate(void)
{
    state().invalidated = true;
    return remember(cudaErrorStreamCaptureUnsupported);
}

/* All that was called for is done; what the device says of it. */
static cudaError_t wait(void)
{
    runtime &all = state();
    if (all.capturing)
        return invalidate();
    while (!all.queue.empty() && !all.running_queue)
        do_one();
    return all.sticky;
}

/* Device memory, or page-locked; its neighbour in memory never is. */
static std::map<const unsigned char *, allocation>::iterator find(const void *at)
{
    runtime &all = state();
    auto next = all.allocations.upper_bound(static_cast<const unsigned char *>(at));
    if (next == all.allocations.begin())
        return all.allocations.end();
    --next;
    const size_t offset = (size_t)(static_cast<const unsigned char *>(at) - next->first);
    return offset < next->second.bytes + (offset == 0) ? next : all.allocations.end();
}

/* Is it memory of the caller's (which nobody knows the size of), or does it lie within one allocation? */
static bool reaches(const void *at, size_t bytes)
{
    auto found = find(at);
    return found == state().allocations.end() ||
           bytes <= found->second.bytes - (size_t)(static_cast<const unsigned char *>(at) - found->first);
}

static cudaError_t allocate(void **memory, size_t bytes, bool on_host)
{
    unsigned char *made = nullptr;
    *memory = nullptr;
    if (state().capturing)
        return invalidate();
    if (bytes == 0)
        return cudaSuccess;
#ifdef __SANITIZE_ADDRESS__
    const size_t guard = 0;
#else
    const size_t guard = GUARD;
#endif
    if (posix_memalign(reinterpret_cast<void **>(&made), 256, bytes + 2 * guard) != 0)
        return remember(cudaErrorMemoryAllocation);
    memset(made, GUARD_BYTE, guard);
    memset(made + guard, 0xff, bytes);
    memset(made + guard + bytes, GUARD_BYTE, guard);
    state().allocations[made + guard] = allocation{bytes, made, on_host};
    *memory = made + guard;
    return cudaSuccess;
}

static cudaError_t release(void *memory, bool on_host)
{
    runtime &all = state();
    if (memory == nullptr)
        return cudaSuccess;
    const cudaError_t waited = wait();
    auto found = all.allocations.find(static_cast<unsigned char *>(memory));
    if (found == all.allocations.end() || found->second.on_host != on_host) {
        fprintf(stderr, "emulation: %p is freed, but is no %s memory in use\n", memory,
                on_host ? "page-locked" : "device");
        return remember(cudaErrorInvalidValue);
    }
    free(found->second.memory);
    all.allocations.erase(found);
    return waited;
}

bool guards_hold(char *message, size_t message_size)
{
#ifndef __SANITIZE_ADDRESS__
    for (const auto &[begin, own] : state().allocations) {
        for (size_t i = 0; i < GUARD; i++) {
            if (begin[-1 - (ptrdiff_t)i] != GUARD_BYTE) {
                snprintf(message, message_size, "wrote %zu bytes before %zu bytes of device memory", i + 1, own.bytes);
                return false;
            }
            if (begin[own.bytes + i] != GUARD_BYTE) {
                snprintf(message, message_size, "wrote to byte %zu of %zu bytes of device memory", own.bytes + i,
                         own.bytes);
                return false;
            }
        }
    }
#endif
    (void)message, (void)message_size;
    return true;
}

void launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes,
            void (*call)(const void *arguments), void *arguments, void (*release_arguments)(void *arguments))
{
    runtime &all = state();
    std::lock_guard<std::recursive_mutex> lock(all.mutex);
    std::shared_ptr<void> kept(arguments, release_arguments);
    if (all.sticky != cudaSuccess)
        return;
    const uint64_t threads = (uint64_t)block.x * block.y * block.z;
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
        threads == 0 || threads > MAX_THREADS || block.z > 64) {
        fprintf(stderr, "emulation: kernel %s: no launch with a grid of (%u, %u, %u) blocks of (%u, %u, %u) threads\n",
                name, grid.x, grid.y, grid.z, block.x, block.y, block.z);
        remember(cudaErrorInvalidConfiguration);
        return;
    }
    auto limit = all.shared_limits.find(kernel);
    if (shared_bytes > (limit != all.shared_limits.end() ? limit->second : DEFAULT_SHARED)) {
        fprintf(stderr, "emulation: kernel %s: no launch with %zu bytes of shared memory; it was granted %zu\n", name,
                shared_bytes, limit != all.shared_limits.end() ? limit->second : DEFAULT_SHARED);
        remember(cudaErrorInvalidValue);
        return;
    }
    const work own = {
        name, grid, block, shared_bytes, call, arguments, all.seed * 1000003 + (uint64_t)all.launches_of_seed};
    all.launches++;
    all.launches_of_seed++;
    all.launches_by_device[current_device]++;
    function &counted = all.functions["launch"];
    cudaError_t planned = cudaSuccess;
    counted.count++;
    for (const fault &one : counted.faults)
        if (counted.count == one.at || (one.after && counted.count > one.at))
            planned = error_of(one, cudaErrorIllegalAddress);
    if (planned != cudaSuccess && !is_sticky(planned)) {
        remember(planned);
        return;
    }
    submit([own, kept, planned] {
        runtime &now = state();
        if (now.sticky != cudaSuccess)
            return;
        if (planned != cudaSuccess) {
            snprintf(now.message, sizeof now.message, "kernel %s was made to fail", own.name);
            remember(planned);
            return;
        }
        char message[sizeof now.message];
        cudaError_t error = run_blocks(own, message, sizeof message);
        if (error == cudaSuccess && !guards_hold(message, sizeof message)) {
            error = cudaErrorIllegalAddress;
            snprintf(now.message, sizeof now.message, "kernel %s: ", own.name);
        }
        else if (error != cudaSuccess) {
            now.message[0] = '\0';
        }
        if (error != cudaSuccess) {
            strncat(now.message, message, sizeof now.message - strlen(now.message) - 1);
            remember(error);
        }
    });
}
} // namespace btx_emulation

using namespace btx_emulation;

/* The lock, the count, the sticky error and the faults of every call. */
#define CALLED(natural)                                                                                                \
    std::lock_guard<std::recursive_mutex> lock(state().mutex);                                                         \
    if (const cudaError_t failed_ = called(__func__, natural))                                                         \
    return failed_

/* ---- memory -------------------------------------------------------------------------------------------------------
 */

cudaError_t cudaMalloc(void **memory, size_t bytes)
{
    CALLED(cudaErrorMemoryAllocation);
    return allocate(memory, bytes, false);
}

cudaError_t cudaHostAlloc(void **memory, size_t bytes, unsigned)
{
    CALLED(cudaErrorMemoryAllocation);
    return allocate(memory, bytes, true);
}

cudaError_t cudaMallocHost(void **memory, size_t bytes)
{
    CALLED(cudaErrorMemoryAllocation);
    return allocate(memory, bytes, true);
}

/* Freed all the same where the call fails: who lost a device has nothing left there. */
cudaError_t cudaFree(void *memory)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    const cudaError_t failed = called(__func__, cudaErrorInvalidValue), released = release(memory, false);
    return failed != cudaSuccess ? failed : released;
}

cudaError_t cudaFreeHost(void *memory)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    const cudaError_t failed = called(__func__, cudaErrorInvalidValue), released = release(memory, true);
    return failed != cudaSuccess ? failed : released;
}

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total)
{
    CALLED(cudaErrorUnknown);
    *free_bytes = *total = (size_t)1 << 33;
    return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t bytes, bool blocking)
{
    runtime &all = state();
    if (bytes == 0)
        return cudaSuccess;
    if (!reaches(to, bytes) || !reaches(from, bytes)) {
        fprintf(stderr, "emulation: a copy of %zu bytes from %p to %p goes beyond its allocation\n", bytes, from, to);
        return remember(cudaErrorInvalidValue);
    }
    /* What is not page-locked is read before the call returns, and written so too. */
    auto source = find(from);
    if (!blocking && all.defer && source == all.allocations.end()) {
        auto staged = std::make_shared<std::vector<unsigned char>>(static_cast<const unsigned char *>(from),
                                                                   static_cast<const unsigned char *>(from) + bytes);
        submit([=] { memcpy(to, staged->data(), bytes); });
    }
    else {
        submit([=] { memmove(to, from, bytes); });
    }
    return blocking || find(to) == all.allocations.end() ? wait() : all.sticky;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind)
{
    CALLED(cudaErrorInvalidValue);
    return copy(to, from, bytes, true);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    CALLED(cudaErrorInvalidValue);
    return copy(to, from, bytes, false);
}

static cudaError_t fill(void *to, int value, size_t bytes)
{
    if (!reaches(to, bytes)) {
        fprintf(stderr, "emulation: %zu bytes to fill at %p go beyond their allocation\n", bytes, to);
        return remember(cudaErrorInvalidValue);
    }
    submit([=] { memset(to, value, bytes); });
    return state().sticky;
}

cudaError_t cudaMemset(void *to, int value, size_t bytes)
{
    CALLED(cudaErrorInvalidValue);
    return fill(to, value, bytes);
}

cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t)
{
    CALLED(cudaErrorInvalidValue);
    return fill(to, value, bytes);
}

/* ---- streams, events ----------------------------------------------------------------------------------------------
 */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    CALLED(cudaErrorMemoryAllocation);
    auto made = std::make_unique<CUstream_st>();
    *stream = made.get();
    state().streams[*stream] = std::move(made);
    return cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t *stream)
{
    return cudaStreamCreateWithFlags(stream, cudaStreamDefault);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    const cudaError_t failed = called(__func__, cudaErrorInvalidResourceHandle);
    return state().streams.erase(stream) == 1 ? failed : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    CALLED(cudaErrorIllegalAddress);
    return wait();
}

/* Asking moves the device on: who asks until it is done is told in the end. */
static cudaError_t query(const bool *done)
{
    runtime &all = state();
    if (all.queue.empty() || (done != nullptr && *done))
        return all.sticky;
    do_one();
    return all.sticky != cudaSuccess ? all.sticky : cudaErrorNotReady;
}

cudaError_t cudaStreamQuery(cudaStream_t)
{
    CALLED(cudaErrorIllegalAddress);
    return query(nullptr);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned)
{
    CALLED(cudaErrorInvalidResourceHandle);
    return state().events.count(event) == 1 ? cudaSuccess : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *status)
{
    CALLED(cudaErrorInvalidResourceHandle);
    *status = !state().capturing    ? cudaStreamCaptureStatusNone
              : state().invalidated ? cudaStreamCaptureStatusInvalidated
                                    : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t, void (*fn)(void *), void *data)
{
    CALLED(cudaErrorUnknown);
    submit([=] { fn(data); });
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags)
{
    CALLED(cudaErrorMemoryAllocation);
    auto made = std::make_shared<CUevent_st>();
    made->timed = !(flags & cudaEventDisableTiming);
    made->num_calls = 0;
    made->recorded = true; /* one that was never called for is done */
    *event = made.get();
    state().events[*event] = std::move(made);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *event)
{
    return cudaEventCreateWithFlags(event, cudaEventDefault);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t)
{
    CALLED(cudaErrorInvalidResourceHandle);
    auto found = state().events.find(event);
    if (found == state().events.end())
        return remember(cudaErrorInvalidResourceHandle);
    auto own = found->second;
    own->recorded = false;
    submit([own, call = ++own->num_calls] {
        own->recorded = call == own->num_calls; /* or it was called for again, and stands for what is before that */
        own->time = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    CALLED(cudaErrorIllegalAddress);
    auto found = state().events.find(event);
    return found != state().events.end() ? query(&found->second->recorded) : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    CALLED(cudaErrorIllegalAddress);
    return state().events.count(event) == 1 ? wait() : remember(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end)
{
    CALLED(cudaErrorInvalidResourceHandle);
    auto first = state().events.find(begin), last = state().events.find(end), none = state().events.end();
    if (first == none || last == none || !first->second->timed || !last->second->timed ||
        first->second->num_calls == 0 || last->second->num_calls == 0)
        return remember(cudaErrorInvalidResourceHandle);
    if (!first->second->recorded || !last->second->recorded)
        return cudaErrorNotReady;
    *milliseconds = std::chrono::duration<float, std::milli>(last->second->time - first->second->time).count();
    return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    const cudaError_t failed = called(__func__, cudaErrorInvalidResourceHandle);
    return state().events.erase(event) == 1 ? failed : remember(cudaErrorInvalidResourceHandle);
}

/* ---- device -------------------------------------------------------------------------------------------------------
 */

cudaError_t cudaGetDeviceCount(int *count)
{
    *count = 0;
    CALLED(cudaErrorNoDevice);
    *count = state().num_devices;
    return cudaSuccess;
}

cudaError_t cudaGetDevice(int *device)
{
    CALLED(cudaErrorInitializationError);
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device)
{
    CALLED(cudaErrorInvalidDevice);
    if (device < 0 || device >= state().num_devices)
        return remember(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

/* Few processors, so that what is divided among them is more than one block's work each. */
static cudaDeviceProp emulated(void)
{
    const size_t shared = state().max_shared;
    return {"emulated on the host",
            (size_t)1 << 33,
            DEFAULT_SHARED,
            shared,
            shared + 1024,
            32,
            MAX_THREADS,
            9,
            0,
            4,
            50 << 20};
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device)
{
    CALLED(cudaErrorInvalidDevice);
    *properties = emulated();
    return device >= 0 && device < state().num_devices ? cudaSuccess : remember(cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device)
{
    CALLED(cudaErrorInvalidDevice);
    if (device < 0 || device >= state().num_devices)
        return remember(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
        *value = emulated().maxThreadsPerBlock;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
        *value = (int)emulated().sharedMemPerBlock;
        break;
    case cudaDevAttrWarpSize:
        *value = emulated().warpSize;
        break;
    case cudaDevAttrMultiProcessorCount:
        *value = emulated().multiProcessorCount;
        break;
    case cudaDevAttrL2CacheSize:
        *value = emulated().l2CacheSize;
        break;
    case cudaDevAttrComputeCapabilityMajor:
        *value = emulated().major;
        break;
    case cudaDevAttrComputeCapabilityMinor:
        *value = emulated().minor;
        break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
        *value = (int)emulated().sharedMemPerMultiprocessor;
        break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
        *value = (int)emulated().sharedMemPerBlockOptin;
        break;
    default:
        return remember(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    CALLED(cudaErrorIllegalAddress);
    return wait();
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    CALLED(cudaErrorInvalidValue);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
        return cudaSuccess;
    if (value < 0 || (size_t)value > state().max_shared)
        return remember(cudaErrorInvalidValue);
    state().shared_limits[kernel] = (size_t)value;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version)
{
    CALLED(cudaErrorInvalidValue);
    *version = 13000;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version)
{
    CALLED(cudaErrorInvalidValue);
    *version = CUDART_VERSION;
    return cudaSuccess;
}

/* ---- errors -------------------------------------------------------------------------------------------------------
 */

cudaError_t cudaPeekAtLastError(void)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    return state().sticky != cudaSuccess ? state().sticky : state().last;
}

cudaError_t cudaGetLastError(void)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    const cudaError_t last = cudaPeekAtLastError();
    state().last = cudaSuccess;
    return last;
}

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInitializationError, "cudaErrorInitializationError", "initialization error"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice",
     "no kernel image is available for execution on the device"},
    {cudaErrorECCUncorrectable, "cudaErrorECCUncorrectable", "uncorrectable ECC error encountered"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchOutOfResources, "cudaErrorLaunchOutOfResources", "too many resources requested for launch"},
    {cudaErrorLaunchTimeout, "cudaErrorLaunchTimeout", "the launch timed out and was terminated"},
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorHardwareStackError, "cudaErrorHardwareStackError", "hardware stack error"},
    {cudaErrorIllegalInstruction, "cudaErrorIllegalInstruction", "an illegal instruction was encountered"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorInvalidAddressSpace, "cudaErrorInvalidAddressSpace",
     "operation not supported on global/shared address space"},
    {cudaErrorInvalidPc, "cudaErrorInvalidPc", "invalid program counter"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorStreamCaptureImplicit, "cudaErrorStreamCaptureImplicit",
     "operation would make the legacy stream depend on a capturing blocking stream"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const char *cudaGetErrorString(cudaError_t error)
{
    runtime &all = state();
    if (error != cudaSuccess && error == all.sticky && all.message[0] != '\0')
        return all.message;
    for (const auto &known : errors)
        if (known.error == error)
            return known.text;
    return "unrecognized error code";
}

const char *cudaGetErrorName(cudaError_t error)
{
    for (const auto &known : errors)
        if (known.error == error)
            return known.name;
    return "unrecognized error code";
}

/* ---- for tests ----------------------------------------------------------------------------------------------------
 */

void btx_emulation_fail(const char *faults)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    for (auto &[name, own] : state().functions)
        own.faults.clear();
    state().add_faults(faults);
}

void btx_emulation_reset(void)
{
    runtime &all = state();
    std::lock_guard<std::recursive_mutex> lock(all.mutex);
    all.queue.clear();
    all.graph.clear();
    all.capturing = all.invalidated = false;
    all.sticky = all.last = cudaSuccess;
    all.message[0] = '\0';
    for (auto &[name, own] : all.functions)
        own.faults.clear();
}

void btx_emulation_devices(int count, int current)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    state().num_devices = count;
    state().launches_by_device.clear();
    current_device = current;
}

int btx_emulation_current_device(void)
{
    return current_device;
}

int64_t btx_emulation_launches_on(int device)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    return state().launches_by_device[device];
}

int64_t btx_emulation_launches(void)
{
    return state().launches;
}

int64_t btx_emulation_live(void)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    return (int64_t)(state().allocations.size() + state().events.size() + state().streams.size());
}

int64_t btx_emulation_calls(const char *function)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    auto found = state().functions.find(function);
    return found != state().functions.end() ? found->second.count : 0;
}

void btx_emulation_seed(uint64_t seed)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    state().seed = seed;
    state().launches_of_seed = 0;
}

int btx_emulation_sm90a(void)
{
    const char *wanted = getenv("BTX_EMULATE_SM90A");
    return wanted != nullptr && atoi(wanted) != 0;
}

void btx_emulation_defer(int defer)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    wait();
    state().defer = defer != 0;
}

int btx_emulation_advance(int pieces)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    int left = pieces;
    for (; left > 0 && !state().queue.empty(); left--)
        do_one();
    return pieces - left;
}

int btx_emulation_capture(int capture)
{
    runtime &all = state();
    std::lock_guard<std::recursive_mutex> lock(all.mutex);
    const bool is_valid = !all.invalidated;
    if (capture != 0)
        all.graph.clear();
    all.capturing = capture != 0;
    all.invalidated = false;
    return is_valid;
}

void btx_emulation_replay(void)
{
    std::lock_guard<std::recursive_mutex> lock(state().mutex);
    for (const std::function<void()> &one : state().graph)
        submit(one);
}
