// Packs folded parameters for one instruction set: columns of a few vectors of output channels, in the order in which
// the kernels read them. Winograd filters are transformed in double and rounded once.
#include <cstring>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "network.h"
#include "points.h"

namespace resens::cpu {
namespace {

// Round to nearest even, NaN stays NaN: what the transforms do to the operands.
uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 0x40);
  return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

class Writer {
 public:
  Writer(const OperandKernels& operand, char* to) : operand_(operand), to_(to) {}
  void put(int64_t at, float x) {
    if (operand_.bytes == 2) {
      reinterpret_cast<uint16_t*>(to_)[at] = to_bf16(x);
    } else if (operand_.rounded) {
      const uint32_t u = static_cast<uint32_t>(to_bf16(x)) << 16;
      std::memcpy(reinterpret_cast<float*>(to_) + at, &u, 4);
    } else {
      reinterpret_cast<float*>(to_)[at] = x;
    }
  }

 private:
  const OperandKernels& operand_;
  char* to_;
};

// Filters for the 36 points, [e] of one (output, input) pair.
void transform(const float* filter, double* out) {
  double half[6][3];
  for (int i = 0; i < 6; ++i) {
    for (int j = 0; j < 3; ++j) {
      half[i][j] = 0;
      for (int k = 0; k < 3; ++k) half[i][j] += kFilter[i][k] * filter[k * 3 + j];
    }
  }
  for (int e = 0; e < 36; ++e) {
    out[e] = 0;
    for (int k = 0; k < 3; ++k) out[e] += half[e / 6][k] * kFilter[e % 6][k];
  }
}

void pack_conv(const Conv& c, const Kernels& kernels, const OperandKernels& operand, const float* weight, const float* bias, char* packed) {
  const bool winograd = c.algorithm == Algorithm::kWinograd;
  const int taps = winograd ? 36 : c.kernel * c.kernel, pairs = operand.paired ? 2 : 1;
  const int lanes = kernels.lanes, whole = (winograd ? kernels.winograd_columns : kernels.direct_columns) * lanes;
  const int outputs = round_up(c.out_channels, kLanes);
  Writer to(operand, packed + c.weight);
  std::vector<double> points(36);
  for (int o = 0; o < c.out_channels; ++o) {
    // The column that output channel o falls into, and its width: full columns, then what is left as one narrow column
    // (Winograd) or, for the direct kernels, single vectors.
    const int first = o / whole * whole;
    const int width = outputs - first >= whole ? whole : winograd ? outputs - first : lanes;
    const int start = outputs - first >= whole || winograd ? first : o / lanes * lanes;
    for (int i = 0; i < c.in_channels; ++i) {
      const float* filter = weight + (static_cast<int64_t>(o) * c.in_channels + i) * c.kernel * c.kernel;
      if (winograd) transform(filter, points.data());
      for (int t = 0; t < taps; ++t) {
        const int64_t base = winograd ? static_cast<int64_t>(t) * c.depth * outputs + static_cast<int64_t>(start) * c.depth
                                      : static_cast<int64_t>(start) * c.depth * taps + static_cast<int64_t>(t) * c.depth * width;
        const int64_t at = base + (static_cast<int64_t>(i / pairs) * width + (o - start)) * pairs + i % pairs;
        to.put(at, winograd ? static_cast<float>(points[t]) : filter[t]);
      }
    }
  }
  std::memcpy(packed + c.bias, bias, sizeof(float) * c.out_channels);
}

class Source {
 public:
  Source(const float* raw, int64_t length) : raw_(raw), length_(length) {}
  const float* at(int64_t offset, int64_t count) const {
    if (offset < 0 || offset + count > length_) throw std::invalid_argument("The network's description reads past its parameters.");
    return raw_ + offset;
  }

 private:
  const float* raw_;
  int64_t length_;
};

}  // namespace

void pack(const Network& n, const Kernels& kernels, Dtype dtype, const float* raw, int64_t raw_length, char* packed) {
  const OperandKernels& operand = dtype == Dtype::kBFloat16 ? kernels.bfloat16 : kernels.float32;
  const Source source(raw, raw_length);
  const auto conv = [&](const Conv& c) {
    pack_conv(c, kernels, operand, source.at(c.raw_weight, static_cast<int64_t>(c.out_channels) * c.in_channels * c.kernel * c.kernel),
              source.at(c.raw_bias, c.out_channels), packed);
  };
  const auto copy = [&](int64_t to, int64_t from, int64_t count) { std::memcpy(packed + to, source.at(from, count), sizeof(float) * count); };
  for (const Conv& c : n.stem) conv(c);
  for (const Block& b : n.blocks) {
    if (b.prologue) copy(b.scale, b.raw_scale, b.in.channels), copy(b.shift, b.raw_shift, b.in.channels);
    for (const Conv& c : b.convs) conv(c);
    if (b.shortcut == ShortcutKind::kProjection) conv(b.projection);
  }
  if (n.head_prologue) copy(n.head_scale, n.raw_head_scale, n.head_channels), copy(n.head_shift, n.raw_head_shift, n.head_channels);
  // [classes][channels] -> [channels][classes rounded up]
  const int lanes = round_up(n.classes, kLanes);
  const float* weight = source.at(n.raw_head_weight, static_cast<int64_t>(n.classes) * n.head_channels);
  float* to = reinterpret_cast<float*>(packed + n.head_weight);
  for (int k = 0; k < n.classes; ++k) {
    for (int c = 0; c < n.head_channels; ++c) to[static_cast<int64_t>(c) * lanes + k] = weight[static_cast<int64_t>(k) * n.head_channels + c];
  }
  copy(n.head_bias, n.raw_head_bias, n.classes);
}

void pack_transposed(const Network& n, const Network& transposed, const Kernels& kernels, const float* raw, int64_t raw_length, char* packed) {
  const Source source(raw, raw_length);
  const auto conv = [&](const Conv& c, const Conv& back, const float* scale) {
    const int taps = c.kernel * c.kernel;
    const float* weight = source.at(c.raw_weight, static_cast<int64_t>(c.out_channels) * c.in_channels * taps);
    std::vector<float> flipped(static_cast<size_t>(c.out_channels) * c.in_channels * taps);
    for (int o = 0; o < c.out_channels; ++o) {
      for (int i = 0; i < c.in_channels; ++i) {
        const float* from = weight + (static_cast<int64_t>(o) * c.in_channels + i) * taps;
        float* to = flipped.data() + (static_cast<int64_t>(i) * c.out_channels + o) * taps;
        for (int t = 0; t < taps; ++t) to[t] = scale ? scale[i] * from[taps - 1 - t] : from[taps - 1 - t];
      }
    }
    pack_conv(back, kernels, kernels.float32, flipped.data(), std::vector<float>(c.in_channels).data(), packed);
  };
  for (size_t j = 0; j < n.blocks.size(); ++j) {
    const Block &b = n.blocks[j], &back = transposed.blocks[j];
    const float* scale = b.prologue ? source.at(b.raw_scale, b.in.channels) : nullptr;
    if (scale) std::memcpy(packed + back.scale, scale, sizeof(float) * b.in.channels);
    const size_t last = b.convs.size() - 1;
    for (size_t i = 0; i <= last; ++i) conv(b.convs[i], back.convs[last - i], i == 0 ? scale : nullptr);
    if (b.shortcut == ShortcutKind::kProjection) conv(b.projection, back.projection, b.activated ? scale : nullptr);
  }
}

}  // namespace resens::cpu
