// Binds the CUDA engine to torch: resens_fast::stem_cuda and eval_cuda on the CUDA key, cuda_program (host code on CPU tensors) and cuda_variant.
// Nothing here waits for the device, reads a tensor's values or allocates outside torch's allocator, so a call can be captured into a CUDA graph.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstring>
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

// images [B, C, 32, 32] fp32, parameters [(9 C + 1) * 16] fp32 -> states [padded, 32, 32, 16] fp32, padded = B rounded up to `multiple`.
at::Tensor stem_cuda(const at::Tensor& images, const at::Tensor& parameters, bool relu, int64_t multiple) {
  expect(images, "images", at::kFloat, 4, images.device());
  expect(parameters, "parameters", at::kFloat, 1, images.device());
  int64_t count = images.size(0), channels = images.size(1);
  TORCH_CHECK(images.size(2) == 32 && images.size(3) == 32, "images must be 32x32, not ", images.size(2), "x", images.size(3));
  TORCH_CHECK(parameters.numel() == (9 * channels + 1) * 16, "parameters has ", parameters.numel(), " values for ", channels, " channels");
  TORCH_CHECK(multiple >= 1 && count <= (1 << 20), "a call takes at most 2^20 images, not ", count);
  const c10::cuda::CUDAGuard guard(images.device());
  int64_t padded = (count + multiple - 1) / multiple * multiple;
  at::Tensor states = at::empty({padded, 32, 32, 16}, images.options());
  if (padded == 0) return states;
  StemArguments a{images.const_data_ptr<float>(), parameters.const_data_ptr<float>(), states.data_ptr<float>(),
                  static_cast<int32_t>(count), static_cast<int32_t>(padded), static_cast<int32_t>(channels), relu};
  int64_t ctas = std::min<int64_t>(padded * 4, 8 * multiprocessors(images.device().index()));
  check_launch(launch_stem(a, static_cast<int>(ctas), c10::cuda::getCurrentCUDAStream().stream()));
  return states;
}

// One launch of parts [P, 2] of a program on states [N, 32, 32, 16]; labels int32 [B], B <= N; head = (offset, scaled, relu, classes).
// -> tally int64 [words, 3] (errors, loss, non-finite), logits fp32 [words, B, classes] or [0, B, classes], both
// zero for words of other parts, so that launches add up.
std::tuple<at::Tensor, at::Tensor> eval_cuda(const at::Tensor& weights, const at::Tensor& parameters, const at::Tensor& states, const at::Tensor& labels,
                                             const at::Tensor& tape, const at::Tensor& chunks, const at::Tensor& parts, int64_t slots, int64_t words,
                                             at::IntArrayRef head, int64_t images, int64_t ctas, bool fp16, bool with_logits) {
  const at::Device device = states.device();
  expect(weights, "weights", at::kByte, 1, device);
  expect(parameters, "parameters", at::kFloat, 1, device);
  expect(states, "states", at::kFloat, 4, device);
  expect(labels, "labels", at::kInt, 1, device);
  expect(tape, "tape", at::kInt, 2, device);
  expect(chunks, "chunks", at::kInt, 2, device);
  expect(parts, "parts", at::kInt, 2, device);
  TORCH_CHECK(tape.size(1) == 4 && chunks.size(1) == 2 && parts.size(1) == 2, "a program is tape [T, 4], chunks [M, 2], parts [P, 2]");
  TORCH_CHECK(images == 1 || images == 2, "images per CTA must be 1 or 2, not ", images);
  TORCH_CHECK(head.size() == 4, "head is (offset, scaled, relu, classes)");
  TORCH_CHECK(head[3] >= 1 && head[3] <= kMaxClasses, "the kernel counts 1 to ", kMaxClasses, " classes, not ", head[3]);
  TORCH_CHECK(states.size(0) % images == 0 && states.size(0) >= labels.size(0), "states has ", states.size(0), " images for ", labels.size(0), " labels");
  TORCH_CHECK(ctas >= 1 && slots >= 0 && words >= 0, "ctas, slots and words must not be negative");
  int64_t tiles = states.size(0) / images;
  TORCH_CHECK(tiles * parts.size(0) < (int64_t{1} << 30), tiles, " tiles times ", parts.size(0), " parts is more than one launch takes");
  const c10::cuda::CUDAGuard guard(device);
  at::Tensor tally = at::zeros({words, 3}, states.options().dtype(at::kLong));
  at::Tensor logits = at::zeros({with_logits ? words : 0, labels.size(0), head[3]}, states.options());
  int64_t items = tiles * parts.size(0);
  if (items == 0) return {tally, logits};
  ctas = std::min(ctas, items);
  at::Tensor kept = at::empty({ctas, std::max<int64_t>(slots, 1), slot_floats(static_cast<int>(images))}, states.options());
  at::Tensor next = at::zeros({1}, states.options().dtype(at::kInt));
  Arguments a{};
  a.tape = reinterpret_cast<const Instruction*>(tape.const_data_ptr<int32_t>());
  a.chunks = reinterpret_cast<const Chunk*>(chunks.const_data_ptr<int32_t>());
  a.parts = reinterpret_cast<const Part*>(parts.const_data_ptr<int32_t>());
  a.weights = weights.const_data_ptr<uint8_t>();
  a.parameters = parameters.const_data_ptr<float>();
  a.stem = states.const_data_ptr<float>();
  a.labels = labels.const_data_ptr<int32_t>();
  a.slots = kept.data_ptr<float>();
  a.tally = reinterpret_cast<unsigned long long*>(tally.data_ptr<int64_t>());
  a.logits = with_logits ? logits.data_ptr<float>() : nullptr;
  a.next_item = next.data_ptr<int32_t>();
  a.part_count = static_cast<int32_t>(parts.size(0));
  a.tile_count = static_cast<int32_t>(tiles);
  a.image_count = static_cast<int32_t>(labels.size(0));
  a.slot_count = static_cast<int32_t>(std::max<int64_t>(slots, 1));
  a.classes = static_cast<int32_t>(head[3]);
  a.head = static_cast<int32_t>(head[0]);
  a.head_scaled = static_cast<int32_t>(head[1]);
  a.head_relu = static_cast<int32_t>(head[2]);
  auto launch = fp16 ? launch_tape_fp16 : launch_tape_bf16;
  check_launch(launch(a, static_cast<int>(images), static_cast<int>(ctas), c10::cuda::getCurrentCUDAStream().stream()));
  return {tally, logits};
}

