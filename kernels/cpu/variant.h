/* variant.h - the operations compiled for one instruction set, and their table. A variant file sets
 *
 *     BTX_VARIANT         avx2, ...: names the backend btx_cpu_backend_<variant>
 *     BTX_VL              f32 lanes of a vector, see simd.h
 *     BTX_BF16_DOT        defined where vdpbf16ps may be used
 *     btx_cpu_available   1 when this machine and its system can run the variant; compiled without it
 *
 * and then includes this file once. */
#ifndef BTX_VARIANT_H
#define BTX_VARIANT_H

#include "cpu.h"

#include "attention_mass.c"
#include "store_mass.c"
#include "top_k.c"
#include "round.c"
#include "rms_norm.c"
#include "gather_kv.c"
#include "linear.c"
#include "attention.c"
#include "stage_kv.c"
#include "write_kv.c"
#include "capture_queries.c"

/* One operation runs at a time on a lane, so they share one scratch. */
static size_t btx_cpu_scratch_bytes(const btx_plan *plan, int32_t max_layers, int64_t max_rows, int64_t max_dim)
{
    (void)max_layers; /* one after the other */
    size_t selection = btx_cpu_selection_scratch_bytes(plan);
    size_t attention = max_dim > 0 ? btx_cpu_attention_scratch_bytes(max_rows, max_dim) : 0;
    return attention > selection ? attention : selection;
}

#define BTX_JOIN_(a, b) a##b
#define BTX_JOIN(a, b) BTX_JOIN_(a, b)
#define BTX_STRING_(a) #a
#define BTX_STRING(a) BTX_STRING_(a)

const btx_backend BTX_JOIN(btx_cpu_backend_, BTX_VARIANT) = {
    .abi_version = BTX_ABI_VERSION,
    .struct_size = sizeof(btx_backend),
    .name = "cpu",
    .variant = BTX_STRING(BTX_VARIANT),
    .device_type = BTX_CPU,
    .layers_per_pass = 1,
    .rows_per_pass = 128, /* enough for the products, few enough for their rows to stay in the second-level cache */
    .keeps_rows = 1,
    .available = btx_cpu_available,
    .allocate = btx_cpu_allocate,
    .release = btx_cpu_release,
    .executor_create = btx_cpu_executor_create,
    .executor_destroy = btx_cpu_executor_destroy,
    .executor_run = btx_cpu_executor_run,
    .packed_bytes = btx_cpu_packed_bytes,
    .pack = btx_cpu_pack,
    .operand_bytes = btx_cpu_operand_bytes,
    .scratch_bytes = btx_cpu_scratch_bytes,
    .attention_mass = btx_cpu_attention_mass,
    .store_mass = btx_cpu_store_mass,
    .top_k = btx_cpu_top_k,
    .gather_kv = btx_cpu_gather_kv,
    .round = btx_cpu_round,
    .rms_norm = btx_cpu_rms_norm,
    .linear = btx_cpu_linear,
    .linear_swiglu = btx_cpu_linear_swiglu,
    .attention = btx_cpu_attention,
    .stage_kv = btx_cpu_stage_kv,
    .write_kv = btx_cpu_write_kv,
    .capture_queries = btx_cpu_capture_queries,
};

#endif /* BTX_VARIANT_H */
