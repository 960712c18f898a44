/* device.cpp - blocks on the host: see emulation.h for what is promised.
 *
 * Every thread of a block is a fiber: a stack of its own, entered and left by exchanging the stack pointer. A thread
 * that has to wait picks the next one itself, at random, and goes there; the host's own stack is only returned to when
 * the block is over. */
#include <link.h>
#include <pthread.h>
#include <stdarg.h>
#include <sys/mman.h>

#include <vector>

#include "internal.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) || defined(BTX_EMULATION_UCONTEXT)
#define BTX_UCONTEXT 1
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace btx_emulation {
/* ---- contexts -----------------------------------------------------------------------------------------------------
 */

#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK_BYTES = 256 << 10;
#else
constexpr size_t STACK_BYTES = 64 << 10;
#endif
constexpr size_t GUARD_BYTES = 4 << 10; /* of a stack: unmapped */

struct context {
#ifdef BTX_UCONTEXT
    ucontext_t registers;
#else
    void *stack_pointer;
#endif
    unsigned char *stack; /* [STACK_BYTES]; of the host its own */
    size_t stack_bytes;
    void *fake_stack; /* AddressSanitizer's */
};

#ifndef BTX_UCONTEXT
extern "C" __attribute__((visibility("hidden"))) void btx_emulation_switch(void **from, void *to);
/* Saves what a called function must keep, on the stack. */
asm(R"(
.text
.hidden btx_emulation_switch
.globl btx_emulation_switch
.type btx_emulation_switch, @function
btx_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size btx_emulation_switch, . - btx_emulation_switch
)");
#endif

static void prepare(context *fiber, void (*entry)(void))
{
#ifdef __SANITIZE_ADDRESS__
    /* The stack's last user never returned from its functions. */
    __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
    fiber->fake_stack = nullptr;
#endif
#ifdef BTX_UCONTEXT
    getcontext(&fiber->registers);
    fiber->registers.uc_stack.ss_sp = fiber->stack;
    fiber->registers.uc_stack.ss_size = fiber->stack_bytes;
    fiber->registers.uc_link = nullptr;
    makecontext(&fiber->registers, entry, 0);
#else
    /* Six registers, the address to return to, and a zero where entry's own return address would be: its stack pointer
     * is then 8 beyond a multiple of 16, as after a call. */
    void **top = reinterpret_cast<void **>(fiber->stack + fiber->stack_bytes) - 8;
    memset(top, 0, 8 * sizeof *top);
    top[6] = reinterpret_cast<void *>(entry);
    fiber->stack_pointer = top;
#endif
}

static void enter(context *from, context *to, bool forever)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(forever ? nullptr : &from->fake_stack, to->stack, to->stack_bytes);
#else
    (void)forever;
#endif
#ifdef BTX_UCONTEXT
    swapcontext(&from->registers, &to->registers);
#else
    btx_emulation_switch(&from->stack_pointer, to->stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

/* ---- the running block --------------------------------------------------------------------------------------------
 */

enum class state { ready, at_barrier, in_collective, returned };

struct pending_copy {
    void *to;
    const void *from; /* NULL: zeros */
    unsigned group;
};

/* A lane's part of a product of its warpgroup. */
struct pending_wgmma {
    operation what;
    float *sum;
    unsigned a[4];
    uint64_t b;
    int accumulate;
    unsigned group;
};

struct fiber {
    context registers;
    uint3 index;
    int warp, lane;
    state is;
    site at;      /* where it waits */
    operation in; /* which collective */
    unsigned mask;
    void *operands; /* of the collective */
    int barrier_result;
    std::vector<pending_copy> copies;    /* oldest first */
    unsigned groups;                     /* committed */
    std::vector<pending_wgmma> products; /* oldest first; of all lanes of a warp as many */
    unsigned product_groups;
};

/* Lanes that wait for each other. */
struct group {
    operation what;
    unsigned mask, arrived;
};

struct warp_state {
    unsigned live, ready; /* lanes */
    int num_groups;
    group groups[BTX_WARP];
};

enum class policy { any_warp, one_warp_ahead, lanes_in_order };

static fiber *fibers; /* [MAX_THREADS] */
static context host;
static warp_state warps[MAX_WARPS];
static int num_threads, num_live, num_at_barrier;
static barrier barrier_kind;
static site barrier_site;
static int barrier_any, barrier_all, barrier_count;
static const work *running;
static fiber *current;
static cudaError_t failure;
static char *failure_message;
static size_t failure_message_size;

/* Warps with a ready lane, in the order in which one_warp_ahead prefers them. */
static policy how;
static int warp_order[MAX_WARPS], num_warps;
static unsigned ready_warps;
static uint64_t random_state;

int current_thread = -1;
region dynamic_memory, static_memory, stacks;

static unsigned random_bits(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (unsigned)(random_state * 0x2545f4914f6cdd1dull >> 32);
}

static unsigned random_below(unsigned limit)
{
    return (unsigned)((uint64_t)random_bits() * limit >> 32);
}

/* One of the bits set. */
static int random_bit(unsigned set)
{
    const unsigned turn = random_bits() & 31u;
    return (__builtin_ctz(set >> turn | set << ((32u - turn) & 31u)) + (int)turn) & 31;
}

static void draw_policy(void)
{
    how = (policy)random_below(3);
    for (int i = num_warps - 1; i > 0; i--) {
        const int j = (int)random_below((unsigned)i + 1), kept = warp_order[i];
        warp_order[i] = warp_order[j];
        warp_order[j] = kept;
    }
}

static void set_ready(fiber *thread)
{
    thread->is = state::ready;
    warps[thread->warp].ready |= 1u << thread->lane;
    ready_warps |= 1u << thread->warp;
}

static void set_waiting(fiber *thread, state is)
{
    thread->is = is;
    warps[thread->warp].ready &= ~(1u << thread->lane);
    if (warps[thread->warp].ready == 0)
        ready_warps &= ~(1u << thread->warp);
}

static fiber *pick(void)
{
    int warp = 0;
    if (ready_warps == 0)
        return nullptr;
    if (how == policy::any_warp) {
        warp = random_bit(ready_warps);
    }
    else {
        for (int i = 0; i < num_warps; i++) {
            warp = warp_order[i];
            if (ready_warps >> warp & 1u)
                break;
        }
    }
    const unsigned ready = warps[warp].ready;
    return &fibers[warp * BTX_WARP + (how == policy::lanes_in_order ? __builtin_ctz(ready) : random_bit(ready))];
}

static void start(fiber *thread)
{
    current = thread;
    current_thread = (int)(thread - fibers);
    threadIdx = thread->index;
}

static void back_to_host(bool forever)
{
    fiber *self = current;
    current = nullptr;
    current_thread = -1;
    enter(&self->registers, &host, forever);
}

static void set_failure(cudaError_t error, const char *format, va_list arguments)
{
    failure = error;
    int used = snprintf(failure_message, failure_message_size, "kernel %s, block (%u, %u, %u)", running->name,
                        blockIdx.x, blockIdx.y, blockIdx.z);
    if (current != nullptr && used < (int)failure_message_size)
        used += snprintf(failure_message + used, failure_message_size - (size_t)used, ", thread (%u, %u, %u)",
                         threadIdx.x, threadIdx.y, threadIdx.z);
    if (used < (int)failure_message_size)
        used += snprintf(failure_message + used, failure_message_size - (size_t)used, ": ");
    if (used < (int)failure_message_size)
        vsnprintf(failure_message + used, failure_message_size - (size_t)used, format, arguments);
}

/* Ends the block; the other threads stay where they are. */
[[noreturn]] static void give_up(void)
{
    back_to_host(true);
    abort(); /* nobody comes back here */
}

[[noreturn]] __attribute__((format(printf, 2, 3))) static void trap_as(cudaError_t error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_failure(error, format, arguments);
    va_end(arguments);
    give_up();
}

[[noreturn]] void trap(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_failure(cudaErrorIllegalAddress, format, arguments);
    va_end(arguments);
    give_up();
}

static const char *operation_name(operation what)
{
    static const char *const names[] = {"__syncwarp",
                                        "__shfl_sync",
                                        "__shfl_xor_sync",
                                        "__shfl_up_sync",
                                        "__shfl_down_sync",
                                        "__ballot_sync",
                                        "__match_any_sync",
                                        "__reduce_add_sync",
                                        "__reduce_min_sync",
                                        "__reduce_max_sync",
                                        "__reduce_min_sync",
                                        "__reduce_max_sync",
                                        "__reduce_and_sync (__all_sync)",
                                        "__reduce_or_sync (__any_sync)",
                                        "__reduce_xor_sync",
                                        "load_matrix_x4",
                                        "multiply_16x8x16",
                                        "multiply_16x8x16",
                                        "wgmma_m64n64k16_registers",
                                        "wgmma_m64n64k16_registers",
                                        "wgmma_wait"};
    return names[(int)what];
}

static const char *file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

/* Nobody can go on: who waits where. */
static void report_deadlock(void)
{
    char waiting[1024] = "";
    size_t used = 0;
    for (int t = 0; t < num_threads; t++) {
        const fiber &thread = fibers[t];
        bool told = thread.is == state::returned;
        int like = 0;
        for (int u = 0; u < num_threads; u++) {
            const fiber &other = fibers[u];
            const bool same = other.is == thread.is && other.at.line == thread.at.line &&
                              strcmp(other.at.file, thread.at.file) == 0 &&
                              (other.is == state::at_barrier || (other.in == thread.in && other.mask == thread.mask));
            told = told || (same && u < t);
            like += same;
        }
        if (told || used + 200 > sizeof waiting)
            continue;
        if (thread.is == state::at_barrier)
            used += (size_t)snprintf(waiting + used, sizeof waiting - used,
                                     "; %d from thread %d on at __syncthreads, %s:%d", like, t,
                                     file_name(thread.at.file), thread.at.line);
        else
            used += (size_t)snprintf(waiting + used, sizeof waiting - used,
                                     "; %d from thread %d on in %s with mask %08x, %s:%d", like, t,
                                     operation_name(thread.in), thread.mask, file_name(thread.at.file), thread.at.line);
    }
    current = nullptr;
    failure = cudaErrorLaunchFailure;
    snprintf(failure_message, failure_message_size,
             "kernel %s, block (%u, %u, %u): deadlock, %d of %d threads wait for each other%s", running->name,
             blockIdx.x, blockIdx.y, blockIdx.z, num_live, num_threads, waiting);
}

/* Lets others run until this thread is ready again and its turn comes. */
static void reschedule(void)
{
    fiber *self = current, *next = pick();
    if (next == self)
        return;
    if (next == nullptr) {
        fiber *last = current;
        report_deadlock();
        current = last;
        give_up();
    }
    start(next);
    enter(&self->registers, &next->registers, false);
}

/* ---- barriers -----------------------------------------------------------------------------------------------------
 */

static void finish_barrier(void)
{
    const int result = barrier_kind == barrier::any     ? barrier_any
                       : barrier_kind == barrier::all   ? barrier_all
                       : barrier_kind == barrier::count ? barrier_count
                                                        : 0;
    for (int t = 0; t < num_threads; t++) {
        if (fibers[t].is == state::at_barrier) {
            fibers[t].barrier_result = result;
            set_ready(&fibers[t]);
        }
    }
    num_at_barrier = 0;
    races_barrier();
    if (random_below(4) == 0)
        draw_policy();
}

int block_barrier(barrier kind, int predicate, site at)
{
    fiber *self = current;
    if (num_at_barrier == 0) {
        barrier_kind = kind;
        barrier_site = at;
        barrier_any = barrier_count = 0;
        barrier_all = 1;
    }
    else if (kind != barrier_kind || at.line != barrier_site.line || strcmp(at.file, barrier_site.file) != 0) {
        trap_as(cudaErrorLaunchFailure, "__syncthreads at %s:%d meets another one at %s:%d", file_name(at.file),
                at.line, file_name(barrier_site.file), barrier_site.line);
    }
    barrier_any |= predicate != 0;
    barrier_all &= predicate != 0;
    barrier_count += predicate != 0;
    self->at = at;
    num_at_barrier++;
    set_waiting(self, state::at_barrier);
    if (num_at_barrier == num_live)
        finish_barrier();
    reschedule();
    return self->barrier_result;
}

/* ---- collectives --------------------------------------------------------------------------------------------------
 */

static void do_multiply(const group &all, fiber *lanes)
{
    float a[16][16], b[8][16];
    for (int l = 0; l < BTX_WARP; l++) {
        const multiply_operands &own = *static_cast<multiply_operands *>(lanes[l].operands);
        for (int i = 0; i < 6; i++) {
            const unsigned pair = i < 4 ? own.a[i] : own.b[i - 4];
            for (int j = 0; j < 2; j++) {
                const uint16_t bits = (uint16_t)(pair >> 16 * j);
                const float x = all.what == operation::multiply_bf16 ? __bfloat162float(__nv_bfloat16{bits})
                                                                     : __half2float(__half{bits});
                if (i < 4)
                    a[l / 4 + i % 2 * 8][2 * (l % 4) + j + i / 2 * 8] = x;
                else
                    b[l / 4][2 * (l % 4) + j + (i - 4) * 8] = x;
            }
        }
    }
    for (int l = 0; l < BTX_WARP; l++) {
        float *c = static_cast<multiply_operands *>(lanes[l].operands)->c;
        for (int i = 0; i < 4; i++) {
            const float *row = a[l / 4 + i / 2 * 8], *column = b[2 * (l % 4) + i % 2];
            float sum = c[i];
            for (int k = 0; k < 16; k++)
                sum += row[k] * column[k];
            c[i] = sum;
        }
    }
}

static bool is_shared(const void *at, size_t bytes)
{
#ifdef __SANITIZE_ADDRESS__ /* static shared memory may be anywhere */
    (void)at, (void)bytes;
    return true;
#else
    return dynamic_memory.holds(at, bytes) || static_memory.holds(at, bytes);
#endif
}

static void do_load_matrix(fiber *lanes)
{
    for (int l = 0; l < BTX_WARP; l++) {
        const void *row = static_cast<matrix_operands *>(lanes[l].operands)->row;
        if ((uintptr_t)row % 16 != 0)
            trap_as(cudaErrorMisalignedAddress, "load_matrix_x4 at %s:%d: lane %d's row %p is not 16-byte aligned",
                    file_name(lanes[l].at.file), lanes[l].at.line, l, row);
        if (!is_shared(row, 16))
            trap("load_matrix_x4 at %s:%d: lane %d's row %p is not in shared memory", file_name(lanes[l].at.file),
                 lanes[l].at.line, l, row);
        const int before = current_thread;
        current_thread = (int)(&lanes[l] - fibers);
        races_access(row, 16, false, false, nullptr);
        current_thread = before;
    }
    for (int l = 0; l < BTX_WARP; l++) {
        unsigned *fragment = static_cast<matrix_operands *>(lanes[l].operands)->fragment;
        for (int m = 0; m < 4; m++) {
            const void *row = static_cast<matrix_operands *>(lanes[8 * m + l / 4].operands)->row;
            memcpy(&fragment[m], static_cast<const unsigned char *>(row) + 4 * (l % 4), 4);
        }
    }
}

/* Element chunk (of 8) of a row of the right side, where a wgmma descriptor says it is: rows of 128 bytes, swizzled by
 * the address alone. */
static const unsigned char *find_right(const fiber &lane, uint64_t descriptor, int row, int chunk)
{
    const unsigned start = (unsigned)(descriptor & 0x3fffu) << 4, groups = (unsigned)(descriptor >> 32 & 0x3fffu) << 4;
    const unsigned plain = start + (unsigned)(row / 8) * groups + (unsigned)(row % 8) * 128 + (unsigned)chunk * 16;
    const unsigned char *at = dynamic_memory.begin + (plain ^ (plain >> 7 & 7u) << 4);
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7u) != 0)
        trap("wgmma at %s:%d: its descriptor %016llx is not one of a tile swizzled by 128 bytes",
             file_name(lane.at.file), lane.at.line, (unsigned long long)descriptor);
    if (!dynamic_memory.holds(at, 16))
        trap("wgmma at %s:%d: row %d of its descriptor %016llx is not in shared memory", file_name(lane.at.file),
             lane.at.line, row, (unsigned long long)descriptor);
    return at;
}

