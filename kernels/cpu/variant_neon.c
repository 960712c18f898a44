/* variant_neon.c - the operations on NEON, which every aarch64 has: no target to raise, nothing to ask. */
#include "cpu.h"

#if defined(__aarch64__)
#define BTX_VARIANT neon
#define BTX_VL 4

static int btx_cpu_available(void)
{
    return 1;
}

#include "variant.h"
#endif
