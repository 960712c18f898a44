/* linear.cu - the Processor's products, of all layers of a pass at once: one strided-batched cuBLASLt product each.
 *
 * cuBLASLt is opened when the first executor is made: the copy that is in the process already (PyTorch's), then that of
 * the nvidia-cublas wheel beside this extension, then the system's. The algorithm of a product is asked for once per
 * bucket of rows, and kept with what describes the latest call; what there is none for goes to linear_general.cu, and
 * everything where BOTTLENECKED_CUDA_PRODUCTS=general asks for it. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cublaslt.h"
#include "half.h"
#include "operations.cuh"

/* ---- weights and operands: row-major, rows padded to 16 bytes with zeros ------------------------------------------
 */

static size_t element_size(btx_dtype dtype)
{
    return dtype == BTX_BF16 ? 2 : 4;
}

size_t cuda_packed_bytes(int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated)
{
    (void)gated; /* the gate's rows, then up's */
    return (size_t)(out_dim * operand_stride(in_dim)) * element_size(dtype);
}

void cuda_pack(const float *weight, int64_t out_dim, int64_t in_dim, btx_dtype dtype, int32_t gated, void *packed)
{
    const int64_t stride = operand_stride(in_dim);
    (void)gated;
    for (int64_t row = 0; row < out_dim; row++) {
        for (int64_t column = 0; column < stride; column++) {
            const float value = column < in_dim ? weight[row * in_dim + column] : 0.0f;
            if (dtype == BTX_BF16)
                ((uint16_t *)packed)[row * stride + column] = btx_f32_to_bf16(value);
            else
                ((float *)packed)[row * stride + column] = value;
        }
    }
}

size_t cuda_operand_bytes(int64_t rows, int64_t dim, btx_dtype dtype)
{
    return (size_t)(rows * operand_stride(dim)) * element_size(dtype);
}

#ifdef BTX_EMULATE

struct linear_state {
    int unused;
};

btx_status cuda_linear_create(int32_t device, struct linear_state **state, btx_error *error)
{
    (void)device, (void)error;
    *state = NULL;
    return BTX_OK;
}

void cuda_linear_destroy(struct linear_state *state)
{
    (void)state;
}

size_t cuda_linear_version(void)
{
    return 0;
}

btx_status cuda_linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                       btx_error *error)
{
    return cuda_linear_general(pass, weights, x, accumulate, out, error);
}

#else

/* ---- the library --------------------------------------------------------------------------------------------------
 */

static const char *const library_names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
/* Where wheels put it, from the folder that bottleneck_ext is in. */
static const char *const wheel_paths[] = {"nvidia/cu13/lib/libcublasLt.so.13", "nvidia/cublas/lib/libcublasLt.so.13",
                                          "nvidia/cublas/lib/libcublasLt.so.12"};

/* Opens the wheel's copy beside this extension. */
static void *open_wheel(void)
{
    Dl_info self;
    char path[4096];
    if (dladdr((const void *)wheel_paths, &self) == 0 || self.dli_fname == NULL)
        return NULL;
    snprintf(path, sizeof path, "%s", self.dli_fname);
    for (int up = 0; up < 2; up++) { /* .../site-packages/bottleneck_ext/_core.abi3.so */
        char *slash = strrchr(path, '/');
        if (slash == NULL)
            return NULL;
        *slash = '\0';
    }
    const size_t folder = strlen(path);
    for (size_t i = 0; i < sizeof wheel_paths / sizeof *wheel_paths; i++) {
        snprintf(path + folder, sizeof path - folder, "/%s", wheel_paths[i]);
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library != NULL)
            return library;
    }
    return NULL;
}

