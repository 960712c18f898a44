/* rms_norm.c - x / sqrt(mean(x^2) + eps) * weight, row by row, as the left side of a product. */
#include <math.h>

#include "btx.h"
#include "operand.h"
#include "simd.h"

#define BTX_NORM_SUMS (BTX_VL == 1 ? 16 : 4) /* running sums, so that additions overlap and errors stay small */

static float norm_sum_squares(const float *x, int64_t dim)
{
    vf sum[BTX_NORM_SUMS];
    int64_t i = 0;
    for (int s = 0; s < BTX_NORM_SUMS; s++)
        sum[s] = vf_zero();
    for (; i + BTX_NORM_SUMS * BTX_VL <= dim; i += BTX_NORM_SUMS * BTX_VL) {
        for (int s = 0; s < BTX_NORM_SUMS; s++) {
            vf value = vf_load(x + i + s * BTX_VL);
            sum[s] = vf_fma(value, value, sum[s]);
        }
    }
    for (int s = 0; i < dim; s++, i += BTX_VL) {
        vf value = vf_load_n(x + i, (int)(dim - i < BTX_VL ? dim - i : BTX_VL));
        sum[s] = vf_fma(value, value, sum[s]);
    }
    for (int width = BTX_NORM_SUMS / 2; width > 0; width /= 2) {
        for (int s = 0; s < width; s++)
            sum[s] = vf_add(sum[s], sum[s + width]);
    }
    return vf_reduce_add(sum[0]);
}

/* One row, x [dim], as operand. */
static void norm_row(const float *x, int64_t dim, const float *weight, float eps, btx_dtype dtype, void *out)
{
    const float squares = norm_sum_squares(x, dim);
    /* Squares beyond float32 would make the row zero. So it is refused, like one that holds NaN. */
    const vf scale = vf_set1(squares < INFINITY ? 1.0f / sqrtf(squares / (float)dim + eps) : NAN);
    int64_t k = 0;
    for (; k + BTX_VL <= dim; k += BTX_VL)
        operand_store(out, dtype, k, vf_mul(vf_mul(vf_load(x + k), scale), vf_load(weight + k)));
    const int tail = (int)(dim - k);
    operand_store_n(out, dtype, k, vf_mul(vf_mul(vf_load_n(x + k, tail), scale), vf_load_n(weight + k, tail)), tail);
    operand_end(out, dtype, dim);
}

static btx_status btx_cpu_rms_norm(const btx_pass *pass, const float *x, int64_t dim, const float *weight, float eps,
                                   btx_dtype dtype, void *out, btx_error *error)
{
    const int64_t rows = btx_pass_rows(pass), stride = operand_stride(dim, dtype);
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        for (int64_t row = 0; row < rows; row++, x += dim, out = (char *)out + stride)
            norm_row(x, dim, weight + layer * dim, eps, dtype, out);
    }
    return BTX_OK;
}