/* The right side may be read at any time from the start to the wait. Lanes share its rows. */
static void wgmma_reads(fiber *lanes, uint64_t descriptor)
{
    const int before = current_thread;
    for (int row = 0; row < 64; row++) {
        current_thread = (int)(&lanes[row / 2] - fibers);
        for (int chunk = 0; chunk < 2; chunk++)
            races_access(find_right(lanes[row / 2], descriptor, row, chunk), 16, false, false, nullptr);
    }
    current_thread = before;
}

static void start_wgmma(const group &all, fiber *lanes)
{
    const uint64_t descriptor = static_cast<wgmma_operands *>(lanes[0].operands)->b;
    for (int l = 0; l < BTX_WARP; l++) {
        const wgmma_operands &own = *static_cast<wgmma_operands *>(lanes[l].operands);
        if (own.b != descriptor)
            trap_as(cudaErrorLaunchFailure, "wgmma at %s:%d: lanes 0 and %d have different descriptors",
                    file_name(lanes[l].at.file), lanes[l].at.line, l);
        lanes[l].products.push_back(pending_wgmma{all.what,
                                                  own.sum,
                                                  {own.a[0], own.a[1], own.a[2], own.a[3]},
                                                  own.b,
                                                  own.accumulate,
                                                  lanes[l].product_groups});
        for (int i = 0; i < 32 && !own.accumulate; i++)
            own.sum[i] = NAN; /* until the wait */
    }
    wgmma_reads(lanes, descriptor);
}