static void *open_library(void)
{
    const size_t names = sizeof library_names / sizeof *library_names;
    for (size_t i = 0; i < names; i++) {
        void *library = dlopen(library_names[i], RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
        if (library != NULL)
            return library;
    }
    void *library = open_wheel();
    for (size_t i = 0; library == NULL && i < names; i++)
        library = dlopen(library_names[i], RTLD_NOW | RTLD_LOCAL);
    return library;
}

/* 0 when the library is not there or lacks something. The library stays open: others may use it. */
static int load_library(cublaslt *lt)
{
    void *library = open_library();
    if (library == NULL)
        return 0;
#define BTX_CUBLASLT_LOAD(type, name, arguments)                                                                       \
    *(void **)(void *)&lt->name = dlsym(library, "cublasLt" #name);                                                    \
    if (lt->name == NULL)                                                                                              \
        return 0;
    BTX_CUBLASLT_FUNCTIONS(BTX_CUBLASLT_LOAD)
#undef BTX_CUBLASLT_LOAD
    return 1;
}

size_t cuda_linear_version(void)
{
    cublaslt lt;
    return load_library(&lt) ? lt.GetVersion() : 0;
}

/* ---- products -----------------------------------------------------------------------------------------------------
 */

#define WORKSPACE_BYTES ((size_t)8 << 20)
#define ROW_BUCKET 16
#define MAX_CHOICES 512

/* What an algorithm was chosen for. */
typedef struct choice_key {
    int64_t out_dim, in_dim, rows; /* rows: of a bucket, the most */
    int32_t layers, dtype, bias, accumulate;
} choice_key;

/* What describes one call. Owned. */
typedef struct call {
    lt_product *product;
    lt_layout *weight, *x, *out;
} call;

typedef struct choice {
    choice_key key;
    lt_algorithm algorithm;
    size_t workspace_bytes;
    /* The latest call, for the next to use again. */
    call made;
    int64_t rows, weight_stride;
    const float *bias;
} choice;

struct linear_state {
    cublaslt lt;
    lt_handle *handle; /* Owned. */
    void *workspace;   /* Owned, on the device. */
    choice choices[MAX_CHOICES];
    int num_choices; /* beyond MAX_CHOICES the oldest are overwritten */
};

static void destroy_call(const cublaslt *lt, call *made)
{
    if (made->product != NULL)
        lt->MatmulDescDestroy(made->product);
    if (made->weight != NULL)
        lt->MatrixLayoutDestroy(made->weight);
    if (made->x != NULL)
        lt->MatrixLayoutDestroy(made->x);
    if (made->out != NULL)
        lt->MatrixLayoutDestroy(made->out);
    memset(made, 0, sizeof *made);
}

static int make_layout(const cublaslt *lt, lt_layout **layout, int type, int64_t rows, int64_t columns, int64_t stride,
                       int32_t layers, int64_t layer_stride)
{
    int status = lt->MatrixLayoutCreate(layout, type, (uint64_t)rows, (uint64_t)columns, stride);
    if (status == LT_SUCCESS)
        status = lt->MatrixLayoutSetAttribute(*layout, LT_LAYOUT_BATCH_COUNT, &layers, sizeof layers);
    if (status == LT_SUCCESS)
        status = lt->MatrixLayoutSetAttribute(*layout, LT_LAYOUT_BATCH_STRIDE, &layer_stride, sizeof layer_stride);
    return status;
}

/* Row-major out [rows, out_dim] = x [rows, in_dim] W^T is, to a column-major library, out^T = (W^T)^T x^T. */
static int make_call(const cublaslt *lt, const choice_key *key, int64_t rows, int64_t weight_stride, const float *bias,
                     call *made)
{
    const int type = key->dtype == BTX_BF16 ? LT_R_16BF : LT_R_32F;
    const int32_t transposed = LT_TRANSPOSED, epilogue = bias != NULL ? LT_EPILOGUE_BIAS : LT_EPILOGUE_NONE;
    memset(made, 0, sizeof *made);
    int status = lt->MatmulDescCreate(&made->product, LT_COMPUTE_32F, LT_R_32F);
    if (status == LT_SUCCESS)
        status = lt->MatmulDescSetAttribute(made->product, LT_PRODUCT_TRANSA, &transposed, sizeof transposed);
    if (status == LT_SUCCESS)
        status = lt->MatmulDescSetAttribute(made->product, LT_PRODUCT_EPILOGUE, &epilogue, sizeof epilogue);
    if (status == LT_SUCCESS && bias != NULL) {
        status = lt->MatmulDescSetAttribute(made->product, LT_PRODUCT_BIAS, &bias, sizeof bias);
        if (status == LT_SUCCESS)
            status = lt->MatmulDescSetAttribute(made->product, LT_PRODUCT_BIAS_BATCH_STRIDE, &key->out_dim,
                                                sizeof key->out_dim);
    }
    if (status == LT_SUCCESS)
        status =
            make_layout(lt, &made->weight, type, key->in_dim, key->out_dim, key->in_dim, key->layers, weight_stride);
    if (status == LT_SUCCESS)
        status = make_layout(lt, &made->x, type, key->in_dim, rows, key->in_dim, key->layers, rows * key->in_dim);
    if (status == LT_SUCCESS)
        status =
            make_layout(lt, &made->out, LT_R_32F, key->out_dim, rows, key->out_dim, key->layers, rows * key->out_dim);
    return status;
}

/* Asks for the algorithm of the fullest product of the bucket. */
static int choose(struct linear_state *state, const choice_key *key, int64_t weight_stride, const float *bias,
                  choice **out)
{
    const cublaslt *lt = &state->lt;
    const size_t workspace_bytes = WORKSPACE_BYTES;
    const uint32_t alignment = 16;
    lt_preference *preference = NULL;
    lt_heuristic result;
    call made;
    int found = 0;
    int status = make_call(lt, key, key->rows, weight_stride, bias, &made);
    if (status == LT_SUCCESS)
        status = lt->MatmulPreferenceCreate(&preference);
    if (status == LT_SUCCESS)
        status = lt->MatmulPreferenceSetAttribute(preference, LT_PREFERENCE_WORKSPACE_BYTES, &workspace_bytes,
                                                  sizeof workspace_bytes);
    for (int name = LT_PREFERENCE_ALIGNMENT_A; name <= LT_PREFERENCE_ALIGNMENT_D && status == LT_SUCCESS; name++)
        status = lt->MatmulPreferenceSetAttribute(preference, name, &alignment, sizeof alignment);
    if (status == LT_SUCCESS)
        status = lt->MatmulAlgoGetHeuristic(state->handle, made.product, made.weight, made.x, made.out, made.out,
                                            preference, 1, &result, &found);
    if (status == LT_SUCCESS && (found < 1 || result.status != LT_SUCCESS))
        status = LT_NOT_SUPPORTED;
    if (status == LT_SUCCESS) {
        choice *kept = &state->choices[state->num_choices++ % MAX_CHOICES];
        destroy_call(lt, &kept->made);
        kept->key = *key;
        kept->algorithm = result.algorithm;
        kept->workspace_bytes = result.workspace_bytes;
        *out = kept;
    }
    if (preference != NULL)
        lt->MatmulPreferenceDestroy(preference);
    destroy_call(lt, &made);
    return status;
}

/* Makes the kept call one of so many rows, with these weights. */
static int describe(const cublaslt *lt, choice *kept, int64_t rows, int64_t weight_stride, const float *bias)
{
    int status = LT_SUCCESS;
    if (kept->made.product == NULL || kept->rows != rows || kept->weight_stride != weight_stride) {
        destroy_call(lt, &kept->made);
        status = make_call(lt, &kept->key, rows, weight_stride, bias, &kept->made);
    }
    else if (kept->bias != bias) {
        status = lt->MatmulDescSetAttribute(kept->made.product, LT_PRODUCT_BIAS, &bias, sizeof bias);
    }
    if (status != LT_SUCCESS)
        destroy_call(lt, &kept->made);
    kept->rows = rows;
    kept->weight_stride = weight_stride;
    kept->bias = bias;
    return status;
}

static choice *find_choice(struct linear_state *state, const choice_key *key)
{
    const int count = state->num_choices < MAX_CHOICES ? state->num_choices : MAX_CHOICES;
    for (int i = 0; i < count; i++) {
        if (memcmp(&state->choices[i].key, key, sizeof *key) == 0)
            return &state->choices[i];
    }
    return NULL;
}

void cuda_linear_destroy(struct linear_state *state)
{
    if (state == NULL)
        return;
    for (int i = 0; i < state->num_choices && i < MAX_CHOICES; i++)
        destroy_call(&state->lt, &state->choices[i].made);
    if (state->handle != NULL)
        state->lt.Destroy(state->handle);
    if (state->workspace != NULL)
        cudaFree(state->workspace);
    free(state);
}

btx_status cuda_linear_create(int32_t device, struct linear_state **out, btx_error *error)
{
    struct linear_state *state = (struct linear_state *)calloc(1, sizeof *state);
    (void)device; /* the current one */
    *out = NULL;
    if (state == NULL)
        return btx_fail(error, BTX_OUT_OF_MEMORY, "out of memory for products");
    if (!load_library(&state->lt)) {
        free(state);
        return btx_fail(error, BTX_UNSUPPORTED,
                        "cuBLASLt is not to be found: import torch first, or pip install nvidia-cublas, or put "
                        "libcublasLt.so.13 on the library path");
    }
    btx_status status = BTX_OK;
    if (state->lt.Create(&state->handle) != LT_SUCCESS)
        status = btx_fail(error, BTX_DEVICE_ERROR, "cuBLASLt could not be started");
    if (status == BTX_OK && cudaMalloc(&state->workspace, WORKSPACE_BYTES) != cudaSuccess) {
        cudaGetLastError();
        status = btx_fail(error, BTX_OUT_OF_MEMORY, "out of device memory for cuBLASLt's workspace of %zu bytes",
                          WORKSPACE_BYTES);
    }
    if (status != BTX_OK) {
        cuda_linear_destroy(state);
        return status;
    }
    *out = state;
    return BTX_OK;
}

btx_status cuda_linear(const btx_pass *pass, const btx_linear *weights, const void *x, int accumulate, float *out,
                       btx_error *error)
{
    const cuda_executor *executor = executor_of(pass);
    struct linear_state *state = executor->linear;
    const int64_t rows = btx_pass_rows(pass);
    const int64_t weight_stride = (int64_t)(weights->layer_stride / element_size(weights->dtype));
    const float *bias = weights->bias != NULL ? weights->bias + pass->layer_begin * weights->out_dim : NULL;
    const float one = 1.0f, beta = accumulate ? 1.0f : 0.0f;
    if (state == NULL)
        return cuda_linear_general(pass, weights, x, accumulate, out, error);
    choice_key key;
    memset(&key, 0, sizeof key); /* padding too: keys are compared as bytes */
    key.out_dim = weights->out_dim;
    key.in_dim = operand_stride(weights->in_dim);
    key.rows = (rows + ROW_BUCKET - 1) / ROW_BUCKET * ROW_BUCKET;
    key.layers = num_layers_of(pass);
    key.dtype = weights->dtype;
    key.bias = bias != NULL;
    key.accumulate = accumulate != 0;
    choice *chosen = find_choice(state, &key);
    int status = chosen != NULL ? LT_SUCCESS : choose(state, &key, weight_stride, bias, &chosen);
    if (status == LT_SUCCESS)
        status = describe(&state->lt, chosen, rows, weight_stride, bias);
    if (status == LT_SUCCESS)
        status = state->lt.Matmul(state->handle, chosen->made.product, &one,
                                  (const char *)weights->packed + (size_t)pass->layer_begin * weights->layer_stride,
                                  chosen->made.weight, x, chosen->made.x, &beta, out, chosen->made.out, out,
                                  chosen->made.out, &chosen->algorithm, state->workspace, chosen->workspace_bytes,
                                  executor->stream);
    if (status == LT_NOT_SUPPORTED || status == LT_INVALID_VALUE)
        return cuda_linear_general(pass, weights, x, accumulate, out, error);
    if (status != LT_SUCCESS)
        return btx_fail(error, status == LT_ALLOCATION_FAILED ? BTX_OUT_OF_MEMORY : BTX_DEVICE_ERROR,
                        "cuBLASLt failed with status %d on a product of %lld rows, %lld to %lld, of %d layers", status,
                        (long long)rows, (long long)weights->in_dim, (long long)weights->out_dim, (int)key.layers);
    BTX_CUDA_CHECK("launching a product");
    return BTX_OK;
}

#endif /* BTX_EMULATE */
