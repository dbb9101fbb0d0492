// resens_fast::cpu_checksum: one number for the contents of many tensors. The engine keeps packed weights and has to see
// every write to the parameters they came from, those that count no version (`p.data.mul_`, NumPy) too.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "ops_cpu.h"
#include "parallel.h"

namespace {

constexpr int64_t kPiece = 1 << 20;          // bytes that a thread takes at a time
constexpr int64_t kWorthAThread = 4 << 20;  // about 0.3 ms

uint64_t mix(uint64_t hash, uint64_t word) { return (hash ^ word) * 0x9e3779b97f4a7c15u; }
uint64_t fold(uint64_t hash) { return hash ^ (hash >> 29); }

// Every step is a bijection of the hash so far, so that one changed word always changes the result. Eight chains,
// because a multiplication waits three cycles for the last.
uint64_t hash_bytes(const char* bytes, int64_t count) {
  uint64_t hash[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  int64_t i = 0;
  for (; i + 64 <= count; i += 64)
    for (int k = 0; k < 8; ++k) {
      uint64_t word;
      std::memcpy(&word, bytes + i + 8 * k, 8);
      hash[k] = fold(mix(hash[k], word));
    }
  uint64_t all = count;
  for (; i < count; ++i) all = fold(mix(all, static_cast<unsigned char>(bytes[i])));
  for (int k = 0; k < 8; ++k) all = fold(mix(all, hash[k]));
  return all;
}

// Values, shapes, strides and types. Raises ValueError for a tensor that is not dense memory of the CPU.
int64_t cpu_checksum(at::TensorList tensors, int64_t threads) {
  struct Piece {
    const char* bytes;
    int64_t count;
  };
  std::vector<Piece> pieces;
  uint64_t all = tensors.size();
  int64_t total = 0;
  std::vector<at::Tensor> kept;  // copies of what is not dense
  for (const at::Tensor& given : tensors) {
    TORCH_CHECK_VALUE(given.defined() && given.device().is_cpu() && given.layout() == at::kStrided, "a checksum is taken of strided tensors on the CPU");
    at::Tensor t = given.resolve_conj().resolve_neg();
    if (!t.is_non_overlapping_and_dense()) t = t.contiguous();
    if (!t.is_same(given)) kept.push_back(t);
    all = fold(mix(all, static_cast<uint64_t>(t.scalar_type())));
    for (int64_t d = 0; d < given.dim(); ++d) all = fold(mix(fold(mix(all, given.size(d))), given.stride(d)));
    const int64_t bytes = t.nbytes();
    TORCH_CHECK_VALUE(static_cast<int64_t>(t.storage().nbytes()) >= bytes + t.storage_offset() * static_cast<int64_t>(t.itemsize()), "a tensor's storage was freed");
    const char* data = static_cast<const char*>(t.const_data_ptr());
    for (int64_t at = 0; at < bytes; at += kPiece) pieces.push_back({data + at, std::min(kPiece, bytes - at)});
    total += bytes;
  }
  std::vector<uint64_t> hashes(pieces.size());
  resens::cpu::Crew crew(pieces.size(), nullptr, 0);
  crew.run(static_cast<int>(std::clamp<int64_t>(total / kWorthAThread, 1, std::max<int64_t>(threads, 1))), [&] {
    for (int64_t i; (i = crew.take()) >= 0;) hashes[i] = hash_bytes(pieces[i].bytes, pieces[i].count);
  });
  for (uint64_t hash : hashes) all = fold(mix(all, hash));
  return static_cast<int64_t>(all);
}

TORCH_LIBRARY_FRAGMENT(resens_fast, m) { m.def("cpu_checksum(Tensor[] tensors, int threads) -> int"); }
TORCH_LIBRARY_IMPL(resens_fast, CompositeExplicitAutograd, m) { m.impl("cpu_checksum", &cpu_checksum); }

}  // namespace
