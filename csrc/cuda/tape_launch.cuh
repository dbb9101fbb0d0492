// The tape kernel's __global__ function and its launch, for one operand type (tape_bf16_launch.cu, tape_fp16_launch.cu). Torch-free: nvcc checks it anywhere.
#pragma once
#include <cuda_runtime.h>

#include "interpreter.cuh"
#include "launch.h"

namespace resens::cuda {

template <class T, int IMAGES, int WIDTH> __global__ void __launch_bounds__(kThreads, 1) tape_kernel(const __grid_constant__ Arguments arguments) {
  // Two images, or a wide one, need the shared memory of sm_90 and sm_100; elsewhere the body is left out, so that it costs no compile time. best_images() never
  // picks it there, and a mistake would stop the kernel rather than leave the tallies at zero.
#if __CUDA_ARCH__ / 100 == 9 || __CUDA_ARCH__ / 100 == 10
  interpret<T, IMAGES, WIDTH>(arguments);
#else
  if constexpr (IMAGES == 1 && WIDTH == 16) interpret<T, IMAGES, WIDTH>(arguments);
  else asm volatile("trap;");
#endif
}
template <class T, int IMAGES, int WIDTH> int launch_variant(const Arguments& arguments, int ctas, void* stream) {
  auto kernel = tape_kernel<T, IMAGES, WIDTH>;
  cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes(IMAGES, WIDTH));
  if (e != cudaSuccess) return static_cast<int>(e);
  kernel<<<ctas, kThreads, shared_bytes(IMAGES, WIDTH), static_cast<cudaStream_t>(stream)>>>(arguments);
  return static_cast<int>(cudaGetLastError());
}
template <class T> int launch_tape(const Arguments& arguments, int images, int width, int ctas, void* stream) {
  if (width == 32) return launch_variant<T, 1, 32>(arguments, ctas, stream);
  return images == 2 ? launch_variant<T, 2, 16>(arguments, ctas, stream) : launch_variant<T, 1, 16>(arguments, ctas, stream);
}
// Images per CTA on the current device: what the code that will run was compiled for (ptxVersion, also where the driver compiles it) and
// whether shared memory suffices; 0 when no variant can run.
template <class T> int best_images_of(int width, int shared_limit, int* error) {
  cudaFuncAttributes attributes;
  *error = static_cast<int>(cudaFuncGetAttributes(&attributes, tape_kernel<T, 2, 16>));
  if (*error) {
    cudaGetLastError();
    return 0;
  }
  int generation = attributes.ptxVersion / 10;
  bool large = generation == 9 || generation == 10;
  if (width == 32) return large && shared_limit >= shared_bytes(1, 32) ? 1 : 0;
  if (large && shared_limit >= shared_bytes(2, 16)) return 2;
  return shared_limit >= shared_bytes(1, 16) ? 1 : 0;
}
}  // namespace resens::cuda