static void do_wgmma(fiber *lanes, size_t index)
{
    const operation what = lanes[0].products[index].what;
    const uint64_t descriptor = lanes[0].products[index].b;
    const auto value = [&](unsigned pair, int half) {
        const uint16_t bits = (uint16_t)(pair >> 16 * half);
        return what == operation::wgmma_bf16 ? __bfloat162float(__nv_bfloat16{bits}) : __half2float(__half{bits});
    };
    float a[16][16], b[64][16];
    for (int l = 0; l < BTX_WARP; l++)
        for (int i = 0; i < 8; i++)
            a[l / 4 + i / 2 % 2 * 8][2 * (l % 4) + i % 2 + i / 4 * 8] = value(lanes[l].products[index].a[i / 2], i % 2);
    wgmma_reads(lanes, descriptor);
    for (int row = 0; row < 64; row++) {
        for (int column = 0; column < 16; column++) {
            uint16_t bits;
            memcpy(&bits, find_right(lanes[row / 2], descriptor, row, column / 8) + column % 8 * 2, sizeof bits);
            b[row][column] = value(bits, 0);
        }
    }
    for (int l = 0; l < BTX_WARP; l++) {
        const pending_wgmma &own = lanes[l].products[index];
        for (int i = 0; i < 32; i++) {
            const float *row = a[l / 4 + i / 2 % 2 * 8], *column = b[i / 4 * 8 + 2 * (l % 4) + i % 2];
            float sum = own.accumulate ? own.sum[i] : 0.0f;
            for (int k = 0; k < 16; k++)
                sum += row[k] * column[k];
            own.sum[i] = sum;
        }
    }
}

