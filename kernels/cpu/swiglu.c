/* swiglu.c - silu(gate) * up, silu(x) = x / (1 + exp(-x)).
 *
 * Below -88.73 exp(-x) is infinite and silu(x) is -0; the true value there is above -3e-37. */
#include <float.h>

#include "btx.h"
#include "simd.h"

static inline vf swiglu_value(vf gate, vf up)
{
    gate = vf_max(vf_set1(-FLT_MAX), gate); /* -infinity / infinity would be NaN; a NaN goes through */
    return vf_mul(vf_div(gate, vf_add(vf_set1(1.0f), vf_exp(vf_sub(vf_zero(), gate)))), up);
}

static btx_status btx_cpu_swiglu(const btx_pass *pass, const float *gate_up, int64_t rows, int64_t dim, float *out,
                                 btx_error *error)
{
    int64_t all_rows = (pass->layer_end - pass->layer_begin) * rows;
    (void)error;
    for (int64_t row = 0; row < all_rows; row++, gate_up += 2 * dim, out += dim) {
        const float *up = gate_up + dim;
        int64_t i = 0;
        for (; i + BTX_VL <= dim; i += BTX_VL)
            vf_store(out + i, swiglu_value(vf_load(gate_up + i), vf_load(up + i)));
        int tail = (int)(dim - i);
        vf_store_n(out + i, swiglu_value(vf_load_n(gate_up + i, tail), vf_load_n(up + i, tail)), tail);
    }
    return BTX_OK;
}
