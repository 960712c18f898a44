/* plan.cuh - a boundary's plan as kernels see it, and the executor that brings it to the device.
 *
 * Everything a boundary needs to know is written to one page-locked block of the host and copied to the device in one
 * transfer. Kernels get a device_plan by value; its pointers lead into the copy. */
#ifndef BTX_PLAN_CUH
#define BTX_PLAN_CUH

#include "cuda.h"
#include "device.cuh"

/* Keys of one unit of work. Both depend on a step's own length alone, so that its mass does not depend on the batch. */
#define BTX_LSE_MAX_SPLITS 16
#define BTX_LSE_MIN_KEYS 512  /* of a split of attention_mass.cu's first kernel */
#define BTX_MASS_MIN_KEYS 512 /* of a range of its second, a multiple of MASS_KEYS */
#define BTX_MASS_MAX_KEYS 2048

#define BTX_NOT_REFUSED 0xffffffffu

/* What is wrong with a refused boundary, each layer * num_steps + step of the first place, or BTX_NOT_REFUSED. */
typedef struct refusal {
    unsigned mass;    /* a softmax was not finite */
    unsigned edit;    /* a staged value was not finite */
    unsigned skipped; /* on the host's side: steps skipped so far, in all calls of a slot */
} refusal;

typedef struct device_view {
    void *data;
    int64_t stride[4]; /* in elements */
    int32_t vector;    /* rows of a head are contiguous and start on 16 bytes */
    /* Elements, a power of two, 16 bytes or more, of which strides of blocks and rows are multiples, and so many that
     * 32 bits can count the units from data to any row of head 0; zero where there is no such number. */
    int32_t unit;
} device_view;

typedef struct device_layer {
    device_view keys, values, queries;
} device_layer;

typedef struct device_step {
    int64_t prior_offset;
    int32_t row_offset;
    int32_t sequence_begin;
    int32_t num_prior, num_window, num_recalled;
    int32_t first_block;  /* of the sequence's, in its table */
    int32_t block_offset; /* of that block, in blocks */
    int32_t page_offset;  /* of the sequence's pages, in pages */
    int32_t keys_per_split;
    int32_t num_splits;
    int32_t keys_per_range;
    int32_t split_offset; /* window rows times splits of the steps before: of partial log-sum-exps */
} device_step;

typedef struct device_tile {
    int32_t step, index;
} device_tile;

/* Of all layers and steps. */
typedef struct device_plan {
    const device_layer *layers;
    const device_step *steps;
    const int32_t *blocks, *pages;
    const int32_t *row_step;   /* [total_rows]: whose step a row is */
    const device_tile *splits; /* [num_splits] of all steps */
    const device_tile *ranges; /* [num_ranges] */
    refusal *refused;          /* on the device */
    refusal *refused_host;     /* page-locked, for the host to read */
    unsigned *skipped;         /* [num_steps]: nonzero where the edit exceeds max_relative_edit */
    const float *rope_inv_freq;
    int64_t total_prior;
    int32_t total_rows, num_steps;
    int32_t num_splits, num_ranges;
    int32_t most_splits, most_ranges; /* of a step */
    int32_t split_rows;               /* sum over steps of window rows times splits */
    int32_t max_window, max_prior;
    int32_t num_kv_heads, group, head_dim; /* group: query heads of a KV head */
    int32_t block_size, page_size, pages_per_sequence;
    int32_t block_shift; /* log2 of block_size, or -1 */
    float scale_log2;    /* softmax_scale * log2(e) */
    float mass_scale;    /* 1 / num_query_heads, the window apart */
    float max_relative_edit;
} device_plan;

/* One call's worth of page-locked memory. */
typedef struct plan_slot {
    unsigned char *host;   /* Owned, page-locked, [capacity]; begins with the host's refusal */
    unsigned char *device; /* Owned, [capacity] */
    size_t capacity;
    cudaEvent_t copied; /* Owned. */
    cudaEvent_t done;   /* Owned: the call that used the slot */
    int in_use;         /* done was recorded */
    int64_t *sequences; /* Owned, [max_steps]: for the sentence about a refusal */
    int64_t max_steps, num_steps;
    unsigned skipped_told; /* of the steps skipped so far, those the executor knows of */
} plan_slot;

#define BTX_PLAN_SLOTS 4
/* Two each for the selection and for the unit of every layer, of which btx_config has 4096 at most, and the write. */
#define BTX_MAX_MARKS (4 * 4096 + 1)
#define BTX_MAX_PREPARED 32

