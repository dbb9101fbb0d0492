// Binds the CPU engine's gradients: resens_fast::path_gradients (CPU) and resens_fast::cpu_pack_transposed.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops_cpu.h"

namespace {

using namespace resens::cpu;

// The transpose of a network for one order's last block (-1: of none); where weights lie does not depend on it.
Network transposed_of(const Network& network, const std::string& isa) {
  return transpose(network, kernels_named(isa.c_str()), -1);
}

// As cpu_pack, for path_gradients: float32 only.
at::Tensor cpu_pack_transposed(const at::Tensor& layout, const at::Tensor& raw, std::string isa) {
  return with_python_errors([&] {
    check(raw, at::kFloat, "raw");
    const auto network = network_of(layout, isa, false), transposed = transposed_of(network, isa);
    at::Tensor packed = at::zeros({transposed.packed_bytes}, at::kByte);
    pack_transposed(network, transposed, kernels_named(isa.c_str()), raw.const_data_ptr<float>(), raw.numel(),
                                 reinterpret_cast<char*>(packed.mutable_data_ptr()));
    return packed;
  });
}

// images [B, C, H, W] float32, labels [B] int64, packed and transposed from cpu_pack (float32) and cpu_pack_transposed, order
// [blocks] int64 (the forward's), tape [T, 2] int32 and gates [T] float32 of a gradient plan, shape: that of the first block's
// input (C, H, W) when the gradients themselves are wanted, else empty; control as for eval.
// -> norms [words, B] float64, gradients [words, B, C, H, W] float32 (or empty). What a cancelled call did not reach is NaN.
std::tuple<at::Tensor, at::Tensor> path_gradients_cpu(const at::Tensor& images, const at::Tensor& labels, const at::Tensor& layout, const at::Tensor& packed,
                                                      const at::Tensor& transposed, std::string isa, const at::Tensor& order, const at::Tensor& tape,
                                                      const at::Tensor& gates, int64_t words, int64_t threads, int64_t tile, at::IntArrayRef shape,
                                                      const at::Tensor& control) {
  return with_python_errors([&] {
    const auto network = network_of(layout, isa, false);
    check_images(network, images);
    check(labels, at::kLong, "labels");
    check(packed, at::kByte, "packed");
    check(transposed, at::kByte, "transposed");
    check(order, at::kLong, "order");
    check_tape(tape, gates);
    check(control, at::kLong, "control");
    TORCH_CHECK_VALUE(labels.numel() == images.size(0), "there are ", labels.numel(), " labels for ", images.size(0), " images");
    TORCH_CHECK_VALUE(order.numel() == static_cast<int64_t>(network.blocks.size()), "the order has ", order.numel(), " blocks, the network ", network.blocks.size());
    const auto& g = network.geometries[0];
    TORCH_CHECK_VALUE(shape.empty() || shape == at::IntArrayRef({g.channels, g.height, g.width}), "shape must be empty or that of the first block's input, ",
                      g.channels, " x ", g.height, " x ", g.width, ", not ", shape);
    const int64_t bytes = transposed_of(network, isa).packed_bytes;
    TORCH_CHECK_VALUE(packed.numel() == network.packed_bytes && transposed.numel() == bytes, "packed has ", packed.numel(), " bytes and transposed ",
                      transposed.numel(), ", not ", network.packed_bytes, " and ", bytes);
    TORCH_CHECK_VALUE(control.numel() == 3 && words >= 0, "control must be [3], not ", control.sizes(), "; and words not ", words);
    at::Tensor norms = at::full({words, images.size(0)}, NAN, at::kDouble);
    at::Tensor gradients = shape.empty() ? at::empty({0}, at::kFloat) : at::full({words, images.size(0), g.channels, g.height, g.width}, NAN, at::kFloat);
    GradientRequest r;
    r.images = images.const_data_ptr<float>();
    r.labels = labels.const_data_ptr<int64_t>();
    r.batch = images.size(0), r.words = words;
    r.order = order.const_data_ptr<int64_t>();
    r.tape = tape.const_data_ptr<int32_t>();
    r.gates = gates.const_data_ptr<float>();
    r.length = tape.size(0);
    r.threads = static_cast<int>(threads), r.tile = static_cast<int>(tile);
    r.norms = norms.mutable_data_ptr<double>();
    if (!shape.empty()) r.gradients = gradients.mutable_data_ptr<float>();
    r.control = control.mutable_data_ptr<int64_t>();
    path_gradients(network, kernels_named(isa.c_str()), reinterpret_cast<const char*>(packed.const_data_ptr()),
                                reinterpret_cast<const char*>(transposed.const_data_ptr()), r);
    return std::make_tuple(norms, gradients);
  });
}

TORCH_LIBRARY_FRAGMENT(resens_fast, m) {
  m.def("cpu_pack_transposed(Tensor layout, Tensor raw, str isa) -> Tensor");
  m.def(
      "path_gradients(Tensor images, Tensor labels, Tensor layout, Tensor packed, Tensor transposed, str isa, Tensor order, Tensor tape, Tensor gates, "
      "int words, int threads, int tile, int[] shape, Tensor(a!) control) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(resens_fast, CPU, m) {
  m.impl("cpu_pack_transposed", &cpu_pack_transposed);
  m.impl("path_gradients", &path_gradients_cpu);
}

}  // namespace
