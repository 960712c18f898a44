/* races.cpp - accesses of shared and global memory that no barrier orders.
 *
 * Kernels compiled with -fsanitize=thread call a function before each of their accesses. ThreadSanitizer's own library
 * would take them for accesses of one host thread, so these functions here stand in its place. They know what a device
 * promises: a block barrier orders all threads of the block, __syncwarp the lanes that meet in it, and nothing orders
 * blocks of one launch; shuffles, votes and matrix instructions order nothing. That finds a missing barrier under any
 * schedule, also where the results happen to be right.
 *
 * For every two bytes the last write is kept, and two reads. Time is counted in epochs, one more at each launch, block
 * and block barrier, and within an epoch by a clock per lane. */
#include <dlfcn.h>

#include <memory>
#include <unordered_map>

#include "internal.h"

namespace btx_emulation {
struct access {
    uint32_t epoch; /* 0: none */
    uint32_t clock; /* of the lane, when it did it */
    uint16_t thread;
    bool atomic;
};

struct cell {
    access write, reads[2];
};

constexpr uintptr_t CELL_BYTES = 2, PAGE_BYTES = 4096;

struct page {
    cell cells[PAGE_BYTES / CELL_BYTES];
};

static std::unordered_map<uintptr_t, std::unique_ptr<page>> pages;
static struct {
    uintptr_t number;
    page *at;
} recent_pages[256]; /* by number, modulo 256 */

static uint32_t epoch = 1, launch_epoch = 1, block_epoch = 1;
/* clocks[t][l]: how far thread t knows lane l of its warp; its own entry is its clock. */
static uint32_t clocks[MAX_THREADS][BTX_WARP];

static cell *find_cell(uintptr_t address)
{
    const uintptr_t number = address / PAGE_BYTES;
    auto &recent = recent_pages[number % 256];
    if (recent.at == nullptr || recent.number != number) {
        std::unique_ptr<page> &found = pages[number];
        if (found == nullptr)
            found = std::make_unique<page>();
        recent.number = number;
        recent.at = found.get();
    }
    return &recent.at->cells[address % PAGE_BYTES / CELL_BYTES];
}

void races_begin_launch(void)
{
    launch_epoch = ++epoch;
}

void races_begin_block(int num_threads)
{
    block_epoch = ++epoch;
    for (int t = 0; t < num_threads; t++) {
        memset(clocks[t], 0, sizeof clocks[t]);
        clocks[t][t % BTX_WARP] = 1;
    }
}

void races_barrier(void)
{
    epoch++;
}

void races_warp(int warp, unsigned lanes)
{
    uint32_t all[BTX_WARP] = {0};
    for (unsigned left = lanes; left != 0; left &= left - 1)
        for (int l = 0; l < BTX_WARP; l++)
            all[l] = max(all[l], clocks[warp * BTX_WARP + __builtin_ctz(left)][l]);
    for (unsigned left = lanes; left != 0; left &= left - 1) {
        const int lane = __builtin_ctz(left);
        memcpy(clocks[warp * BTX_WARP + lane], all, sizeof all);
        clocks[warp * BTX_WARP + lane][lane]++;
    }
}

/* Is what was done before known to have happened to the running thread? */
static bool ordered(const access &before, bool is_shared)
{
    if (before.epoch < (is_shared ? block_epoch : launch_epoch))
        return true;
    if (before.epoch < block_epoch)
        return false; /* another block of this launch */
    if (before.epoch < epoch || before.thread == current_thread)
        return true;
    return before.thread / BTX_WARP == current_thread / BTX_WARP &&
           clocks[current_thread][before.thread % BTX_WARP] >= before.clock;
}

/* Where in the sources, if addr2line can tell. */
static void describe_place(const void *at, char *text, size_t size)
{
    Dl_info library;
    char command[1024];
    text[0] = '\0';
    if (at == nullptr || dladdr(at, &library) == 0)
        return;
    snprintf(command, sizeof command, "addr2line -s -e '%s' %#zx 2>/dev/null", library.dli_fname,
             (size_t)((uintptr_t)at - (uintptr_t)library.dli_fbase) - 1);
    FILE *output = popen(command, "r");
    if (output == nullptr)
        return;
    if (fgets(text, (int)size, output) != nullptr)
        text[strcspn(text, " \n")] = '\0';
    pclose(output);
}

[[noreturn]] static void report(uintptr_t address, const access &before, bool wrote, bool writes, const void *where)
{
    char place[256], memory[128];
    describe_place(where, place, sizeof place);
    const unsigned char *at = (const unsigned char *)address;
    if (dynamic_memory.holds(at, 1))
        snprintf(memory, sizeof memory, "byte %zu of dynamic shared memory", (size_t)(at - dynamic_memory.begin));
    else if (static_memory.holds(at, 1))
        snprintf(memory, sizeof memory, "static shared memory");
    else
        snprintf(memory, sizeof memory, "global memory, %p", (const void *)at);
    trap("race: %s %s%s%s, which thread %d%s %s; nothing orders the two", writes ? "writes" : "reads", memory,
         place[0] != '\0' ? " at " : "", place, (int)before.thread,
         before.epoch < block_epoch ? " of another block" : "", wrote ? "wrote" : "read");
}

void races_access(const void *memory, size_t bytes, bool writes, bool atomic, const void *where)
{
    const uintptr_t first = (uintptr_t)memory / CELL_BYTES * CELL_BYTES, end = (uintptr_t)memory + bytes;
    if (current_thread < 0 || bytes == 0 || stacks.holds(memory, 1))
        return;
    const bool is_shared = dynamic_memory.holds(memory, 1) || static_memory.holds(memory, 1);
    const access now = {epoch, clocks[current_thread][current_thread % BTX_WARP], (uint16_t)current_thread, atomic};
    for (uintptr_t address = first; address < end; address += CELL_BYTES) {
        cell *own = find_cell(address);
        if (own->write.epoch != 0 && !(own->write.atomic && atomic) && !ordered(own->write, is_shared))
            report(address, own->write, true, writes, where);
        if (writes) {
            for (const access &read : own->reads)
                if (read.epoch != 0 && !(read.atomic && atomic) && !ordered(read, is_shared))
                    report(address, read, false, writes, where);
            own->write = now;
            continue;
        }
        /* Two reads that are not ordered are kept, so that one of them is another thread's than the next write's. */
        access *to = &own->reads[1];
        for (access &read : own->reads) {
            if (read.epoch == 0 || (read.thread == now.thread && read.epoch >= block_epoch) ||
                ordered(read, is_shared)) {
                to = &read;
                break;
            }
        }
        *to = now;
    }
}
} // namespace btx_emulation

