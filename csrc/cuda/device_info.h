// What the CUDA runtime says about the devices of this machine; no torch, so that it works before torch touches a GPU.
#pragma once

#include <string>
#include <vector>

namespace resens::cuda {

struct Device {
  std::string name;
  int major = 0, minor = 0;        // compute capability
  int multiprocessors = 0;
  int shared_bytes_per_block = 0;  // with opt-in
  int shared_bytes_per_sm = 0;
  int l2_bytes = 0;
};

// Fills `devices` and returns an empty string, or says why there are none (no driver, no device). Never throws, and
// creates no context on any device.
std::string list_devices(std::vector<Device>& devices) noexcept;

}  // namespace resens::cuda
