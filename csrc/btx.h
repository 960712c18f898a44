/* btx.h - the C API of bottlenecked: in-place rewriting of a KV cache by a Cache Processor.
 *
 * The method is that of "Bottlenecked Transformers" (arXiv 2505.16950). At the end of a reasoning step the
 * Processor rewrites the KV entries of that step (consolidation) and of the top_k earlier positions the step
 * attended to most (reconsolidation). Everything else in the cache keeps its bits.
 *
 *     caller                      core                               backend (CPU, CUDA, ...)
 *     btx_tensor views     ->     checks, plan of the boundary  ->   lse, mass, top-k, gather, products,
 *     btx_step list               staging, then the write            attention, gated write
 *
 * Conventions
 *   - Zero is success. Every function that can fail returns a btx_status and fills the caller's btx_error.
 *   - The library never exits, aborts, prints, or keeps global state; it borrows memory and never frees it.
 *   - Layout is stride, never a mode: all strides are in elements.
 *   - Work on a device with streams is ordered on the boundary's stream; a call returns before it is done, unless it
 *     hands results to the host.
 *   - Positions count cache positions of one sequence, from 0. Rows are KV-tokens, keys then values,
 *     C = 2 * num_kv_heads * head_dim wide.
 *   - Names in brackets, e.g. [num_layers, rows, C], are shapes, outermost first.
 */
#ifndef BTX_H
#define BTX_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define BTX_VERSION "0.1.0"
#define BTX_ABI_VERSION 7u
#define BTX_MAX_DIMS 4
#define BTX_MAX_RECENT_WINDOW 256
#define BTX_MAX_TOP_K 65536
#define BTX_MAX_THREADS 1024

/* ---- status ------------------------------------------------------------------------------------- */

typedef enum btx_status {
    BTX_OK = 0,
    BTX_INVALID_ARGUMENT, /* the caller's mistake; nothing was written */
    BTX_UNSUPPORTED,      /* valid, but not implemented here; nothing was written */
    BTX_OUT_OF_MEMORY,    /* nothing was written */
    BTX_DEVICE_ERROR,     /* the device failed before the write began; nothing was written */
    BTX_REBUILD_NEEDED    /* the write began and failed: discard the sequences of this boundary */
} btx_status;

/* One sentence: what is wrong, with the value, and the remedy. Unspecified after success. */
typedef struct btx_error {
    char message[512];
} btx_error;