/* All lanes' products of groups that may not be under way any more. */
static void wait_wgmma(fiber *lanes)
{
    const unsigned pending = *static_cast<unsigned *>(lanes[0].operands);
    size_t done = 0;
    for (int l = 1; l < BTX_WARP; l++)
        if (lanes[l].products.size() != lanes[0].products.size() || lanes[l].product_groups != lanes[0].product_groups)
            trap_as(cudaErrorLaunchFailure, "wgmma_wait at %s:%d: lanes 0 and %d have different products under way",
                    file_name(lanes[l].at.file), lanes[l].at.line, l);
    while (done < lanes[0].products.size() && lanes[0].products[done].group + pending < lanes[0].product_groups)
        do_wgmma(lanes, done++);
    for (int l = 0; l < BTX_WARP; l++)
        lanes[l].products.erase(lanes[l].products.begin(), lanes[l].products.begin() + (ptrdiff_t)done);
}

static unsigned combine(operation what, unsigned x, unsigned y)
{
    switch (what) {
    case operation::reduce_add:
        return x + y;
    case operation::reduce_min:
        return y < x ? y : x;
    case operation::reduce_max:
        return y > x ? y : x;
    case operation::reduce_min_signed:
        return (int)y < (int)x ? y : x;
    case operation::reduce_max_signed:
        return (int)y > (int)x ? y : x;
    case operation::reduce_and:
        return x & y;
    case operation::reduce_or:
        return x | y;
    default:
        return x ^ y;
    }
}

