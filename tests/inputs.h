/* inputs.h - what fault.c and device.c compute with: the same numbers in every run. */
#ifndef BTX_TESTS_INPUTS_H
#define BTX_TESTS_INPUTS_H

#include "btx.h"

/* out [count], uniform in [-scale, scale). */
static void fill(float *out, size_t count, float scale)
{
    static uint32_t state = 1;
    for (size_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        out[i] = scale * ((float)(state >> 8) * 0x1p-23f - 1.0f);
    }
}

/* weights [num_layers * BTX_NUM_WEIGHTS] of a Processor, one after the other in data, uniform in [-scale, scale). */
static void fill_weights(const btx_config *config, btx_tensor *weights, float *data, float scale)
{
    for (int32_t i = 0; i < config->num_layers * BTX_NUM_WEIGHTS; i++) {
        int64_t shape[2] = {1, 1};
        const int32_t num_dims = btx_weight_shape(config, (btx_weight)(i % BTX_NUM_WEIGHTS), shape);
        weights[i] = btx_tensor_contiguous(data, BTX_F32, num_dims, shape);
        fill(data, (size_t)(shape[0] * shape[1]), scale);
        data += shape[0] * shape[1];
    }
}

#endif
