// Binds the CPU engine: resens_fast::cpu_pack, resens_fast::eval on CPU tensors and resens_fast::cpu_isas.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <new>
#include <optional>

#include "ops_cpu.h"

namespace {

using namespace resens::cpu;  // check and its like

// layout: int32, raw: the folded float32 parameters it points into -> uint8, what eval reads.
at::Tensor cpu_pack(const at::Tensor& layout, const at::Tensor& raw, std::string isa, bool rounded) {
  return with_python_errors([&] {
    check(raw, at::kFloat, "raw");
    const auto network = network_of(layout, isa, rounded);
    at::Tensor packed = at::zeros({network.packed_bytes}, at::kByte);
    resens::cpu::pack(network, resens::cpu::kernels_named(isa.c_str()), operand(rounded), raw.const_data_ptr<float>(), raw.numel(),
                      reinterpret_cast<char*>(packed.mutable_data_ptr()));
    return packed;
  });
}

// The CPU's eval (schema: ops.cpp). program: tape [T, 2] int32 and gates [T] float32; control [3] int64: [0] set to cancel, [1] steps x images done, [2] their number.
// A cancelled call returns what was counted so far; the caller knows that it asked for that.
std::tuple<at::Tensor, at::Tensor> eval_cpu(const at::Tensor& images, const at::Tensor& labels, const at::Tensor& layout, const at::Tensor& packed,
                                            at::TensorList program, int64_t words, int64_t logits, int64_t threads, int64_t tile, std::string isa, bool rounded,
                                            const std::optional<at::Tensor>& progress) {
  return with_python_errors([&] {
    TORCH_CHECK_VALUE(program.size() == 2, "program is the tape and its gates, not ", program.size(), " tensors");
    const at::Tensor &tape = program[0], &gates = program[1];
    const at::Tensor control = progress ? *progress : at::zeros({3}, at::kLong);
    const auto network = network_of(layout, isa, rounded);
    check_images(network, images);
    check(labels, at::kLong, "labels");
    check(packed, at::kByte, "packed");
    check_tape(tape, gates);
    check(control, at::kLong, "control");
    TORCH_CHECK_VALUE(labels.numel() == images.size(0) || (logits && labels.numel() == 0), "there are ", labels.numel(), " labels for ", images.size(0), " images");
    TORCH_CHECK_VALUE(logits == 0 || logits == network.classes, "logits must be 0 or ", network.classes, ", not ", logits);
    TORCH_CHECK_VALUE(packed.numel() == network.packed_bytes && control.numel() == 3 && words >= 0, "packed has ", packed.numel(), " bytes, not ",
                      network.packed_bytes, "; or control is not [3]; or words is negative");
    at::Tensor counts = at::zeros({3, words}, at::kLong);
    at::Tensor out = logits ? at::full({words, images.size(0), network.classes}, NAN, at::kFloat) : at::empty({0}, at::kFloat);
    resens::cpu::Request r;
    r.images = images.const_data_ptr<float>();
    r.labels = labels.const_data_ptr<int64_t>();
    r.batch = images.size(0), r.words = words;
    r.tape = tape.const_data_ptr<int32_t>();
    r.gates = gates.const_data_ptr<float>();
    r.length = tape.size(0);
    r.threads = static_cast<int>(threads), r.tile = static_cast<int>(tile);
    if (labels.numel() == images.size(0)) {
      int64_t* c = counts.mutable_data_ptr<int64_t>();
      r.errors = c, r.loss = c + words, r.nonfinite = c + 2 * words;
    }
    if (logits) r.logits = out.mutable_data_ptr<float>();
    r.control = control.mutable_data_ptr<int64_t>();
    resens::cpu::evaluate(network, resens::cpu::kernels_named(isa.c_str()), reinterpret_cast<const char*>(packed.const_data_ptr()), operand(rounded), r);
    return std::make_tuple(counts, out);
  });
}

// How eval would cut `batch` images and the tape: (bytes that all threads take together, images in a tile, tiles,
// multiply-adds per image of each part of the tape).
std::tuple<int64_t, int64_t, int64_t, std::vector<double>> cpu_schedule(const at::Tensor& layout, std::string isa, bool rounded, const at::Tensor& tape,
                                                                        const at::Tensor& gates, int64_t words, int64_t batch, int64_t threads,
                                                                        int64_t tile) {
  return with_python_errors([&] {
    const auto network = network_of(layout, isa, rounded);
    check_tape(tape, gates);
    resens::cpu::Request r;
    r.batch = batch, r.words = words;
    r.tape = tape.const_data_ptr<int32_t>();
    r.gates = gates.const_data_ptr<float>();
    r.length = tape.size(0);
    r.threads = static_cast<int>(threads), r.tile = static_cast<int>(tile);
    const auto s = resens::cpu::schedule(network, resens::cpu::kernels_named(isa.c_str()), operand(rounded), r);
    return std::make_tuple(s.bytes, static_cast<int64_t>(s.tile), static_cast<int64_t>(s.tiles), s.costs);
  });
}

// The instruction sets this machine runs, best first.
std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (int i = 0; i < resens::cpu::kernel_count(); ++i) names.push_back(resens::cpu::kernels_at(i).name);
  return names;
}

// Executes `rounds` rounds of independent multiply-adds on registers and returns their floating-point operations: what
// benchmarks call the peak, when they time it.
double cpu_multiply_adds(std::string isa, int64_t rounds) {
  return with_python_errors([&] { return resens::cpu::kernels_named(isa.c_str()).multiply_adds(rounds); });
}

TORCH_LIBRARY_FRAGMENT(resens_fast, m) {
  m.def("cpu_multiply_adds(str isa, int rounds) -> float", &cpu_multiply_adds);
  m.def("cpu_isas() -> str[]", &cpu_isas);
  m.def(
      "cpu_schedule(Tensor layout, str isa, bool rounded, Tensor tape, Tensor gates, int words, int batch, int threads, int tile) "
      "-> (int, int, int, float[])",
      &cpu_schedule);
  m.def("cpu_pack(Tensor layout, Tensor raw, str isa, bool rounded) -> Tensor");
}

TORCH_LIBRARY_IMPL(resens_fast, CPU, m) {
  m.impl("cpu_pack", &cpu_pack);
  m.impl("eval", &eval_cpu);
}

}  // namespace