static void do_collective(int warp, const group &all)
{
    fiber *lanes = &fibers[warp * BTX_WARP];
    auto vote_of = [&](int l) { return static_cast<vote_operands *>(lanes[l].operands); };
    unsigned result = 0;
    bool first = true;
    if (all.what >= operation::load_matrix && all.arrived != BTX_ALL_LANES)
        trap_as(cudaErrorLaunchFailure, "%s without all 32 lanes: %08x came", operation_name(all.what), all.arrived);
    switch (all.what) {
    case operation::syncwarp:
        races_warp(warp, all.arrived);
        break;
    case operation::shuffle_idx:
    case operation::shuffle_xor:
    case operation::shuffle_up:
    case operation::shuffle_down:
        for (unsigned left = all.arrived; left != 0; left &= left - 1) {
            shuffle_operands *own = static_cast<shuffle_operands *>(lanes[__builtin_ctz(left)].operands);
            own->result = all.arrived >> own->source & 1u
                              ? static_cast<shuffle_operands *>(lanes[own->source].operands)->value
                              : ~(uint64_t)0; /* undefined: the lane takes no part */
        }
        break;
    case operation::match_any:
        for (unsigned left = all.arrived; left != 0; left &= left - 1) {
            vote_operands *own = vote_of(__builtin_ctz(left));
            own->result = 0;
            for (unsigned others = all.arrived; others != 0; others &= others - 1)
                own->result |= (unsigned)(vote_of(__builtin_ctz(others))->value == own->value) << __builtin_ctz(others);
        }
        break;
    case operation::load_matrix:
        do_load_matrix(lanes);
        break;
    case operation::multiply_bf16:
    case operation::multiply_f16:
        do_multiply(all, lanes);
        break;
    case operation::wgmma_bf16:
    case operation::wgmma_f16:
        start_wgmma(all, lanes);
        break;
    case operation::wgmma_wait:
        wait_wgmma(lanes);
        break;
    default:
        for (unsigned left = all.arrived; left != 0; left &= left - 1) {
            const int l = __builtin_ctz(left);
            const unsigned value = all.what == operation::ballot ? vote_of(l)->value << l : vote_of(l)->value;
            result =
                first ? value : combine(all.what == operation::ballot ? operation::reduce_or : all.what, result, value);
            first = false;
        }
        for (unsigned left = all.arrived; left != 0; left &= left - 1)
            vote_of(__builtin_ctz(left))->result = result;
    }
}