/* Fills error (which may be NULL) in printf's manner and returns status. */
btx_status btx_fail(btx_error *error, btx_status status, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* ---- tensor view -------------------------------------------------------------------------------- */

typedef enum btx_dtype { BTX_F32 = 0, BTX_F16, BTX_BF16, BTX_I32, BTX_I64 } btx_dtype;
typedef enum btx_device_type { BTX_CPU = 0, BTX_CUDA } btx_device_type;

typedef struct btx_device {
    btx_device_type type;
    int32_t index; /* 0 for the CPU */
} btx_device;

/* "cpu", "cuda". */
const char *btx_device_type_name(btx_device_type type);

/* A borrowed view. data belongs to the caller and outlives the call (or the object it is bound to). */
typedef struct btx_tensor {
    void *data;
    btx_dtype dtype;
    btx_device device;
    int32_t num_dims;
    int32_t read_only; /* nonzero: a call that would write it is refused */
    int64_t shape[BTX_MAX_DIMS];
    int64_t stride[BTX_MAX_DIMS]; /* in elements */
} btx_tensor;

/* Bytes per element, and "float32", "float16", "bfloat16", "int32", "int64". */
size_t btx_dtype_size(btx_dtype dtype);
const char *btx_dtype_name(btx_dtype dtype);

/* A row-major view of [shape[0], ..., shape[num_dims - 1]] on the CPU. */
btx_tensor btx_tensor_contiguous(void *data, btx_dtype dtype, int32_t num_dims, const int64_t *shape);

/* 1 when two different indices reach the same element, or when that cannot be excluded (strides that do not nest). */
int btx_tensor_overlaps(const btx_tensor *tensor);

/* ---- KV cache, query cache ---------------------------------------------------------------------- */

/* The stack's cache: one key and one value view per layer, each
 * [num_blocks, block_size, num_kv_heads, head_dim], all of one dtype (f32, f16, bf16), shape and device.
 * Views must not overlap each other; equal starts are refused, more is the caller's to see to.
 * A contiguous cache has one block per sequence. Position p of a sequence lies in block
 * block_table[sequence, p / block_size], row p % block_size. */
typedef struct btx_kv_cache {
    int32_t num_layers;
    const btx_tensor *keys;   /* [num_layers] views, after RoPE, as cached */
    const btx_tensor *values; /* [num_layers] views */
} btx_kv_cache;

/* The queries of the last positions, after RoPE, as captured while the stack's attention ran: one view per
 * layer, [num_pages, page_size, num_query_heads, head_dim], in the KV cache's dtype. Each sequence has a ring
 * of pages: position p lies in page query_table[sequence, (p / page_size) % pages_per_sequence],
 * row p % page_size. The ring must hold the recent window. */
typedef struct btx_query_cache {
    int32_t num_layers;
    const btx_tensor *queries; /* [num_layers] views */
} btx_query_cache;

/* Checks a cache against the backbone's shape; for_writing also refuses read-only and self-overlapping views.
 * INVALID_ARGUMENT names the layer and the value. */
btx_status btx_kv_cache_check(const btx_kv_cache *cache, int32_t num_layers, int32_t num_kv_heads, int32_t head_dim,
                              int for_writing, btx_error *error);

/* ---- Processor ---------------------------------------------------------------------------------- */

typedef enum btx_key_space {
    BTX_KEYS_ROTATED = 0, /* the Processor sees keys as cached */
    BTX_KEYS_UNROTATED    /* RoPE is undone before and redone after (half-split pairing) */
} btx_key_space;

/* Shape of backbone and Processor (arXiv 2505.16950, section 3). All are at least 1 (top_k 0); at most 4096 layers, KV
 * heads and head_dim, 65536 query heads, processor_dim and processor_heads, 2^20 processor_mlp_dim. */
typedef struct btx_config {
    int32_t num_layers;
    int32_t num_kv_heads;
    int32_t num_query_heads; /* a multiple of num_kv_heads */
    int32_t head_dim;
    int32_t processor_dim; /* a multiple of processor_heads */
    int32_t processor_heads;
    int32_t processor_mlp_dim;
    int32_t top_k;         /* 0 (consolidation only) ... BTX_MAX_TOP_K */
    int32_t recent_window; /* R, 1 ... BTX_MAX_RECENT_WINDOW */
    float norm_eps;
    btx_key_space key_space;
    const float *rope_inv_freq; /* [head_dim / 2] for BTX_KEYS_UNROTATED (copied at creation), else NULL */
    btx_dtype weight_dtype;     /* BTX_F32; BTX_BF16: operands of products with a weight rounded to bf16, f32 sums */
} btx_config;

/* The tensors of one layer, in checkpoint order ([out, in] row-major in PyTorch's manner). */
typedef enum btx_weight {
    BTX_INPUT_NORM_WEIGHT = 0, /* C */
    BTX_IN_PROJ_WEIGHT,        /* D x C */
    BTX_IN_PROJ_BIAS,          /* D */
    BTX_ATTN_NORM_WEIGHT,      /* D */
    BTX_Q_PROJ_WEIGHT,         /* D x D */
    BTX_Q_PROJ_BIAS,           /* D */
    BTX_K_PROJ_WEIGHT,
    BTX_K_PROJ_BIAS,
    BTX_V_PROJ_WEIGHT,
    BTX_V_PROJ_BIAS,
    BTX_O_PROJ_WEIGHT,
    BTX_O_PROJ_BIAS,
    BTX_MLP_NORM_WEIGHT,  /* D */
    BTX_GATE_PROJ_WEIGHT, /* F x D */
    BTX_UP_PROJ_WEIGHT,   /* F x D */
    BTX_DOWN_PROJ_WEIGHT, /* D x F */
    BTX_OUT_PROJ_WEIGHT,  /* C x D */
    BTX_OUT_PROJ_BIAS,    /* C */
    BTX_GATE,             /* scalar: the gate's logit */
    BTX_NUM_WEIGHTS
} btx_weight;

/* "in_proj.weight" and so on: the checkpoint's name is "layers.{l}." followed by it. */
const char *btx_weight_name(btx_weight weight);
/* Writes the shape and returns the number of dimensions (0, 1 or 2). */
int32_t btx_weight_shape(const btx_config *config, btx_weight weight, int64_t shape[2]);

typedef struct btx_backend btx_backend;     /* the operations of one device, see below */
typedef struct btx_processor btx_processor; /* immutable weights; may be shared between threads */
typedef struct btx_workspace btx_workspace; /* scratch and threads; one caller at a time */

btx_status btx_config_check(const btx_config *config, btx_error *error);

/* Checks and packs the weights: weights[layer * BTX_NUM_WEIGHTS + weight], f32, f16 or bf16 on the CPU, any
 * strides. NaN and infinity are refused by name. The tensors may be freed afterwards. device_index: which device of the
 * backend's kind holds them, 0 for the CPU. */
btx_status btx_processor_create(const btx_backend *backend, int32_t device_index, const btx_config *config,
                                const btx_tensor *weights, btx_processor **processor, btx_error *error);
void btx_processor_destroy(btx_processor *processor); /* NULL is fine */
const btx_config *btx_processor_config(const btx_processor *processor);
const btx_backend *btx_processor_backend(const btx_processor *processor);
int32_t btx_processor_device_index(const btx_processor *processor);
size_t btx_processor_bytes(const btx_processor *processor); /* memory held by packed weights */

/* num_threads, 1 to BTX_MAX_THREADS: how many threads a call with this workspace may use, the caller's own included.
 * They are started at the first use and sleep between calls; a forked child starts its own. Backends of other devices
 * than the CPU use the caller's alone. */
btx_status btx_workspace_create(const btx_backend *backend, int32_t device_index, int32_t num_threads,
                                btx_workspace **workspace, btx_error *error);
void btx_workspace_destroy(btx_workspace *workspace); /* NULL is fine; waits for what is running */
/* Waits until everything that was called with this workspace is done. A boundary that its device refused, after the
 * call had returned, is told here, or by a later call with this workspace, once it is done, which then does nothing
 * else: INVALID_ARGUMENT, nothing of the refused one was written. One call tells of one. After DEVICE_ERROR discard the
 * sequences of all that was not waited for. */
btx_status btx_workspace_synchronize(btx_workspace *workspace, btx_error *error);
int32_t btx_workspace_num_threads(const btx_workspace *workspace);
size_t btx_workspace_bytes(const btx_workspace *workspace); /* reserved, or grown to the largest call so far */

/* Memory for calls of up to bytes now, rather than when they come. Less than there is does nothing. INVALID_ARGUMENT
 * where a captured CUDA graph uses what there is. */
btx_status btx_workspace_reserve(btx_workspace *workspace, size_t bytes, btx_error *error);

/* Steps that calls with this workspace left unwritten because of max_relative_edit, see btx_boundary: of all calls that
 * are known to be done, on a device those before the latest btx_workspace_synchronize at least. */
int64_t btx_workspace_skipped_steps(const btx_workspace *workspace);

/* What a workspace of num_threads grows to by boundaries of up to num_sequences (1 to 65536) steps at once, each of a
 * sequence of up to max_tokens positions, in a cache of cache_dtype (f32 is enough for all): the largest such boundary
 * takes exactly this, none takes more. */
btx_status btx_processor_workspace_bytes(const btx_processor *processor, int32_t num_threads, int64_t num_sequences,
                                         int64_t max_tokens, btx_dtype cache_dtype, size_t *bytes, btx_error *error);

/* ---- boundary ----------------------------------------------------------------------------------- */

/* One completed step of one sequence. The rewritten window is the step's last min(R, length) positions;
 * everything from sequence_begin to the window is prior. */
typedef struct btx_step {
    int64_t sequence;       /* row of the block table and of the query table */
    int64_t sequence_begin; /* first position that holds a token: left padding before it is never read */
    int64_t step_begin;
    int64_t step_end; /* one past the last position whose KV and query are cached */
    int64_t top_k;    /* recall so many, at most the Processor's top_k; 0: as many as that; -1: none */
} btx_step;

/* The steps that ended with this engine step: one call rewrites them all. */
typedef struct btx_boundary {
    const btx_kv_cache *kv_cache;
    const btx_query_cache *query_cache;
    const btx_step *steps; /* [num_steps], each sequence at most once */
    int64_t num_steps;
    /* i32 on the CPU, rows contiguous. What the steps use of them is copied before it is checked. When the cache is
     * rewritten, no block and no page may belong to two of the steps. */
    btx_tensor block_table; /* [num_sequences, max_blocks] */
    btx_tensor query_table; /* [num_sequences, pages_per_sequence] */
    float softmax_scale;    /* of the backbone's attention, 1e-30 or more; 0 means 1 / sqrt(head_dim) */
    /* A step is skipped, left as it is, where in any layer the norm of its gated edit exceeds this many times the norm
     * of its rows, or is not finite. 0: no step is; an edit that is not finite then refuses the call. */
    float max_relative_edit;
    void *stream; /* cudaStream_t of the caches' device, NULL for its default stream; unused on the CPU */
} btx_boundary;

typedef enum btx_stage {
    BTX_STAGE_MASS = 0, /* log-sum-exp and attention mass */
    BTX_STAGE_TOP_K,
    BTX_STAGE_GATHER,
    BTX_STAGE_PROCESSOR,
    BTX_STAGE_WRITE,
    BTX_NUM_STAGES
} btx_stage;

const char *btx_stage_name(btx_stage stage);

/* What a rewrite did. A view whose data is NULL is not wanted. */
typedef struct btx_report {
    btx_tensor recalled;                  /* i64 [num_layers, num_steps, top_k]: positions ascending, then -1 */
    btx_tensor delta_norm;                /* f32 [num_layers, num_steps]: Euclidean norm of the gated edit, all rows */
    btx_tensor row_norm;                  /* f32 [num_layers, num_steps]: norm of the selected rows before the edit */
    btx_tensor skipped;                   /* i32 [num_steps]: 1 where max_relative_edit was exceeded, else 0 */
    double stage_seconds[BTX_NUM_STAGES]; /* summed over threads; device time where the device is not the CPU */
} btx_report;

/* Selects, processes and rewrites (arXiv 2505.16950, section 3.2). Everything is staged before the first byte
 * is written, so any status but OK and REBUILD_NEEDED leaves the cache untouched. report may be NULL: then a device
 * with streams is not waited for, see btx_workspace_synchronize, and a CUDA graph may capture the call, if the same one
 * was made before; with a report it is refused there. */
btx_status btx_rewrite(const btx_processor *processor, btx_workspace *workspace, const btx_boundary *boundary,
                       btx_report *report, btx_error *error);

/* Selection alone: exact attention mass of every prior position, f32 out [num_layers, num_steps, max_prior],
 * zero behind each step's prior (section 3.2, equation for alpha). recent_window bounds the window as in a
 * rewrite. A device is waited for. Where it finds values which are not finite (INVALID_ARGUMENT) out may have been
 * written. */
btx_status btx_attention_mass(const btx_backend *backend, btx_workspace *workspace, const btx_boundary *boundary,
                              int32_t recent_window, btx_tensor *out, btx_error *error);

/* Query capture: copies the queries of tokens that attention has just computed to their pages, for steps to come.
 * query [num_tokens, num_query_heads, head_dim], after RoPE; slots i64 [n], of the first n tokens, n <= num_tokens:
 * where the stack's cache keeps a token, block * page_size + row, or negative: skipped. block_to_page i32 [num_blocks]:
 * the page that stands for a block, or negative: skipped. pages [num_pages, page_size, num_query_heads, head_dim],
 * query's dtype: row slot % page_size of the page is written. All four are of the backend's device, where the copy is
 * enqueued on stream; it allocates nothing and waits for nothing, so that a CUDA graph may hold it. No two tokens may
 * share a row. A block or page that does not exist is refused on the CPU, before anything is written, and skipped on
 * other devices. */
btx_status btx_capture_queries(const btx_backend *backend, int32_t device_index, const btx_tensor *query,
                               const btx_tensor *slots, const btx_tensor *block_to_page, const btx_tensor *pages,
                               void *stream, btx_error *error);

/* The top_k largest of mass f32 [rows, n], of which the first lengths[row] (i64 [rows]) count: i64 out
 * [rows, top_k], ascending, then -1. Ties go to the smaller position. */
btx_status btx_select_top_k(const btx_backend *backend, const btx_tensor *mass, const btx_tensor *lengths,
                            btx_tensor *out, btx_error *error);

/* ---- one product -------------------------------------------------------------------------------- */

/* y = x W^T + bias for every layer, the product that the Processor is made of, alone. Immutable; may be shared between
 * threads. */
typedef struct btx_packed_linear btx_packed_linear;

/* Checks and packs weight f32 [num_layers, out_dim, in_dim] and bias f32 [num_layers, out_dim] (NULL: none), any
 * strides; at most 4096 layers, out_dim and in_dim at most 2^20. NaN and infinity are refused. weight_dtype: BTX_F32;
 * BTX_BF16: both operands are rounded to bf16, sums are f32. The tensors may be freed afterwards. */
btx_status btx_packed_linear_create(const btx_backend *backend, const btx_tensor *weight, const btx_tensor *bias,
                                    btx_dtype weight_dtype, btx_packed_linear **linear, btx_error *error);
void btx_packed_linear_destroy(btx_packed_linear *linear); /* NULL is fine */
const btx_backend *btx_packed_linear_backend(const btx_packed_linear *linear);
size_t btx_packed_linear_bytes(const btx_packed_linear *linear); /* memory held by packed weights and biases */

/* out f32 [num_layers, rows, out_dim] = x W^T + bias, plus what out held when accumulate is nonzero, from x f32
 * [num_layers, rows, in_dim]. Both are row-major and share no memory. Layers are spread over the workspace's threads.
 * A value of x that is not finite makes its row of out so. */
btx_status btx_packed_linear_apply(const btx_packed_linear *linear, btx_workspace *workspace, const btx_tensor *x,
                                   int accumulate, btx_tensor *out, btx_error *error);

/* ---- backend ------------------------------------------------------------------------------------ */

/* One boundary after all checks, as backends see it. Arrays over rows are concatenated over the steps. */
typedef struct btx_plan_step {
    int64_t sequence;
    int64_t sequence_begin;
    int64_t window_begin;
    int64_t step_end;
    int64_t num_prior;    /* window_begin - sequence_begin */
    int64_t num_window;   /* step_end - window_begin */
    int64_t num_recalled; /* min(top_k, num_prior), top_k of the step or else of the Processor */
    int64_t prior_offset; /* of this step in a layer's [total_prior] */
    int64_t row_offset;   /* in a layer's [total_rows]: recalled rows, then window rows */
} btx_plan_step;

typedef struct btx_plan {
    const btx_plan_step *steps;
    int64_t num_steps;
    int64_t total_prior, total_rows;
    const btx_tensor *keys, *values, *queries; /* [num_layers] each */
    const int32_t *block_table;                /* [num_sequences, block_table_stride] */
    int64_t block_table_stride;
    const int32_t *query_table;
    int64_t query_table_stride;
    int64_t pages_per_sequence;
    int64_t block_size, page_size;
    int32_t num_layers, num_kv_heads, num_query_heads, head_dim;
    float softmax_scale;
    float max_relative_edit;      /* 0: no limit */
    const unsigned char *skipped; /* [num_steps], of the host: nonzero where write_kv leaves a step; NULL: nowhere, or
                                     on a device, which knows by itself */
    const float *rope_inv_freq;   /* NULL when keys are used as cached */
} btx_plan;

/* A packed matrix product for every layer. gated: its rows are a gate matrix over an up matrix, see linear_swiglu. */
typedef struct btx_linear {
    const void *packed;  /* of layer 0, in the backend's own layout */
    size_t layer_stride; /* bytes from one layer's weights to the next's */
    const float *bias;   /* [num_layers, out_dim] or NULL */
    int64_t in_dim, out_dim;
    btx_dtype dtype;
    int32_t gated;
} btx_linear;

/* What one lane works on: a run of layers, and of those a run of the plan's steps. Activations belong to a pass: their
 * rows are those of its steps, one after the other, layer by layer. Products take them as operands: rounded to the
 * weights' dtype, in the backend's own layout of operand_bytes(). */
typedef struct btx_pass {
    const btx_plan *plan;
    int32_t layer_begin, layer_end;
    int64_t step_begin, step_end;
    void *executor; /* the workspace's */
    void *scratch;  /* scratch_bytes() for the operation's own use */
} btx_pass;

/* One unit of work on one lane; units are independent. */
typedef btx_status (*btx_unit_function)(void *context, int64_t unit, int32_t lane, btx_error *error);

struct btx_backend {
    uint32_t abi_version; /* BTX_ABI_VERSION */
    uint32_t struct_size; /* sizeof(btx_backend) */
    const char *name;     /* "cpu" */
    const char *variant;  /* "scalar", "neon", "avx2", "avx512", "avx512_bf16"; of CUDA "" */
    btx_device_type device_type;
    /* How large a pass is best. layers_per_pass > 0: so many layers, and whole steps until there are rows_per_pass rows
     * (0: all). layers_per_pass 0: all steps, and as many layers as have rows_per_pass rows together; rows are
     * selected before, of as many layers as there is memory for, and written after, of all. */
    int32_t layers_per_pass;
    int64_t rows_per_pass;
    /* The mass is always in parts, a KV head each: attention_mass is asked for all heads at once, and its mass is
     * [layers, num_kv_heads, prior of the pass]. */
    int32_t mass_by_head;
    /* stage_kv needs the rows that gather_kv read; else gather_kv and stage_kv are given none. */
    int32_t keeps_rows;
    int (*available)(void); /* can this machine run it? */

    /* Memory the backend works on. release(NULL) is fine. */
    btx_status (*allocate)(int32_t device_index, size_t bytes, void **memory, btx_error *error);
    void (*release)(void *memory);

    /* An executor runs fn for every unit in [0, num_units), each on one lane < num_threads, in any order; returns the
     * first failure. */
    btx_status (*executor_create)(int32_t device_index, int32_t num_threads, void **executor, btx_error *error);
    void (*executor_destroy)(void *executor);
    btx_status (*executor_run)(void *executor, int64_t num_units, btx_unit_function fn, void *context,
                               btx_error *error);

    /* Where the memory is not the host's; all NULL where it is. A boundary is
     *
     *     where the call is waited for: check_wait, synchronize
     *     check_growth (where the workspace is too small)
     *     begin, executor_run (mass and top-k, each then mark), executor_run (each further stage's operations, then
     *     mark), executor_run (the write, then mark), and where there is a report: synchronize, download
     *
     * all called by one thread. Operations are ordered on begin's stream and need not be done when they return; the
     * plan is the host's and goes when the call returns. */
    /* memory = from, of the host; blocks. */
    btx_status (*upload)(int32_t device_index, void *memory, const void *from, size_t bytes, btx_error *error);
    /* Whether a call on stream may be waited for: INVALID_ARGUMENT while a graph is captured there, and where one that
     * was uses the workspace. */
    btx_status (*check_wait)(void *executor, void *stream, btx_error *error);
    /* Whether the workspace's memory may be allocated anew, for a call on *stream, or with NULL for calls to come:
     * INVALID_ARGUMENT while a graph is captured there, and where one that was uses what there is. */
    btx_status (*check_growth)(void *executor, void *const *stream, btx_error *error);
    /* Brings the plan to the device. Tells of an earlier call's failure that nobody has been told of. timed:
     * synchronize will be asked for stage_seconds. */
    btx_status (*begin)(void *executor, const btx_plan *plan, void *stream, int timed, btx_error *error);
    /* A stage of the boundary has been called for in full. */
    void (*mark)(void *executor, btx_stage stage);
    /* to, of the host, = memory; blocks. */
    btx_status (*download)(void *executor, void *to, const void *memory, size_t bytes, btx_error *error);
    /* Waits, and tells whether the device refused a boundary (INVALID_ARGUMENT, each once) or failed; adds to
     * stage_seconds [BTX_NUM_STAGES], unless NULL, those of the latest boundary. */
    btx_status (*synchronize)(void *executor, double *stage_seconds, btx_error *error);
    /* Steps skipped in all boundaries that are known to be done. */
    int64_t (*num_skipped)(const void *executor);

    /* Weights f32 [out_dim, in_dim] to the packed layout of one layer. gated: [2, out_dim / 2, in_dim]. packed is host
     * memory, to be uploaded where the backend's is not. */
    size_t (*packed_bytes)(int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated);
    void (*pack)(const float *weight, int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated, void *packed);
    /* Memory of an operand [rows, dim] of a product whose weights have this dtype. */
    size_t (*operand_bytes)(int64_t rows, int64_t dim, btx_dtype dtype);

    /* Scratch every operation below may use, per lane, for passes of this plan, of up to max_layers layers and of up to
     * max_rows rows a layer; with max_dim > 0 also for a Processor attention of up to that width. */
    size_t (*scratch_bytes)(const btx_plan *plan, int32_t max_layers, int64_t max_rows, int64_t max_dim);

    /* mass [layers, prior of the pass] = 1 / (num_window * num_query_heads) * sum of the softmax probabilities of every
     * window query over the query heads of KV heads [head_begin, head_end). INVALID_ARGUMENT where a softmax is not
     * finite: queries or keys hold NaN or infinity, or were never captured. */
    btx_status (*attention_mass)(const btx_pass *pass, int32_t head_begin, int32_t head_end, float *mass,
                                 btx_error *error);
    /* out f32 [num_layers, num_steps, at least every step's prior], of the backend's device = mass [layers, num_parts,
     * prior of the pass] summed over its parts, in order; zero behind each step's prior. */
    btx_status (*store_mass)(const btx_pass *pass, int32_t num_parts, const float *mass, const btx_tensor *out,
                             btx_error *error);
    /* positions [layers, rows of the pass]: of each step's mass the num_recalled largest, ascending, ties to the
     * smaller position, NaN as zero; then its window. mass [layers, num_parts, prior of the pass] is first summed over
     * its parts, in order, into the first; it is not read where num_recalled is 0. */
    btx_status (*top_k)(const btx_pass *pass, int32_t num_parts, float *mass, int32_t *positions, btx_error *error);
    /* rows [layers, rows, C] = x = cached keys | values at positions [layers, rows], RoPE undone when the plan says so;
     * NULL: not wanted. normed, an operand, = x / sqrt(mean(x^2) + eps) * weight [num_layers, C]. */
    btx_status (*gather_kv)(const btx_pass *pass, const int32_t *positions, float *rows, const float *weight, float eps,
                            btx_dtype dtype, void *normed, btx_error *error);
    /* x [layers, rows, dim] f32 as operand. */
    btx_status (*round)(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out,
                        btx_error *error);
    /* x / sqrt(mean(x^2) + eps) * weight [num_layers, dim] as operand; x [layers, rows, dim] f32. */
    btx_status (*rms_norm)(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                           btx_dtype dtype, void *out, btx_error *error);
    /* out [layers, rows, out_dim] f32 = x W^T + bias, plus what out held when accumulate is nonzero. x is an operand.
     */
    btx_status (*linear)(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                         btx_error *error);
    /* out, an operand [layers, rows, out_dim / 2] = silu(x W_gate^T) * (x W_up^T); weights are gated, without bias. */
    btx_status (*linear_swiglu)(const btx_pass *pass, const btx_linear *weights, const void *x, void *out,
                                btx_error *error);
    /* out, an operand [layers, rows, dim] = softmax(q k^T / sqrt(dim / heads)) v per step and head, no mask, from
     * qkv [layers, rows, 3 * dim] f32. */
    btx_status (*attention)(const btx_pass *pass, const float *qkv, int64_t dim, int32_t heads, btx_dtype dtype,
                            void *out, btx_error *error);
    /* staged [layers, rows, C] in the cache's dtype = cache + gate [num_layers] * delta, in f32, rounded once; where
     * the edit is zero the cache's own bits. delta [layers, rows, C] is the edit of rows, overwritten; RoPE is redone
     * on its key half when the plan says so. rows: what gather_kv read, or NULL, see keeps_rows. Norms f32 [layers,
     * steps of the pass], of the gated edit and of rows; both may be NULL on a device without max_relative_edit. Where
     * staged values are not all finite a delta_norm is infinite, and without max_relative_edit the boundary is refused
     * before the write, for which a device has to keep it in mind. What is skipped is decided from the norms, see
     * btx_edit_is_within: a device does so here, too. */
    btx_status (*stage_kv)(const btx_pass *pass, const int32_t *positions, const float *gate, const float *rows,
                           float *delta, void *staged, float *delta_norm, float *row_norm, btx_error *error);
    /* cache = staged at positions, but for steps that are skipped. On a device nothing where the boundary has been
     * refused. */
    btx_status (*write_kv)(const btx_pass *pass, const int32_t *positions, const void *staged, btx_error *error);

    /* Apart from boundaries: btx_capture_queries. Its arguments are checked, but for the values of slots and
     * block_to_page. */
    btx_status (*capture_queries)(int32_t device_index, const btx_tensor *query, const btx_tensor *slots,
                                  const btx_tensor *block_to_page, const btx_tensor *pages, void *stream,
                                  btx_error *error);
};

/* Whether the edit of a layer and step, of these norms, is within plan.max_relative_edit. */
static inline int btx_edit_is_within(float delta_norm, float row_norm, float limit)
{
    return delta_norm <= limit * row_norm && delta_norm <= 3.40282347e+38f; /* neither where it is NaN */
}

/* Rows and prior positions of a pass, over its steps. */
static inline int64_t btx_pass_rows(const btx_pass *pass)
{
    const btx_plan_step *steps = pass->plan->steps;
    if (pass->step_begin == pass->step_end)
        return 0;
    const btx_plan_step *last = &steps[pass->step_end - 1];
    return last->row_offset + last->num_recalled + last->num_window - steps[pass->step_begin].row_offset;
}

static inline int64_t btx_pass_prior(const btx_pass *pass)
{
    const btx_plan_step *steps = pass->plan->steps;
    if (pass->step_begin == pass->step_end)
        return 0;
    const btx_plan_step *last = &steps[pass->step_end - 1];
    return last->prior_offset + last->num_prior - steps[pass->step_begin].prior_offset;
}

/* The backends compiled in, best first; the table is constant. */
const btx_backend *const *btx_backends(int32_t *count);

/* "cpu" (the best this machine runs), "cpu:avx2", "cuda" (its first device) or "cuda:1". UNSUPPORTED names what is
 * missing and what there is. */
btx_status btx_backend_find(const char *name, const btx_backend **backend, int32_t *device_index, btx_error *error);

#ifdef __cplusplus
}
#endif

#endif /* BTX_H */
