/* fuzz.h - what the targets in C share: bytes to decisions, memory that ends where it should, failure.
 *
 * A target makes a call of the C API from libFuzzer's bytes. It describes memory truthfully, which is all that the API
 * asks of its callers, and is otherwise free: any shape, stride, dtype, table, number. AddressSanitizer watches the
 * memory, UndefinedBehaviorSanitizer the arithmetic, and the target itself what no sanitizer knows: that a refused call
 * wrote nothing, and an accepted one only where it may. */
#ifndef FUZZ_H
#define FUZZ_H

#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "half.h"
#include "internal.h"

#define FUZZ_REQUIRE(condition, what)                                                                                  \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, what);                                                  \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* What is left of the input; zeros behind its end, so that every prefix is an input too. */
typedef struct fuzz_bytes {
    const uint8_t *at, *end;
} fuzz_bytes;

static inline int64_t fuzz_byte(fuzz_bytes *from)
{
    return from->at < from->end ? *from->at++ : 0;
}

static inline int64_t fuzz_below(fuzz_bytes *from, int64_t limit)
{
    return fuzz_byte(from) % limit;
}

/* Small, or at an edge of some integer, or any. */
static inline int64_t fuzz_number(fuzz_bytes *from)
{
    static const int64_t edges[] = {
        INT32_MAX,
        INT32_MIN,
        INT64_MAX,
        INT64_MIN,
        (int64_t)INT32_MAX + 1,
        UINT32_MAX,
        INT64_MAX / 2,
        INT64_MAX - 63,
        (int64_t)1 << 40,
        (int64_t)1 << 60,
        (int64_t)1 << 61,
        (int64_t)1 << 62,
        -(1LL << 61),
        4096,
        BTX_MAX_TOP_K,
        BTX_MAX_TOP_K + 1,
        1 << 20,
        (1 << 20) + 1,
        INT16_MAX,
        -INT64_MAX,
        INT64_MAX / 4 + 2,
        INT64_MAX / 16,
        256,
        257,
    };
    const int64_t first = fuzz_byte(from);
    if (first < 200)
        return first - 8;
    if (first < 200 + (int64_t)(sizeof edges / sizeof *edges))
        return edges[first - 200];
    uint64_t number = 0;
    for (int i = 0; i < 8; i++)
        number = number << 8 | (uint64_t)fuzz_byte(from);
    return (int64_t)number;
}

/* Of a float field of some struct. */
static inline float fuzz_float(fuzz_bytes *from)
{
    uint32_t bits = 0;
    switch (fuzz_byte(from) % 4) {
    case 0:
        return 0.0f;
    case 1:
        return (float)fuzz_byte(from) / 64.0f;
    default:
        for (int i = 0; i < 4; i++)
            bits = bits << 8 | (uint32_t)fuzz_byte(from);
        return btx_f32_from_bits(bits);
    }
}

/* ---- tensors ---- */

enum { FUZZ_MAX_BYTES = 1 << 16 };

/* A view and the memory that it describes: as many bytes as the view can reach, not one more. */
typedef struct fuzz_tensor {
    btx_tensor view;
    char *memory, *before; /* Owned; NULL: too large to have, or empty. before: a copy. */
    size_t bytes;
} fuzz_tensor;

/* Bytes from the lowest to behind the highest element, and where the first one lies; 0 where that is too much. */
static inline int fuzz_span(const btx_tensor *view, size_t *bytes, size_t *first)
{
    __int128 low = 0, high = 0;
    const int64_t size = (int64_t)btx_dtype_size(view->dtype);
    *bytes = *first = 0;
    for (int32_t d = 0; d < view->num_dims && d < BTX_MAX_DIMS; d++) {
        if (view->shape[d] <= 0)
            return 1;
    }
    for (int32_t d = 0; d < view->num_dims && d < BTX_MAX_DIMS; d++) {
        const __int128 reach = (__int128)view->stride[d] * (view->shape[d] - 1);
        low += reach < 0 ? reach : 0;
        high += reach > 0 ? reach : 0;
        if (high - low > FUZZ_MAX_BYTES)
            return 0;
    }
    *bytes = (size_t)(high - low + 1) * (size_t)size;
    *first = (size_t)-low * (size_t)size;
    return *bytes <= FUZZ_MAX_BYTES;
}

