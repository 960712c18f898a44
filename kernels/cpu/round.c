/* round.c - rows as the left side of a product. */
#include "operand.h"

static btx_status btx_cpu_round(const btx_pass *pass, const float *x, int64_t dim, btx_dtype dtype, void *out,
                                btx_error *error)
{
    int64_t rows = (pass->layer_end - pass->layer_begin) * btx_pass_rows(pass);
    (void)error;
    for (int64_t row = 0; row < rows; row++, x += dim, out = (char *)out + operand_stride(dim, dtype)) {
        int64_t k = 0;
        for (; k + BTX_VL <= dim; k += BTX_VL)
            operand_store(out, dtype, k, vf_load(x + k));
        operand_store_n(out, dtype, k, vf_load_n(x + k, (int)(dim - k)), (int)(dim - k));
        operand_end(out, dtype, dim);
    }
    return BTX_OK;
}