/* Does the work of a group of which everybody who still runs has come. */
static void finish_group(int warp, int index)
{
    warp_state &own = warps[warp];
    const group all = own.groups[index];
    own.groups[index] = own.groups[--own.num_groups];
    do_collective(warp, all);
    for (unsigned left = all.arrived; left != 0; left &= left - 1)
        set_ready(&fibers[warp * BTX_WARP + __builtin_ctz(left)]);
}

void collective(operation what, unsigned mask, void *operands, site at)
{
    fiber *self = current;
    warp_state &own = warps[self->warp];
    int index = 0;
    if (!(mask >> self->lane & 1u))
        trap_as(cudaErrorLaunchFailure, "%s at %s:%d: lane %d is not in its own mask %08x", operation_name(what),
                file_name(at.file), at.line, self->lane, mask);
    while (index < own.num_groups && (own.groups[index].what != what || own.groups[index].mask != mask))
        index++;
    if (index == own.num_groups)
        own.groups[own.num_groups++] = group{what, mask, 0};
    own.groups[index].arrived |= 1u << self->lane;
    self->at = at;
    self->in = what;
    self->mask = mask;
    self->operands = operands;
    set_waiting(self, state::in_collective);
    if ((own.groups[index].mask & own.live) == own.groups[index].arrived)
        finish_group(self->warp, index);
    reschedule();
}

/* ---- asynchronous copies ------------------------------------------------------------------------------------------
 */

void copy_issue(void *shared, const void *global, bool wanted, site at)
{
    if ((uintptr_t)shared % 16 != 0 || (uintptr_t)global % 16 != 0)
        trap_as(cudaErrorMisalignedAddress, "copy_async_16 at %s:%d: %p from %p is not 16-byte aligned",
                file_name(at.file), at.line, shared, global);
    if (!is_shared(shared, 16))
        trap("copy_async_16 at %s:%d: %p is not in shared memory", file_name(at.file), at.line, shared);
    if (dynamic_memory.holds(global, 16) || static_memory.holds(global, 16))
        trap("copy_async_16 at %s:%d: %p is not in global memory", file_name(at.file), at.line, global);
    races_access(shared, 16, true, false, __builtin_return_address(0));
    memset(shared, 0xff, 16); /* it may come at any time from now on */
    current->copies.push_back(pending_copy{shared, wanted ? global : nullptr, current->groups});
}

void copy_commit(void)
{
    current->groups++;
}

void copy_wait(unsigned pending)
{
    fiber *self = current;
    size_t done = 0;
    while (done < self->copies.size() && self->copies[done].group + pending < self->groups) {
        const pending_copy &copy = self->copies[done++];
        races_access(copy.to, 16, true, false, __builtin_return_address(0));
        if (copy.from == nullptr) {
            memset(copy.to, 0, 16);
            continue;
        }
        races_access(copy.from, 16, false, false, __builtin_return_address(0));
        memcpy(copy.to, copy.from, 16);
    }
    self->copies.erase(self->copies.begin(), self->copies.begin() + (ptrdiff_t)done);
}

void wgmma_commit(void)
{
    current->product_groups++;
}

unsigned char *dynamic_shared(void)
{
    return dynamic_memory.begin;
}

