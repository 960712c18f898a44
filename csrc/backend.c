/* backend.c - the backends compiled in, and the check of any a caller brings along. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/cpu/cpu.h"
#ifdef BTX_WITH_CUDA
#include "../kernels/cuda/cuda.h"
#endif
#include "internal.h"

/* Best first. */
static const btx_backend *const backends[] = {
#if defined(__x86_64__)
    &btx_cpu_backend_avx512_bf16,
    &btx_cpu_backend_avx512,
    &btx_cpu_backend_avx2,
#elif defined(__aarch64__)
    &btx_cpu_backend_neon,
#endif
    &btx_cpu_backend_scalar,
#ifdef BTX_WITH_CUDA
    &btx_cuda_backend,
#endif
};

#define NUM_BACKENDS ((int32_t)(sizeof backends / sizeof *backends))

const btx_backend *const *btx_backends(int32_t *count)
{
    *count = NUM_BACKENDS;
    return backends;
}

void btx_backend_format(const btx_backend *backend, int32_t device_index, char *out, size_t size)
{
    if (backend->variant[0] != '\0')
        snprintf(out, size, "%s:%s", backend->name, backend->variant);
    else
        snprintf(out, size, "%s:%d", backend->name, (int)device_index);
}

/* What there is, as a sentence lists it: "cpu:avx2, cpu:scalar, cuda". */
static void list_available(char *out, size_t size)
{
    size_t used = 0;
    out[0] = '\0';
    for (int32_t i = 0; i < NUM_BACKENDS && used < size; i++) {
        const btx_backend *backend = backends[i];
        if (backend->available())
            used += (size_t)snprintf(out + used, size - used, "%s%s%s%s", used ? ", " : "", backend->name,
                                     backend->variant[0] ? ":" : "", backend->variant);
    }
}

/* A device's number, or -1. */
static int32_t parse_index(const char *text)
{
    char *end = NULL;
    if (text[0] < '0' || text[0] > '9')
        return -1;
    long value = strtol(text, &end, 10);
    return *end == '\0' && value <= 4096 ? (int32_t)value : -1;
}

btx_status btx_backend_find(const char *name, const btx_backend **backend, int32_t *device_index, btx_error *error)
{
    const char *colon = strchr(name, ':');
    size_t length = colon != NULL ? (size_t)(colon - name) : strlen(name);
    const char *variant = colon != NULL ? colon + 1 : NULL;
    char known[192];
    *backend = NULL;
    *device_index = 0;
    for (int32_t i = 0; i < NUM_BACKENDS; i++) {
        const btx_backend *candidate = backends[i];
        if (strlen(candidate->name) != length || strncmp(candidate->name, name, length) != 0 || !candidate->available())
            continue;
        if (variant != NULL && candidate->variant[0] == '\0') {
            *device_index = parse_index(variant);
            if (*device_index < 0)
                return btx_fail(error, BTX_INVALID_ARGUMENT, "'%.32s' is no number of a device; write '%s:0'", variant,
                                candidate->name);
        }
        else if (variant != NULL && strcmp(variant, candidate->variant) != 0) {
            continue;
        }
        *backend = candidate;
        return BTX_OK;
    }
    list_available(known, sizeof known);
    return btx_fail(error, BTX_UNSUPPORTED, "backend '%.64s' is not available here; there is %s", name, known);
}

btx_status btx_backend_check(const btx_backend *backend, btx_error *error)
{
    if (backend == NULL)
        return btx_fail(error, BTX_INVALID_ARGUMENT, "no backend was given; btx_backend_find returns one");
    if (backend->abi_version != BTX_ABI_VERSION || backend->struct_size != sizeof(btx_backend))
        return btx_fail(error, BTX_UNSUPPORTED, "the backend has ABI version %u; this library has %u: rebuild it",
                        (unsigned)backend->abi_version, BTX_ABI_VERSION);
    if (!backend->available())
        return btx_fail(error, BTX_UNSUPPORTED, "backend '%s%s%s' cannot run on this machine", backend->name,
                        backend->variant[0] ? ":" : "", backend->variant);
    return BTX_OK;
}
