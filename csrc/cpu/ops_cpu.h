// What the bindings of the CPU engine share: checks of tensors, and C++ errors as Python's.
#pragma once
#include <ATen/core/Tensor.h>

#include <new>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "network.h"

namespace resens::cpu {

inline void check(const at::Tensor& t, at::ScalarType dtype, const char* name) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.scalar_type() == dtype && t.is_contiguous(), name, " must be a contiguous ", dtype, " tensor on the CPU, not ",
                    t.scalar_type(), " on ", t.device());
}

inline Dtype operand(bool rounded) { return rounded ? Dtype::kBFloat16 : Dtype::kFloat32; }

inline Network network_of(const at::Tensor& layout, const std::string& isa, bool rounded) {
  check(layout, at::kInt, "layout");
  return read_network(layout.const_data_ptr<int32_t>(), layout.numel(), kernels_named(isa.c_str()), operand(rounded));
}

inline void check_images(const Network& network, const at::Tensor& images) {
  check(images, at::kFloat, "images");
  TORCH_CHECK_VALUE(images.dim() == 4 && images.size(1) == network.channels && images.size(2) == network.height && images.size(3) == network.width,
                    "images must be [batch, ", network.channels, ", ", network.height, ", ", network.width, "], not ", images.sizes());
}

inline void check_tape(const at::Tensor& tape, const at::Tensor& gates) {
  check(tape, at::kInt, "tape");
  check(gates, at::kFloat, "gates");
  TORCH_CHECK_VALUE(tape.dim() == 2 && tape.size(1) == 2 && gates.numel() == tape.size(0), "the tape must be [T, 2] with T gates, not ", tape.sizes(),
                    " with ", gates.numel());
}

template <typename F>
auto with_python_errors(F&& f) {
  try {
    return f();
  } catch (const std::invalid_argument& e) {
    TORCH_CHECK_VALUE(false, e.what());
  } catch (const std::bad_alloc&) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "There is not enough memory for the states of a tile of images on every thread; use fewer threads or smaller batches.");
  }
}

}  // namespace resens::cpu
