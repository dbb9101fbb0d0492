// The stem, one launch before the tape: 3x3 convolution with folded batch norm, optional ReLU, in fp32 from [N, C, 32, 32] images to [N, 32, 32, width] states.
//
// Its own launch because a part may load the tile's start many times and 64 KB per image from L2 cost less than 0.4 MFLOP of fp32 again, and because its registers and code would
// weigh on the tape kernel. Own code rather than cuDNN: the result must not depend on the batch size. One thread per pixel and 16 channels; weights
// [input channel][dy][dx][width] from the constant-like read-only path, the same address in all threads. Images behind the last (padding of the last tile) give zeros.
#pragma once
#include "prim.cuh"

namespace resens::cuda {

struct StemArguments {
  const float* images;      // [image_count, in_channels, 32, 32]
  const float* parameters;  // weight[in_channels][3][3][width] bias[width]
  float* states;            // [padded_count, 32, 32, width]
  int32_t image_count, padded_count, in_channels, width, relu;
};

RF_DEV void run_stem(const StemArguments& a) {
  constexpr int kSide = 32, kPixels = kSide * kSide, kOut = 16, kTaps = 9;
  int groups = a.width / kOut, total = a.padded_count * (kPixels / 256) * groups;
  for (int each = cta_id(); each < total; each += cta_count()) {
    int item = each / groups, first = each % groups * kOut;  // channels first to first + 15
    int image = item / (kPixels / 256), pixel = (item % (kPixels / 256)) * 256 + thread_id(), y = pixel / kSide, x = pixel % kSide;
    float acc[kOut];
#pragma unroll
    for (int c = 0; c < kOut; c++) acc[c] = 0.f;
    if (image < a.image_count) {
#pragma unroll
      for (int c = 0; c < kOut; c++) acc[c] = load_global(a.parameters + a.in_channels * kTaps * a.width + first + c);
#pragma unroll 1
      for (int i = 0; i < a.in_channels * kTaps; i++) {
        int yy = y + i % kTaps / 3 - 1, xx = x + i % 3 - 1;
        float v = yy >= 0 && yy < kSide && xx >= 0 && xx < kSide ? load_global(a.images + (static_cast<size_t>(image) * a.in_channels + i / kTaps) * kPixels + yy * kSide + xx) : 0.f;
#pragma unroll
        for (int c = 0; c < kOut; c++) acc[c] = fmaf(v, load_global(a.parameters + i * a.width + first + c), acc[c]);
      }
      if (a.relu) {
#pragma unroll
        for (int c = 0; c < kOut; c++) acc[c] = relu(acc[c]);
      }
    }
    Float4* to = reinterpret_cast<Float4*>(a.states + (static_cast<size_t>(image) * kPixels + pixel) * a.width + first);
#pragma unroll
    for (int c = 0; c < kOut / 4; c++) store_state(to + c, Float4{acc[4 * c], acc[4 * c + 1], acc[4 * c + 2], acc[4 * c + 3]});
  }
}
}  // namespace resens::cuda
