/* rms_norm.c - x / sqrt(mean(x^2) + eps) * weight, row by row. */
#include <math.h>

#include "btx.h"
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

static btx_status btx_cpu_rms_norm(const btx_pass *pass, const float *x, int64_t rows, int64_t dim, const float *weight,
                                   float eps, float *out, btx_error *error)
{
    (void)error;
    for (int32_t layer = pass->layer_begin; layer < pass->layer_end; layer++) {
        const float *layer_weight = weight + layer * dim;
        for (int64_t row = 0; row < rows; row++, x += dim, out += dim) {
            vf scale = vf_set1(1.0f / sqrtf(norm_sum_squares(x, dim) / (float)dim + eps));
            int64_t i = 0;
            for (; i + BTX_VL <= dim; i += BTX_VL)
                vf_store(out + i, vf_mul(vf_mul(vf_load(x + i), scale), vf_load(layer_weight + i)));
            int tail = (int)(dim - i);
            vf_store_n(out + i, vf_mul(vf_mul(vf_load_n(x + i, tail), scale), vf_load_n(layer_weight + i, tail)), tail);
        }
    }
    return BTX_OK;
}
