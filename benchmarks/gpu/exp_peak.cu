/* exp_peak.cu - the rate of ex2.approx, the exponential that the kernels use: nothing else is computed.
 *
 * Eight chains a thread hide its latency; x = 2^-x stays near 0.64. */
#include <cuda_runtime.h>

#define CHAINS 8
#define ROUNDS 512
#define THREADS 256

static __global__ void exponentials(float *out)
{
    float x[CHAINS];
    for (int i = 0; i < CHAINS; i++)
        x[i] = (float)(threadIdx.x + i) * 1e-3f;
    for (int round = 0; round < ROUNDS; round++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++)
            asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(x[i]) : "f"(-x[i]));
    float sum = 0.0f;
    for (int i = 0; i < CHAINS; i++)
        sum += x[i];
    out[blockIdx.x * THREADS + threadIdx.x] = sum;
}

/* out: blocks * 256 floats of the device. Returns the number of exponentials, or a negative CUDA error. */
extern "C" __attribute__((visibility("default"))) long long exp_peak(float *out, int blocks, void *stream)
{
    exponentials<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(out);
    cudaError_t status = cudaGetLastError();
    return status != cudaSuccess ? -(long long)status : (long long)blocks * THREADS * CHAINS * ROUNDS;
}
