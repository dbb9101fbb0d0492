// Launch of the stem kernel.
#include <cuda_runtime.h>

#include "launch.h"
#include "stem.cuh"

namespace resens::cuda {
__global__ void __launch_bounds__(256) stem_kernel(const __grid_constant__ StemArguments arguments) { run_stem(arguments); }

int launch_stem(const StemArguments& arguments, int ctas, void* stream) {
  stem_kernel<<<ctas, 256, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  return static_cast<int>(cudaGetLastError());
}
}  // namespace resens::cuda