// The plan's tape int32 [T, 2], gates fp32 [T] and the packed network's blocks int32 [n, 6], all on the CPU -> device tape int32 [I, 4], chunks int32 [M, 2],
// parts int32 [P, 2], cost float64 [P] in blocks, slots int64 [1].
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> cuda_program(const at::Tensor& tape, const at::Tensor& gates, const at::Tensor& blocks,
                                                                                    int64_t images, int64_t parts) {
  expect(tape, "tape", at::kInt, 2, at::kCPU);
  expect(gates, "gates", at::kFloat, 1, at::kCPU);
  expect(blocks, "blocks", at::kInt, 2, at::kCPU);
  TORCH_CHECK(tape.size(1) == 2 && tape.size(0) == gates.size(0), "tape is [T, 2] and gates [T], not ", tape.sizes(), " and ", gates.sizes());
  TORCH_CHECK(blocks.size(1) == 6, "blocks is [n, 6], not ", blocks.sizes());
  Program p;
  try {
    p = build_program(tape.const_data_ptr<int32_t>(), gates.const_data_ptr<float>(), static_cast<size_t>(gates.numel()),
                      reinterpret_cast<const BlockInfo*>(blocks.const_data_ptr<int32_t>()), static_cast<int>(blocks.size(0)), static_cast<int>(images),
                      static_cast<int>(parts));
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

// (images per CTA, CTAs that fill the device, bytes of L2); images 0 when no variant fits.
std::vector<int64_t> cuda_variant(int64_t device, bool fp16) {
  const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
  int shared = 0, l2 = 0, error = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, static_cast<int>(device)));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, static_cast<int>(device)));
  int images = fp16 ? best_images_fp16(shared, &error) : best_images_bf16(shared, &error);
  // A library without code for this device can run neither variant; other errors are the caller's to see.
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction && error != cudaErrorUnsupportedPtxVersion) check_launch(error);
  return {images, multiprocessors(static_cast<int>(device)), l2};  // registers allow one CTA per multiprocessor
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(resens_fast, m) {
  m.def("stem_cuda(Tensor images, Tensor parameters, bool relu, int multiple) -> Tensor");
  m.def(
      "eval_cuda(Tensor weights, Tensor parameters, Tensor states, Tensor labels, Tensor tape, Tensor chunks, Tensor parts, int slots, int words, int[] head, "
      "int images, int ctas, bool fp16, bool with_logits) -> (Tensor tally, Tensor logits)");
  m.def("cuda_program(Tensor tape, Tensor gates, Tensor blocks, int images, int parts) -> (Tensor tape, Tensor chunks, Tensor parts, Tensor cost, Tensor slots)");
  m.def("cuda_variant(int device, bool fp16) -> int[]", cuda_variant);
}
TORCH_LIBRARY_IMPL(resens_fast, CUDA, m) {
  m.impl("stem_cuda", stem_cuda);
  m.impl("eval_cuda", eval_cuda);
}
TORCH_LIBRARY_IMPL(resens_fast, CPU, m) { m.impl("cuda_program", cuda_program); }
}  // namespace resens::cuda