/* ---- what the compiler calls: under its own names it would be taken for the compiler's idea of them ----------------
 */

#define BTX_HOOK(name, ...)                                                                                            \
    extern "C" __attribute__((visibility("hidden"))) void btx_##name(__VA_ARGS__) __asm__("__tsan_" #name);            \
    void btx_##name(__VA_ARGS__)
#define BTX_ACCESS(name, bytes, writes)                                                                                \
    BTX_HOOK(name, void *at)                                                                                           \
    {                                                                                                                  \
        if (btx_emulation::current_thread >= 0)                                                                        \
            btx_emulation::races_access(at, bytes, writes, false, __builtin_return_address(0));                        \
    }
#define BTX_ACCESSES(bytes)                                                                                            \
    BTX_ACCESS(read##bytes, bytes, false)                                                                              \
    BTX_ACCESS(write##bytes, bytes, true)                                                                              \
    BTX_ACCESS(unaligned_read##bytes, bytes, false)                                                                    \
    BTX_ACCESS(unaligned_write##bytes, bytes, true)                                                                    \
    BTX_ACCESS(volatile_read##bytes, bytes, false)                                                                     \
    BTX_ACCESS(volatile_write##bytes, bytes, true)

BTX_ACCESSES(1)
BTX_ACCESSES(2)
BTX_ACCESSES(4)
BTX_ACCESSES(8)
BTX_ACCESSES(16)
BTX_HOOK(read_range, void *at, unsigned long bytes)
{
    btx_emulation::races_access(at, bytes, false, false, __builtin_return_address(0));
}
BTX_HOOK(write_range, void *at, unsigned long bytes)
{
    btx_emulation::races_access(at, bytes, true, false, __builtin_return_address(0));
}
BTX_HOOK(init, void)
{
}
BTX_HOOK(func_entry, void *)
{
}
BTX_HOOK(func_exit, void)
{
}
BTX_HOOK(vptr_update, void **, void *)
{
}
