// The module resens_fast._C: the planner, the build's description and the schema of resens_fast::eval, which has a kernel per device. Kernels, and
// operators of one device only, are registered in cpu/ops_cpu.cpp and cuda/ops_cuda.cpp; both are optional and found by setup.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "planner.h"
#ifdef WITH_CUDA
#include "cuda/device_info.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
using In = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Hands a vector to numpy without a copy. `shape` in elements of T.
template <typename T, typename Element>
py::array_t<T> own(std::vector<Element>&& values, std::vector<py::ssize_t> shape) {
  auto* kept = new std::vector<Element>(std::move(values));
  py::capsule owner(kept, [](void* p) { delete static_cast<std::vector<Element>*>(p); });
  return py::array_t<T>(std::move(shape), reinterpret_cast<const T*>(kept->data()), owner);
}

std::unique_ptr<resens::Trie> make_trie(In<int64_t> offsets, In<int32_t> blocks, In<float> gates, In<int32_t> positions, int32_t alphabet) {
  if (offsets.ndim() != 1 || blocks.ndim() != 1 || gates.ndim() != 1 || positions.ndim() != 1 || offsets.size() < 1) {
    throw std::invalid_argument("words are four flat arrays, the offsets with at least one entry");
  }
  if (blocks.size() != gates.size() || blocks.size() != positions.size()) {
    throw std::invalid_argument("every letter has a block, a gate and a position, but there are " + std::to_string(blocks.size()) + " blocks, " +
                                std::to_string(gates.size()) + " gates and " + std::to_string(positions.size()) + " positions");
  }
  const resens::WordsView view{offsets.data(), blocks.data(), gates.data(), positions.data(), offsets.size() - 1, blocks.size(), alphabet};
  py::gil_scoped_release release;
  return std::make_unique<resens::Trie>(view);
}

py::tuple draw_tape(const resens::Trie& trie) {
  resens::Tape tape;
  {
    py::gil_scoped_release release;
    tape = trie.tape();
  }
  const auto length = static_cast<py::ssize_t>(tape.gates.size());
  return py::make_tuple(own<int32_t>(std::move(tape.instructions), {length, 2}), own<float>(std::move(tape.gates), {length}), tape.slots);
}

py::tuple draw_levels(const resens::Trie& trie, int64_t budget) {
  resens::Levels levels;
  {
    py::gil_scoped_release release;
    levels = trie.levels(budget);
  }
  const auto length = static_cast<py::ssize_t>(levels.gates.size());
  return py::make_tuple(own<int32_t>(std::move(levels.steps), {length, 5}), own<float>(std::move(levels.gates), {length}), levels.buffers, levels.levels);
}

py::dict build_info() {
  py::dict info;
  py::list isas;
#ifdef RESENS_AVX2
  isas.append("avx2");
#endif
#ifdef RESENS_AVX512
  isas.append("avx512");
#endif
#ifdef RESENS_AVX512BF16
  isas.append("avx512bf16");
#endif
  info["isas"] = isas;
  info["compiler"] = __VERSION__;
#ifdef WITH_CUDA
  info["cuda"] = true;
#else
  info["cuda"] = false;
#endif
  return info;
}

py::tuple cuda_devices() {
  py::list found;
#ifdef WITH_CUDA
  std::vector<resens::cuda::Device> devices;
  const std::string why = resens::cuda::list_devices(devices);
  for (const auto& d : devices) {
    py::dict row;
    row["name"] = d.name;
    row["capability"] = py::make_tuple(d.major, d.minor);
    row["multiprocessors"] = d.multiprocessors;
    row["shared_bytes_per_block"] = d.shared_bytes_per_block;
    row["shared_bytes_per_sm"] = d.shared_bytes_per_sm;
    row["l2_bytes"] = d.l2_bytes;
    found.append(row);
  }
#else
  const std::string why = "this build has no CUDA part";
#endif
  return py::make_tuple(found, why);
}

// Every word of a plan on images: images [B, C, H, W] float32 and labels [B] int64 (or none: no counts) -> counts [3, words] int64 (errors, loss in 2^-24,
// non-finite) and logits [words, B, logits] float32; logits: the number of classes, or 0 when they stay inside. The dispatcher takes the images' device.
// layout int32 (on the CPU) and packed uint8 (on the device): the network as that device's kernels read it. program: the plan likewise: on the CPU its tape
// and gates, on CUDA what cuda_program gave, or some of its parts (words of others count zero, so that launches add up).
// threads: of a CPU, or CTAs; tile: images at a time of each (0: chosen, CPU only).
// Only on a CPU: isa; rounded = False; control, int64 [3], to cancel a running call and to follow it. A CUDA launch can do neither, so it is kept short.
TORCH_LIBRARY_FRAGMENT(resens_fast, m) {
  m.def(
      "eval(Tensor images, Tensor labels, Tensor layout, Tensor packed, Tensor[] program, int words, int logits, int threads, int tile, str isa='', "
      "bool rounded=True, Tensor(a!)? control=None) -> (Tensor counts, Tensor logits)");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of resens_fast; see resens_fast.extension.";
  py::class_<resens::Trie>(m, "Trie")
      .def(py::init(&make_trie), py::arg("offsets"), py::arg("blocks"), py::arg("gates"), py::arg("positions"), py::arg("alphabet"))
      .def_readonly("requested_runs", &resens::Trie::requested_runs)
      .def_readonly("executed_runs", &resens::Trie::executed_runs)
      .def_readonly("words", &resens::Trie::words)
      .def_property_readonly("word_of", [](const resens::Trie& t) { return py::array_t<int64_t>(t.word_of.size(), t.word_of.data()); })
      .def("tape", &draw_tape)
      .def("levels", &draw_levels, py::arg("budget"))
      .def("least_budget", &resens::Trie::least_budget);
  m.def("build_info", &build_info, "What this library was compiled with, from the compiler itself.");
  m.def("cuda_devices", &cuda_devices, "The CUDA devices as (list of dicts, reason why there are none).");
}
