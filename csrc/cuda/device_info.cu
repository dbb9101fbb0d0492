// Lists the CUDA devices with the numbers that decide which kernel variant fits.
#include <cuda_runtime.h>

#include "cuda/device_info.h"

namespace resens::cuda {
namespace {

std::string explain(cudaError_t error) { return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error); }

}  // namespace

std::string list_devices(std::vector<Device>& devices) noexcept {
  try {
    devices.clear();
    int count = 0;
    if (const cudaError_t error = cudaGetDeviceCount(&count); error != cudaSuccess) {
      cudaGetLastError();  // or the next kernel launch would report this error as its own
      return explain(error);
    }
    if (count == 0) return "the driver lists no device";
    for (int i = 0; i < count; ++i) {
      cudaDeviceProp found;
      if (const cudaError_t error = cudaGetDeviceProperties(&found, i); error != cudaSuccess) {
        cudaGetLastError();
        devices.clear();
        return explain(error);
      }
      devices.push_back({found.name, found.major, found.minor, found.multiProcessorCount, static_cast<int>(found.sharedMemPerBlockOptin),
                         static_cast<int>(found.sharedMemPerMultiprocessor), found.l2CacheSize});
    }
    return "";
  } catch (...) {  // std::bad_alloc at most
    return "out of memory while listing devices";
  }
}

}  // namespace resens::cuda
