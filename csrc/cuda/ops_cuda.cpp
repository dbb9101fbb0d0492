// Binds the CUDA engine to torch: resens_fast::eval on CUDA tensors, cuda_program (host code on CPU tensors) and cuda_variant.
// Nothing here waits for the device, reads a tensor's values or allocates outside torch's allocator, so a call can be captured into a CUDA graph.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "launch.h"
#include "program.h"
#include "stem.cuh"

namespace resens::cuda {
namespace {

void expect(const at::Tensor& t, const char* name, at::ScalarType type, int64_t dims, const at::Device& device) {
  TORCH_CHECK(t.scalar_type() == type, name, " must be ", type, ", not ", t.scalar_type());
  TORCH_CHECK(t.dim() == dims, name, " must have ", dims, " dimensions, not ", t.dim());
  TORCH_CHECK(t.device() == device, name, " must be on ", device, ", not on ", t.device());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}
int multiprocessors(int device) {
  int count = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}
void check_launch(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

// The int32 fields of `layout` (engines/cuda_pack.py): the operand type, the network's shape and where things are in `packed` (bytes) or its parameters (floats).
struct Layout { int32_t fp16, width, in_channels, stem_relu, head, head_scaled, head_relu, classes, parameters, stem; };

Layout read_layout(const at::Tensor& layout, const at::Tensor& packed) {
  expect(layout, "layout", at::kInt, 1, at::kCPU);
  Layout l;
  TORCH_CHECK(layout.numel() * sizeof(int32_t) == sizeof l, "layout has ", layout.numel(), " numbers, not ", sizeof l / sizeof(int32_t));
  std::memcpy(&l, layout.const_data_ptr<int32_t>(), sizeof l);
  TORCH_CHECK(l.classes >= 1 && l.classes <= kMaxClasses, "the kernel counts 1 to ", kMaxClasses, " classes, not ", l.classes);
  int64_t stem = (9 * int64_t{l.in_channels} + 1) * l.width * 4, head = l.parameters + 4 * (int64_t{l.head} + (4 * l.width + 1) * l.classes);
  TORCH_CHECK((l.width == 16 || l.width == 32) && l.in_channels >= 1 && l.parameters >= 0 && l.parameters % 16 == 0 && l.head >= 0 && l.stem % 16 == 0 &&
                  head <= l.stem && l.stem + stem <= packed.numel(),
              "layout does not fit packed, which has ", packed.numel(), " bytes");
  return l;
}

// The stem as one launch: images [B, C, 32, 32] fp32 -> states [B rounded up to `multiple`, 32, 32, width] fp32.
at::Tensor run_stem(const at::Tensor& images, const Layout& l, const uint8_t* packed, int64_t multiple) {
  int64_t count = images.size(0), padded = (count + multiple - 1) / multiple * multiple;
  at::Tensor states = at::empty({padded, 32, 32, l.width}, images.options());
  StemArguments a{images.const_data_ptr<float>(), reinterpret_cast<const float*>(packed + l.stem), states.data_ptr<float>(),
                  static_cast<int32_t>(count), static_cast<int32_t>(padded), l.in_channels, l.width, l.stem_relu};
  int64_t ctas = std::min<int64_t>(padded * 4 * (l.width / 16), 8 * multiprocessors(images.device().index()));
  check_launch(launch_stem(a, static_cast<int>(ctas), c10::cuda::getCurrentCUDAStream().stream()));
  return states;
}

// CUDA's eval (schema: ops.cpp): the stem in one launch, then the parts of a program in one more, on the current stream.
// The stem is computed again when a plan takes several launches: a thousandth of an intact network beside most of a second.
std::tuple<at::Tensor, at::Tensor> eval_cuda(const at::Tensor& images, const at::Tensor& labels, const at::Tensor& layout, const at::Tensor& packed,
                                             at::TensorList program, int64_t words, int64_t logits, int64_t threads, int64_t tile, std::string isa, bool rounded,
                                             const std::optional<at::Tensor>& control) {
  const at::Device device = images.device();
  expect(images, "images", at::kFloat, 4, device);
  expect(labels, "labels", at::kLong, 1, device);
  expect(packed, "packed", at::kByte, 1, device);
  TORCH_CHECK(program.size() == 4, "program is tape, chunks, parts and slots of cuda_program, not ", program.size(), " tensors");
  const at::Tensor &tape = program[0], &chunks = program[1], &parts = program[2];
  expect(tape, "tape", at::kInt, 2, device);
  expect(chunks, "chunks", at::kInt, 2, device);
  expect(parts, "parts", at::kInt, 2, device);
  expect(program[3], "slots", at::kLong, 1, at::kCPU);
  TORCH_CHECK(tape.size(1) == 4 && chunks.size(1) == 2 && parts.size(1) == 2 && program[3].numel() == 1, "a program is tape [T, 4], chunks [M, 2], parts [P, 2], slots [1]");
  const Layout l = read_layout(layout, packed);
  TORCH_CHECK(isa.empty() && rounded && !control, "isa, rounded=False and control are for CPU tensors; a CUDA launch has none of them");
  TORCH_CHECK(tile == 1 || (tile == 2 && l.width == 16), "tile, the images per CTA, must be 1, or 2 for 16 channels, not ", tile, " for ", l.width);
  TORCH_CHECK(images.size(1) == l.in_channels && images.size(2) == 32 && images.size(3) == 32, "images must be [batch, ", l.in_channels, ", 32, 32], not ", images.sizes());
  TORCH_CHECK(labels.numel() == images.size(0) || (logits && labels.numel() == 0), "there are ", labels.numel(), " labels for ", images.size(0), " images");
  TORCH_CHECK(logits == 0 || logits == l.classes, "logits must be 0 or ", l.classes, ", not ", logits);
  const int64_t count = images.size(0), slots = std::max<int64_t>(program[3].const_data_ptr<int64_t>()[0], 1);
  TORCH_CHECK(threads >= 1 && words >= 0 && count <= (1 << 20), "threads must be positive, words not negative and images at most 2^20, not ", threads, ", ", words, ", ", count);
  const int64_t tiles = (count + tile - 1) / tile, items = tiles * parts.size(0);
  TORCH_CHECK(items < (int64_t{1} << 30), tiles, " tiles times ", parts.size(0), " parts is more than one launch takes");
  const c10::cuda::CUDAGuard guard(device);
  at::Tensor tally = at::zeros({words, 3}, images.options().dtype(at::kLong));
  at::Tensor out = logits ? at::zeros({words, count, logits}, images.options()) : at::empty({0}, images.options());
  if (items > 0) {
    const uint8_t* base = packed.const_data_ptr<uint8_t>();
    at::Tensor states = run_stem(images, l, base, tile);
    at::Tensor scored = labels.numel() ? labels.to(at::kInt) : at::zeros({count}, images.options().dtype(at::kInt));
    const int64_t ctas = std::min(threads, items);
    at::Tensor kept = at::empty({ctas, slots, slot_floats(static_cast<int>(tile), l.width)}, images.options());
    at::Tensor next = at::zeros({1}, images.options().dtype(at::kInt));
    Arguments a{};
    a.tape = reinterpret_cast<const Instruction*>(tape.const_data_ptr<int32_t>());
    a.chunks = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int32_t>());
    a.parts = reinterpret_cast<const Part*>(parts.const_data_ptr<int32_t>());
    a.weights = base;
    a.parameters = reinterpret_cast<const float*>(base + l.parameters);
    a.stem = states.const_data_ptr<float>();
    a.labels = scored.const_data_ptr<int32_t>();
    a.slots = kept.data_ptr<float>();
    a.tally = reinterpret_cast<unsigned long long*>(tally.data_ptr<int64_t>());
    a.logits = logits ? out.data_ptr<float>() : nullptr;
    a.next_item = next.data_ptr<int32_t>();
    a.part_count = static_cast<int32_t>(parts.size(0));
    a.tile_count = static_cast<int32_t>(tiles);
    a.image_count = static_cast<int32_t>(count);
    a.slot_count = static_cast<int32_t>(slots);
    a.classes = l.classes;
    a.head = l.head;
    a.head_scaled = l.head_scaled;
    a.head_relu = l.head_relu;
    auto launch = l.fp16 ? launch_tape_fp16 : launch_tape_bf16;
    check_launch(launch(a, static_cast<int>(tile), l.width, static_cast<int>(ctas), c10::cuda::getCurrentCUDAStream().stream()));
    if (!labels.numel()) tally.zero_();
  }
  return {tally.t().contiguous(), out};
}

// The plan's tape int32 [T, 2], gates fp32 [T] and the packed network's blocks int32 [n, 6], all on the CPU -> device tape int32 [I, 4], chunks int32 [M, 2],
// parts int32 [P, 2], cost float64 [P] in blocks, slots int64 [1].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cuda_program(const at::Tensor& tape, const at::Tensor& gates, const at::Tensor& blocks,
                                                                                    int64_t images, int64_t width, int64_t parts) {
  expect(tape, "tape", at::kInt, 2, at::kCPU);
  expect(gates, "gates", at::kFloat, 1, at::kCPU);
  expect(blocks, "blocks", at::kInt, 2, at::kCPU);
  TORCH_CHECK(tape.size(1) == 2 && tape.size(0) == gates.size(0), "tape is [T, 2] and gates [T], not ", tape.sizes(), " and ", gates.sizes());
  TORCH_CHECK(blocks.size(1) == 6, "blocks is [n, 6], not ", blocks.sizes());
  Program p;
  try {
    p = build_program(tape.const_data_ptr<int32_t>(), gates.const_data_ptr<float>(), static_cast<size_t>(gates.numel()),
                      reinterpret_cast<const BlockInfo*>(blocks.const_data_ptr<int32_t>()), static_cast<int>(blocks.size(0)), static_cast<int>(images),
                      static_cast<int>(width), static_cast<int>(parts));
  } catch (const std::exception& e) {
    TORCH_CHECK_VALUE(false, e.what());
  }
  auto copy = [](const void* from, int64_t rows, int64_t columns, at::ScalarType type) {
    at::Tensor t = at::empty({rows, columns}, at::TensorOptions().dtype(type));
    if (rows) std::memcpy(t.mutable_data_ptr(), from, t.nbytes());
    return t;
  };
  return {copy(p.tape.data(), static_cast<int64_t>(p.tape.size()), 4, at::kInt), copy(p.chunks.data(), static_cast<int64_t>(p.chunks.size()), 2, at::kInt),
          copy(p.parts.data(), static_cast<int64_t>(p.parts.size()), 2, at::kInt), copy(p.cost.data(), static_cast<int64_t>(p.cost.size()), 1, at::kDouble).flatten(),
          at::full({1}, p.slots, at::TensorOptions().dtype(at::kLong))};
}

// (images per CTA, CTAs that fill the device, bytes of L2) for networks of that width; images 0 when no variant fits.
std::vector<int64_t> cuda_variant(int64_t device, bool fp16, int64_t width) {
  TORCH_CHECK_VALUE(width == 16 || width == 32, "width must be 16 or 32, not ", width);
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  int shared = 0, l2 = 0, error = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device)));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, static_cast<int>(device)));
  int images = fp16 ? best_images_fp16(static_cast<int>(width), shared, &error) : best_images_bf16(static_cast<int>(width), shared, &error);
  // A library without code for this device can run neither variant; other errors are the caller's to see.
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction && error != cudaErrorUnsupportedPtxVersion) check_launch(error);
  return {images, multiprocessors(static_cast<int>(device)), l2};  // registers allow one CTA per multiprocessor
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(resens_fast, m) {
  m.def("cuda_program(Tensor tape, Tensor gates, Tensor blocks, int images, int width, int parts) -> (Tensor tape, Tensor chunks, Tensor parts, Tensor cost, Tensor slots)");
  m.def("cuda_variant(int device, bool fp16, int width) -> int[]", cuda_variant);
}
TORCH_LIBRARY_IMPL(resens_fast, CUDA, m) { m.impl("eval", eval_cuda); }
TORCH_LIBRARY_IMPL(resens_fast, CPU, m) { m.impl("cuda_program", cuda_program); }
}  // namespace resens::cuda
