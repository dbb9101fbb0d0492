// The tape kernel's __global__ function and its launch, for one operand type (tape_bf16_launch.cu, tape_fp16_launch.cu). Torch-free: nvcc checks it anywhere.
#pragma once
#include <cuda_runtime.h>

#include "interpreter.cuh"
#include "launch.h"

namespace resens::cuda {

template <class T, int IMAGES> __global__ void __launch_bounds__(kThreads, 1) tape_kernel(const __grid_constant__ Arguments arguments) {
  // Two images need the shared memory of sm_90 and sm_100; elsewhere the body is left out, so that it costs no compile time.
#if __CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000 || __CUDA_ARCH__ == 1030
  interpret<T, IMAGES>(arguments);
#else
  if constexpr (IMAGES == 1) interpret<T, IMAGES>(arguments);
#endif
}
template <class T, int IMAGES> int launch_variant(const Arguments& arguments, int ctas, void* stream) {
  auto kernel = tape_kernel<T, IMAGES>;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(IMAGES));
  if (e != cudaSuccess) return static_cast<int>(e);
  kernel<<<ctas, kThreads, shared_bytes(IMAGES), static_cast<cudaStream_t>(stream)>>>(arguments);
  return static_cast<int>(cudaGetLastError());
}
template <class T> int launch_tape(const Arguments& arguments, int images, int ctas, void* stream) {
  return images == 2 ? launch_variant<T, 2>(arguments, ctas, stream) : launch_variant<T, 1>(arguments, ctas, stream);
}
}  // namespace resens::cuda