void atomic_access(const void *at, size_t bytes)
{
    races_access(at, bytes, true, true, __builtin_return_address(0));
}

unsigned lane(void)
{
    return (unsigned)current->lane;
}

/* ---- running ------------------------------------------------------------------------------------------------------
 */

static void run_thread(void)
{
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    fiber *self = current;
    running->call(running->arguments);
    set_waiting(self, state::returned);
    warp_state &own = warps[self->warp];
    own.live &= ~(1u << self->lane);
    num_live--;
    /* Who has returned holds nobody up. */
    for (int i = own.num_groups - 1; i >= 0; i--)
        if ((own.groups[i].mask & own.live) == own.groups[i].arrived)
            finish_group(self->warp, i);
    if (num_live > 0 && num_at_barrier == num_live)
        finish_barrier();
    fiber *next = pick();
    if (next == nullptr) {
        if (num_live > 0) {
            report_deadlock();
            current = self;
        }
        give_up();
    }
    start(next);
    enter(&self->registers, &next->registers, true);
    abort();
}

static void make_fibers(void)
{
    if (fibers != nullptr)
        return;
    const size_t each = STACK_BYTES + GUARD_BYTES;
    void *made =
        mmap(nullptr, each * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) {
        fprintf(stderr, "emulation: no memory for the stacks of threads\n");
        abort();
    }
    stacks.begin = static_cast<unsigned char *>(made);
    stacks.end = stacks.begin + each * MAX_THREADS;
    fibers = new fiber[MAX_THREADS]();
    for (int t = 0; t < MAX_THREADS; t++) {
        unsigned char *guard = stacks.begin + (size_t)t * each;
        mprotect(guard, GUARD_BYTES, PROT_NONE);
        fibers[t].registers.stack = guard + GUARD_BYTES;
        fibers[t].registers.stack_bytes = STACK_BYTES;
    }
}

/* What is __shared__ is thread-local, see emulation.h; this library has nothing else that is. */
static thread_local unsigned char some_static_memory[16];

static int find_static_memory(struct dl_phdr_info *library, size_t, void *address)
{
    bool here = false;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const ElfW(Phdr) &segment = library->dlpi_phdr[i];
        here = here || (segment.p_type == PT_LOAD &&
                        (uintptr_t)address - library->dlpi_addr - segment.p_vaddr < segment.p_memsz);
    }
    for (int i = 0; here && i < library->dlpi_phnum; i++) {
        const ElfW(Phdr) &segment = library->dlpi_phdr[i];
        if (segment.p_type == PT_TLS && library->dlpi_tls_data != nullptr) {
            static_memory.begin = static_cast<unsigned char *>(library->dlpi_tls_data);
            static_memory.end = static_memory.begin + segment.p_memsz;
        }
    }
    return here;
}

constexpr size_t SHARED_GUARD = 4096;

static void run_block(void)
{
    const dim3 &size = running->block;
    num_live = num_threads;
    num_at_barrier = 0;
    memset(warps, 0, sizeof warps);
    ready_warps = 0;
    for (int t = 0; t < num_threads; t++) {
        fiber &thread = fibers[t];
        prepare(&thread.registers, run_thread);
        thread.index = uint3{(unsigned)t % size.x, (unsigned)t / size.x % size.y, (unsigned)t / size.x / size.y};
        thread.warp = t / BTX_WARP;
        thread.lane = t % BTX_WARP;
        thread.copies.clear();
        thread.groups = 0;
        thread.products.clear();
        thread.product_groups = 0;
        warps[thread.warp].live |= 1u << thread.lane;
        set_ready(&thread);
    }
    draw_policy();
    races_begin_block(num_threads);
    fiber *first = pick();
    start(first);
    enter(&host, &first->registers, false);
    current = nullptr;
    current_thread = -1;
}

__attribute__((format(printf, 2, 3))) static void fail_block(cudaError_t error, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    set_failure(error, format, arguments);
    va_end(arguments);
}

/* Guards around dynamic shared memory: nothing may be written there. */
static void check_guards(const unsigned char *memory, size_t bytes)
{
    for (size_t i = 0; i < SHARED_GUARD && failure == cudaSuccess; i++) {
        if (memory[-1 - (ptrdiff_t)i] != 0xff)
            fail_block(cudaErrorIllegalAddress, "wrote %zu bytes before its dynamic shared memory", i + 1);
        else if (memory[bytes + i] != 0xff)
            fail_block(cudaErrorIllegalAddress, "wrote to byte %zu of %zu bytes of dynamic shared memory", bytes + i,
                       bytes);
    }
}