/* Gives a view memory of its own, zeroed. 0: it describes too much. */
static inline int fuzz_back(fuzz_tensor *tensor)
{
    size_t first;
    tensor->memory = tensor->before = NULL;
    tensor->view.data = NULL;
    if (!fuzz_span(&tensor->view, &tensor->bytes, &first)) {
        tensor->bytes = 0;
        return 0;
    }
    if (tensor->bytes == 0)
        return 1;
    tensor->memory = calloc(1, tensor->bytes);
    FUZZ_REQUIRE(tensor->memory != NULL, "out of memory");
    tensor->view.data = tensor->memory + first;
    return 1;
}

static inline void fuzz_remember(fuzz_tensor *tensor)
{
    if (tensor->bytes == 0)
        return;
    tensor->before = malloc(tensor->bytes);
    FUZZ_REQUIRE(tensor->before != NULL, "out of memory");
    memcpy(tensor->before, tensor->memory, tensor->bytes);
}

static inline int fuzz_is_unchanged(const fuzz_tensor *tensor)
{
    return tensor->before == NULL || memcmp(tensor->memory, tensor->before, tensor->bytes) == 0;
}

static inline void fuzz_free(fuzz_tensor *tensor)
{
    free(tensor->memory);
    free(tensor->before);
    tensor->memory = tensor->before = NULL;
}

/* Byte of an element, from the start of the memory. */
static inline int64_t fuzz_at(const fuzz_tensor *tensor, const int64_t *index)
{
    int64_t at = (char *)tensor->view.data - tensor->memory;
    for (int32_t d = 0; d < tensor->view.num_dims; d++)
        at += index[d] * tensor->view.stride[d] * (int64_t)btx_dtype_size(tensor->view.dtype);
    return at;
}

/* Dimensions in an order of memory, gaps and directions from the input; none where it says 0. */
static inline void fuzz_lay_out(fuzz_bytes *from, btx_tensor *view)
{
    const int64_t order = fuzz_byte(from), gaps = order == 0 ? 0 : fuzz_byte(from);
    int64_t stride = 1, rest = order;
    int taken[BTX_MAX_DIMS] = {0};
    for (int32_t left = view->num_dims; left > 0; left--) {
        int32_t d = view->num_dims, nth = (int32_t)(rest % left);
        rest /= left;
        do
            d--;
        while (taken[d] || nth-- > 0);
        taken[d] = 1;
        if (gaps >> (4 + d) & 1)
            stride += 1 + d;
        view->stride[d] = gaps >> d & 1 && order >= 128 ? -stride : stride;
        stride *= view->shape[d] > 0 ? view->shape[d] : 1;
    }
}

/* One field of a descriptor becomes something else. */
static inline void fuzz_mutate(fuzz_bytes *from, btx_tensor *view)
{
    const int64_t field = fuzz_byte(from), d = field / 8 % BTX_MAX_DIMS;
    switch (field % 8) {
    case 0:
    case 1:
        view->shape[d] = fuzz_number(from);
        break;
    case 2:
    case 3:
        view->stride[d] = fuzz_number(from);
        break;
    case 4:
        view->num_dims = (int32_t)fuzz_below(from, BTX_MAX_DIMS + 1);
        break;
    case 5:
        view->dtype = (btx_dtype)fuzz_below(from, BTX_I64 + 1);
        break;
    case 6:
        view->read_only = 1;
        break;
    default:
        view->device = (btx_device){(btx_device_type)fuzz_below(from, 2), (int32_t)fuzz_number(from)};
    }
}

/* ---- values ---- */

