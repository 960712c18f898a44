/* cublaslt.h - the part of cuBLASLt's binary interface that is used, so that neither its headers nor the library are
 * needed to build. Numbers and signatures: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api; they are the
 * same in versions 12 and 13. */
#ifndef BTX_CUBLASLT_H
#define BTX_CUBLASLT_H

#include <stddef.h>
#include <stdint.h>

typedef struct lt_handle lt_handle;
typedef struct lt_product lt_product;       /* cublasLtMatmulDesc_t */
typedef struct lt_layout lt_layout;         /* cublasLtMatrixLayout_t */
typedef struct lt_preference lt_preference; /* cublasLtMatmulPreference_t */

typedef struct lt_algorithm {
    uint64_t data[8];
} lt_algorithm;

typedef struct lt_heuristic {
    lt_algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
} lt_heuristic;

enum { LT_SUCCESS = 0, LT_ALLOCATION_FAILED = 3, LT_INVALID_VALUE = 7, LT_NOT_SUPPORTED = 15 };
enum { LT_R_32F = 0, LT_R_16BF = 14 };
enum { LT_COMPUTE_32F = 68 };
enum { LT_TRANSPOSED = 1 };
enum { LT_EPILOGUE_NONE = 1, LT_EPILOGUE_BIAS = 4 };
enum { LT_PRODUCT_TRANSA = 3, LT_PRODUCT_EPILOGUE = 7, LT_PRODUCT_BIAS = 8, LT_PRODUCT_BIAS_BATCH_STRIDE = 10 };
enum { LT_LAYOUT_BATCH_COUNT = 5, LT_LAYOUT_BATCH_STRIDE = 6 };
enum {
    LT_PREFERENCE_WORKSPACE_BYTES = 1,
    LT_PREFERENCE_ALIGNMENT_A = 5,
    LT_PREFERENCE_ALIGNMENT_B = 6,
    LT_PREFERENCE_ALIGNMENT_C = 7,
    LT_PREFERENCE_ALIGNMENT_D = 8
};

/* The functions, named as in the library without their prefix. Each returns a status but version. */
#define BTX_CUBLASLT_FUNCTIONS(F)                                                                                      \
    F(size_t, GetVersion, (void))                                                                                      \
    F(int, Create, (lt_handle * *handle))                                                                              \
    F(int, Destroy, (lt_handle * handle))                                                                              \
    F(int, MatmulDescCreate, (lt_product * *product, int compute, int scale))                                          \
    F(int, MatmulDescDestroy, (lt_product * product))                                                                  \
    F(int, MatmulDescSetAttribute, (lt_product * product, int name, const void *value, size_t size))                   \
    F(int, MatrixLayoutCreate, (lt_layout * *layout, int type, uint64_t rows, uint64_t columns, int64_t stride))       \
    F(int, MatrixLayoutDestroy, (lt_layout * layout))                                                                  \
    F(int, MatrixLayoutSetAttribute, (lt_layout * layout, int name, const void *value, size_t size))                   \
    F(int, MatmulPreferenceCreate, (lt_preference * *preference))                                                      \
    F(int, MatmulPreferenceDestroy, (lt_preference * preference))                                                      \
    F(int, MatmulPreferenceSetAttribute, (lt_preference * preference, int name, const void *value, size_t size))       \
    F(int, MatmulAlgoGetHeuristic,                                                                                     \
      (lt_handle * handle, lt_product * product, lt_layout * a, lt_layout * b, lt_layout * c, lt_layout * d,           \
       lt_preference * preference, int wanted, lt_heuristic *results, int *found))                                     \
    F(int, Matmul,                                                                                                     \
      (lt_handle * handle, lt_product * product, const void *alpha, const void *a, lt_layout *a_layout, const void *b, \
       lt_layout *b_layout, const void *beta, const void *c, lt_layout *c_layout, void *d, lt_layout *d_layout,        \
       const lt_algorithm *algorithm, void *workspace, size_t workspace_bytes, void *stream))

typedef struct cublaslt {
#define BTX_CUBLASLT_FIELD(type, name, arguments) type(*name) arguments;
    BTX_CUBLASLT_FUNCTIONS(BTX_CUBLASLT_FIELD)
#undef BTX_CUBLASLT_FIELD
} cublaslt;

#endif /* BTX_CUBLASLT_H */