cudaError_t run_blocks(const work &launch, char *message, size_t message_size)
{
    const uint64_t num_blocks = (uint64_t)launch.grid.x * launch.grid.y * launch.grid.z;
    make_fibers();
    running = &launch;
    failure = cudaSuccess;
    failure_message = message;
    failure_message_size = message_size;
    message[0] = '\0';
    random_state = launch.seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull;
    random_state ^= random_state >> 29;
    random_state |= 1;
    for (int i = 0; i < 8; i++)
        random_bits();
    num_threads = (int)(launch.block.x * launch.block.y * launch.block.z);
    num_warps = (num_threads + BTX_WARP - 1) / BTX_WARP;
    for (int i = 0; i < num_warps; i++)
        warp_order[i] = i;
    races_begin_launch();
    gridDim = launch.grid;
    blockDim = launch.block;

    /* 16 bytes is all the alignment that is promised, so it gets no more. */
    void *allocation = nullptr;
    if (posix_memalign(&allocation, 64, 2 * SHARED_GUARD + launch.shared_bytes + 64) != 0)
        abort();
    unsigned char *memory = static_cast<unsigned char *>(allocation) + SHARED_GUARD + 16;
    memset(allocation, 0xff, 2 * SHARED_GUARD + launch.shared_bytes + 64);
    dynamic_memory = region{memory, memory + launch.shared_bytes};
    some_static_memory[0] = 0xff; /* the thread has its copy now */
    static_memory = region{nullptr, nullptr};
#ifndef __SANITIZE_ADDRESS__
    dl_iterate_phdr(find_static_memory, reinterpret_cast<void *>(&run_block));
#else
    __asan_poison_memory_region(allocation, SHARED_GUARD + 16);
    __asan_poison_memory_region(memory + launch.shared_bytes, SHARED_GUARD);
#endif

#ifdef BTX_UCONTEXT
    host.stack = nullptr;
#endif
#ifdef __SANITIZE_ADDRESS__
    pthread_attr_t attributes;
    void *stack;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &stack, &host.stack_bytes);
    pthread_attr_destroy(&attributes);
    host.stack = static_cast<unsigned char *>(stack);
#endif
    /* Blocks in an order of their own: first + i * step, step prime to their number. */
    auto prime_to = [&](uint64_t step) {
        for (uint64_t a = step, b = num_blocks;;) {
            if (b == 0)
                return a == 1;
            const uint64_t rest = a % b;
            a = b;
            b = rest;
        }
    };
    uint64_t first = random_below((unsigned)num_blocks), step = 1 + random_below((unsigned)num_blocks);
    while (!prime_to(step))
        step++;
    for (uint64_t i = 0; i < num_blocks && failure == cudaSuccess; i++) {
        const uint64_t index = (first + i * step) % num_blocks;
        blockIdx = uint3{(unsigned)(index % launch.grid.x), (unsigned)(index / launch.grid.x % launch.grid.y),
                         (unsigned)(index / launch.grid.x / launch.grid.y)};
        memset(memory, 0xff, launch.shared_bytes);
        if (static_memory.begin != nullptr)
            memset(static_memory.begin, 0xff, (size_t)(static_memory.end - static_memory.begin));
        run_block();
#ifndef __SANITIZE_ADDRESS__
        check_guards(memory, launch.shared_bytes);
#endif
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(allocation, 2 * SHARED_GUARD + launch.shared_bytes + 64);
    (void)check_guards;
#endif
    free(allocation);
    dynamic_memory = static_memory = region{nullptr, nullptr};
    running = nullptr;
    return failure;
}
} // namespace btx_emulation

/* ---- what the compiler calls where kernels access memory that is not aligned (-fsanitize=alignment) ----------------
 */

#ifndef __SANITIZE_ADDRESS__
struct misaligned_access {
    const char *file;
    uint32_t line, column;
    const void *type;
    unsigned char log_alignment, kind;
};

extern "C" __attribute__((visibility("hidden"))) void
btx_misaligned(const misaligned_access *access, const void *at) __asm__("__ubsan_handle_type_mismatch_v1");
void btx_misaligned(const misaligned_access *access, const void *at)
{
    if (btx_emulation::current_thread >= 0)
        btx_emulation::trap_as(cudaErrorMisalignedAddress, "an access at %s:%u: %p is not %d-byte aligned",
                               btx_emulation::file_name(access->file), access->line, at, 1 << access->log_alignment);
}
#endif