/* A number from where it lies, the same in every layout. */
static inline uint32_t fuzz_mix(uint32_t seed, uint32_t index)
{
    uint32_t mixed = (seed + 1) * 2654435761u ^ (index + 1) * 2246822519u;
    mixed ^= mixed >> 15;
    mixed *= 2654435769u;
    return mixed ^ mixed >> 13;
}

/* Element in [-2, 2); of strange ones every sixteenth of any bits. */
static inline void fuzz_store(const btx_tensor *view, char *to, uint32_t mixed, int strange)
{
    const float value = (float)(mixed >> 8) * 0x1p-22f - 2.0f;
    const int any = strange && mixed % 16 == 3;
    uint32_t single = any ? mixed * 40503u : btx_f32_bits(value);
    uint16_t half = (uint16_t)(any                       ? mixed >> 11
                               : view->dtype == BTX_BF16 ? btx_f32_to_bf16(value)
                                                         : btx_f32_to_f16(value));
    int64_t whole = any ? (int64_t)mixed - INT32_MAX : (int64_t)(mixed % 8);
    switch (view->dtype) {
    case BTX_F32:
        memcpy(to, &single, 4);
        break;
    case BTX_I32:
        memcpy(to, &whole, 4);
        break;
    case BTX_I64:
        memcpy(to, &whole, 8);
        break;
    default:
        memcpy(to, &half, 2);
    }
}

/* Every element of a view that has memory of its own. */
static inline void fuzz_fill(const fuzz_tensor *tensor, uint32_t seed, int strange)
{
    const btx_tensor *view = &tensor->view;
    int64_t index[BTX_MAX_DIMS] = {0}, count = tensor->bytes > 0;
    for (int32_t d = 0; d < view->num_dims; d++)
        count *= view->shape[d] > FUZZ_MAX_BYTES ? FUZZ_MAX_BYTES : view->shape[d]; /* stride 0, if so */
    for (int64_t i = 0; i < count && i < FUZZ_MAX_BYTES; i++) {
        fuzz_store(view, tensor->memory + fuzz_at(tensor, index), fuzz_mix(seed, (uint32_t)i), strange);
        for (int32_t d = view->num_dims - 1; d >= 0 && ++index[d] >= view->shape[d]; d--)
            index[d] = 0;
    }
}

/* ---- backends ---- */

/* One of this machine's that work on the host's memory, and a workspace of it, which stays. */
static inline const btx_backend *fuzz_backend(fuzz_bytes *from, btx_workspace **workspace)
{
    static btx_workspace *workspaces[16][2];
    const btx_backend *found[16];
    int32_t count, num_found = 0;
    const btx_backend *const *all = btx_backends(&count);
    for (int32_t i = 0; i < count && num_found < 16; i++) {
        if (all[i]->device_type == BTX_CPU && all[i]->available())
            found[num_found++] = all[i];
    }
    const int64_t choice = fuzz_byte(from), chosen = choice % num_found, threads = choice >= 224;
    btx_error error = {{0}};
    if (workspaces[chosen][threads] == NULL)
        FUZZ_REQUIRE(btx_workspace_create(found[chosen], 0, threads ? 2 : 1, &workspaces[chosen][threads], &error) ==
                         BTX_OK,
                     error.message);
    *workspace = workspaces[chosen][threads];
    return found[chosen];
}

/* A status that may be, with a sentence where it is no success. */
static inline void fuzz_check_status(btx_status status, const btx_error *error)
{
    FUZZ_REQUIRE(status == BTX_OK || status == BTX_INVALID_ARGUMENT || status == BTX_UNSUPPORTED ||
                     status == BTX_OUT_OF_MEMORY,
                 "a status that only devices give");
    const void *end = memchr(error->message, 0, sizeof error->message);
    FUZZ_REQUIRE(end != NULL, "the sentence has no end");
    FUZZ_REQUIRE(status == BTX_OK || error->message[0] != 0, "no sentence says what is wrong");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif /* FUZZ_H */
