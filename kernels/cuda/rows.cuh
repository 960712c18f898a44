/* rows.cuh - one block works on one row: elements of a KV-token, sums over a row, operands. */
#ifndef BTX_ROWS_CUH
#define BTX_ROWS_CUH

#include "plan.cuh"

#define BTX_ROW_THREADS 128

/* A KV-token's elements are visited in pieces of up to eight: piece -> view, head, first element of the head. */
typedef struct row_piece {
    int32_t is_value, head, first, count;
    int64_t column; /* in the KV-token */
} row_piece;

__device__ static inline int32_t pieces_per_head(const device_plan &plan)
{
    return (plan.head_dim + 7) / 8;
}

__device__ static inline int32_t pieces_per_row(const device_plan &plan)
{
    return 2 * plan.num_kv_heads * pieces_per_head(plan);
}

__device__ static inline row_piece find_piece(const device_plan &plan, int32_t index)
{
    const int32_t per_head = pieces_per_head(plan), head = index / per_head;
    row_piece piece;
    piece.is_value = head >= plan.num_kv_heads;
    piece.head = piece.is_value ? head - plan.num_kv_heads : head;
    piece.first = (index - head * per_head) * 8;
    piece.count = min(8, plan.head_dim - piece.first);
    piece.column = (int64_t)head * plan.head_dim + piece.first;
    return piece;
}

/* Sixteen bytes at once where rows allow it. */
__device__ static inline void load_piece(const float *from, int64_t stride, int vector, int32_t count, float (&x)[8])
{
    if (vector) {
        const float4 low = *(const float4 *)(const void *)from, high = *(const float4 *)(const void *)(from + 4);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = i < count ? from[i * stride] : 0.0f;
}

template <typename T>
__device__ static inline void load_piece(const T *from, int64_t stride, int vector, int32_t count, float (&x)[8])
{
    if (vector) {
        union {
            uint4 words;
            T elements[8];
        } piece;
        piece.words = *(const uint4 *)(const void *)from;
#pragma unroll
        for (int i = 0; i < 8; i++)
            x[i] = to_f32(piece.elements[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        x[i] = i < count ? to_f32(from[i * stride]) : 0.0f;
}

/* The way back. */
template <typename T>
__device__ static inline void store_piece(T *to, int64_t stride, int vector, int32_t count, const T (&x)[8])
{
    constexpr int LANES = 16 / sizeof(T);
    if (vector) {
        union {
            uint4 words[8 / LANES];
            T elements[8];
        } piece;
        for (int i = 0; i < 8; i++)
            piece.elements[i] = x[i];
        for (int i = 0; i < 8 / LANES; i++)
            ((uint4 *)(void *)to)[i] = piece.words[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < count)
            to[i * stride] = x[i];
    }
}

/* One piece of a cached row whose keys and values begin at these elements. */
template <typename T>
__device__ static inline void load_cached(const device_layer &layer, const row_piece &piece, int64_t key_offset,
                                          int64_t value_offset, float (&x)[8])
{
    const device_view &view = piece.is_value ? layer.values : layer.keys;
    const int64_t offset = (piece.is_value ? value_offset : key_offset) + piece.head * view.stride[2];
    load_piece((const T *)view.data + offset + piece.first * view.stride[3], view.stride[3], view.vector, piece.count,
               x);
}

/* Sum over the block, the same in every thread; storage [BTX_ROW_THREADS / BTX_WARP] of shared memory, free again
 * after the next barrier. */
__device__ static inline float block_sum(float x, float *storage)
{
    x = warp_sum(x);
    if (threadIdx.x % BTX_WARP == 0)
        storage[threadIdx.x / BTX_WARP] = x;
    __syncthreads();
    float sum = 0.0f;
    for (int i = 0; i < BTX_ROW_THREADS / BTX_WARP; i++)
        sum += storage[i];
    return sum;
}

/* What a row is normed by. Squares beyond float32 would make it zero: so it is refused, like one that holds NaN. */
__device__ static inline float norm_scale(float squares, float dim, float eps)
{
    return squares < INFINITY ? 1.0f / sqrtf(squares / dim + eps) : NAN;
}

/* Cosines and sines [head_dim / 2] of one token position, as the backbone's: the angle is rounded to f32 once. */
__device__ static inline void fill_rotation(const device_plan &plan, int32_t position, float *cosines, float *sines)
{
    for (int32_t i = threadIdx.x; i < plan.head_dim / 2; i += BTX_ROW_THREADS) {
        const float angle = (float)position * plan.rope_inv_freq[i];
        cosines[i] = cosf(angle);
        sines[i] = sinf(angle);
    }
}

#endif /* BTX_ROWS_CUH */
