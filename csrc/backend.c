/* backend.c - the backends compiled in, and the check of any a caller brings along. */
#include <stdio.h>
#include <string.h>

#include "../kernels/cpu/cpu.h"
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
};

#define NUM_BACKENDS ((int32_t)(sizeof backends / sizeof *backends))

const btx_backend *const *btx_backends(int32_t *count)
{
    *count = NUM_BACKENDS;
    return backends;
}

btx_status btx_backend_find(const char *name, const btx_backend **backend, btx_error *error)
{
    const char *colon = strchr(name, ':');
    size_t length = colon != NULL ? (size_t)(colon - name) : strlen(name);
    const char *variant = colon != NULL ? colon + 1 : NULL;
    char known[192] = "";
    *backend = NULL;
    for (int32_t i = 0; i < NUM_BACKENDS; i++) {
        const btx_backend *candidate = backends[i];
        int available = candidate->available();
        if (available) {
            size_t used = strlen(known);
            snprintf(known + used, sizeof known - used, "%s%s:%s", used ? ", " : "", candidate->name,
                     candidate->variant);
        }
        if (strlen(candidate->name) != length || strncmp(candidate->name, name, length) != 0)
            continue;
        if (variant != NULL ? strcmp(variant, candidate->variant) == 0 && available : available) {
            *backend = candidate;
            return BTX_OK;
        }
    }
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
        return btx_fail(error, BTX_UNSUPPORTED, "backend '%s:%s' cannot run on this machine", backend->name,
                        backend->variant);
    return BTX_OK;
}
