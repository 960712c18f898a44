/* internal.h - what the emulation's files share. */
#ifndef BTX_EMULATION_INTERNAL_H
#define BTX_EMULATION_INTERNAL_H

#include <functional>

#include "emulation.h"

namespace btx_emulation {
constexpr int MAX_THREADS = 1024, MAX_WARPS = MAX_THREADS / BTX_WARP;

struct region {
    unsigned char *begin, *end;
    bool holds(const void *at, size_t bytes) const
    {
        const unsigned char *first = static_cast<const unsigned char *>(at);
        return first >= begin && first < end && bytes <= (size_t)(end - first);
    }
};

/* ---- device.cpp ---- */

/* One launch, ready to run. */
struct work {
    const char *name;
    dim3 grid, block;
    size_t shared_bytes;
    void (*call)(const void *arguments);
    void *arguments;
    uint64_t seed;
};
/* cudaSuccess, or what the kernel did; message says it in full. */
cudaError_t run_blocks(const work &launch, char *message, size_t message_size);

/* Of the running block: what shared memory there is. Empty outside kernels. */
extern region dynamic_memory, static_memory;
extern region stacks; /* of all threads */
/* Which thread of its block runs; -1 outside kernels. */
extern int current_thread;

/* ---- races.cpp: what orders accesses, and accesses; only kernels compiled for it tell of theirs ---- */

void races_begin_launch(void);
void races_begin_block(int num_threads);
void races_barrier(void);                  /* all threads of the block met */
void races_warp(int warp, unsigned lanes); /* these lanes of a warp met, with __syncwarp's promise */
/* By the running thread, from the code at where. Does not return when it races. */
void races_access(const void *at, size_t bytes, bool writes, bool atomic, const void *where);

/* ---- runtime.cpp ---- */

/* Guards around device memory that were overwritten: a sentence, or "". */
bool guards_hold(char *message, size_t message_size);
/* Now, or when somebody waits. */
void submit(std::function<void()> what);
} // namespace btx_emulation

#endif
