/* variant_scalar.c - the operations in portable C11, for any machine. */
#include "cpu.h"

#define BTX_VARIANT scalar
#define BTX_VL 1

static int btx_cpu_available(void)
{
    return 1;
}

#include "variant.h"