typedef struct cuda_executor {
    int32_t device;
    int32_t num_processors;
    int32_t shared_limit;       /* bytes of shared memory a block may ask for */
    int32_t compute_capability; /* 90 for 9.0 */
    int32_t sm90a;              /* the device runs what was compiled for sm_90a */
    void *encode_tensor_map;    /* the driver's cuTensorMapEncodeTiled; NULL: not to be had, or not to be used */
    cudaStream_t stream;        /* of the call under way, or the latest */
    int capturing, captured;
    plan_slot slots[BTX_PLAN_SLOTS];
    plan_slot capture_slot; /* its plan must live as long as the graph */
    plan_slot *slot;        /* of the call under way, or the latest; NULL before the first */
    plan_slot *latest;      /* of the latest call that was not captured, once it is recorded; NULL before the first */
    cudaStream_t latest_stream;
    int64_t num_skipped; /* steps, of calls that are known to be done */
    int next_slot;
    device_plan plan;
    /* Stage times. */
    int timed, num_marks;
    cudaEvent_t marks[BTX_MAX_MARKS + 1]; /* Owned, made when first needed. */
    btx_stage mark_stage[BTX_MAX_MARKS + 1];
    /* Kernels that may use all the dynamic shared memory they ever ask for. */
    const void *prepared[BTX_MAX_PREPARED];
    int num_prepared;
    /* Owned: cuBLASLt's handle, memory and chosen algorithms (linear.cu); NULL: linear_general.cu does all products. */
    struct linear_state *linear;
} cuda_executor;

/* Turns a failed call into a status and a sentence; what says what was being done. */
btx_status cuda_fail(cudaError_t failure, const char *what, btx_error *error);

#define BTX_CUDA_TRY(call, what)                                                                                       \
    do {                                                                                                               \
        cudaError_t failure_ = (call);                                                                                 \
        if (failure_ != cudaSuccess)                                                                                   \
            return cuda_fail(failure_, what, error);                                                                   \
    } while (0)

/* The device of the calls between entering and leaving; the caller's is put back. */
typedef struct device_scope {
    int previous;
} device_scope;

btx_status cuda_enter_device(int32_t device, device_scope *scope, btx_error *error);
void cuda_leave_device(int32_t device, const device_scope *scope);

/* Allows a kernel most bytes of dynamic shared memory, once per executor. most must not depend on the call: other
 * executors of the device set the same attribute. */
btx_status cuda_prepare(cuda_executor *executor, const void *kernel, int most, btx_error *error);

/* After a launch. */
#define BTX_CUDA_CHECK(what) BTX_CUDA_TRY(cudaPeekAtLastError(), what)

/* linear.cu */
btx_status cuda_linear_create(int32_t device, struct linear_state **state, btx_error *error);
void cuda_linear_destroy(struct linear_state *state);
/* Version of the cuBLASLt that is or can be loaded, major * 10000 + minor * 100 + patch; 0 where there is none. */
size_t cuda_linear_version(void);

/* ---- where things lie ---------------------------------------------------------------------------------------------
 */

/* Elements of a row of an operand: what products read in 16-byte pieces. */
__host__ __device__ static inline int64_t operand_stride(int64_t dim)
{
    return (dim + 7) / 8 * 8;
}

/* The block, from a sequence's first one on, of a cache position. */
__device__ static inline unsigned find_block(const device_plan &plan, unsigned position)
{
    const unsigned size = (unsigned)plan.block_size;
    /* Most caches have one block a sequence, or blocks of a power of two: a division is 20 instructions. */
    return position < size ? 0 : plan.block_shift >= 0 ? position >> plan.block_shift : position / size;
}

/* Element (head 0, 0) of a cache position, counted from the sequence's first token. */
__device__ static inline int64_t kv_offset(const device_plan &plan, const device_step &step, const device_view &view,
                                           int32_t index)
{
    const unsigned position = (unsigned)(step.sequence_begin + index), size = (unsigned)plan.block_size;
    const unsigned block = find_block(plan, position);
    return plan.blocks[step.block_offset + (int32_t)block - step.first_block] * view.stride[0] +
           (int64_t)(position - block * size) * view.stride[1];
}

/* Element (head 0, 0) of the query of the window's j-th position. */
__device__ static inline int64_t query_offset(const device_plan &plan, const device_step &step, const device_view &view,
                                              int32_t j)
{
    const unsigned position = (unsigned)(step.sequence_begin + step.num_prior + j), size = (unsigned)plan.page_size;
    const unsigned page = position / size;
    return plan.pages[step.page_offset + (int32_t)(page % (unsigned)plan.pages_per_sequence)] * view.stride[0] +
           (int64_t)(position - page * size) * view.stride[1];
}

/* Keeps the first place, on both sides. */
__device__ static inline void refuse(unsigned *on_device, unsigned *on_host, unsigned place)
{
    atomicMin(on_device, place);
    atomicMin(on_host, place);
}

/* Leaves a step unwritten; any of its layers may say so. */
__device__ static inline void skip(const device_plan &plan, int32_t step)
{
    if (atomicExch(&plan.skipped[step], 1u) == 0u)
        atomicAdd(&plan.refused_host->skipped, 1u);
}

#endif /* BTX_PLAN_CUH */
