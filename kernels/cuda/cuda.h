/* cuda.h - the CUDA backend: what backend.c lists and py_module.c describes. */
#ifndef BTX_CUDA_H
#define BTX_CUDA_H

#include "btx.h"

#ifdef __cplusplus
extern "C" {
#endif

extern const btx_backend btx_cuda_backend;

/* What "bottlenecked info" says of CUDA; empty strings where there is nothing to say. */
typedef struct btx_cuda_info {
    const char *architectures; /* compiled in: "80,86,89,90a,100f,120f" */
    int available;             /* a device that can run them is there */
    char device[256];          /* name of the first one */
    char driver[64];           /* the CUDA version it supports, "13.0" */
    char cublaslt[64];         /* version of the cuBLASLt found, "13.1.0" */
} btx_cuda_info;

void btx_cuda_describe(btx_cuda_info *info);

#ifdef __cplusplus
}
#endif

#endif /* BTX_CUDA_H */
