// The passes of the way back: signs of ReLUs, masks, transposes of subsampling and means, the norm.
#include "simd.h"

namespace resens::cpu::RESENS_ISA {

static void signs(const SignsCall& call) {
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      const int64_t row = image * call.in_image + y * call.in_pitch, floats = static_cast<int64_t>(call.width) * call.stride;
      const float* in = call.in + row;
      uint8_t* bits = call.bits + row / 8;
      for (int64_t i = 0; i < floats; i += 16) {
        int m = 0;
        RESENS_UNROLL for (int l = 0; l < 16; l += W) m |= positive(load(in + i + l)) << l;
        bits[i / 8] = static_cast<uint8_t>(m);
        bits[i / 8 + 1] = static_cast<uint8_t>(m >> 8);
      }
    }
  }
}

static void mask(const MaskCall& call) {
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      const float* in = call.in + image * call.in_image + y * call.in_pitch;
      const int64_t row = image * call.out_image + y * call.out_pitch, floats = static_cast<int64_t>(call.width) * call.stride;
      float* out = call.out + row;
      for (int64_t i = 0; i < floats; i += W) {
        V v = load(in + i);
        for (int k = 0; k < call.count; ++k) v = keep(v, call.masks[k], row + i);
        store(out + i, v);
      }
    }
  }
}

static void spread(const SpreadCall& call) {
  const V share = all(call.share);
  alignas(64) float lanes[W];
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      const int from_y = y / call.step;
      const bool row = from_y < call.in_height && (call.fill || y % call.step == 0);
      const float* in = call.in + image * call.in_image + from_y * call.in_pitch + call.before;
      for (int x = 0, from_x = 0, phase = 0; x < call.width; ++x) {
        const bool here = row && from_x < call.in_width && (call.fill || phase == 0);
        const float* from = in + static_cast<int64_t>(from_x) * call.in_stride;
        const int64_t at = image * call.out_image + y * call.out_pitch + static_cast<int64_t>(x) * call.out_stride;
        for (int c = 0; c < call.out_stride; c += W) {
          V v = all(0.0f);
          if (here && c + W <= call.channels) {
            v = mul(load(from + c), share);
          } else if (here && c < call.channels) {
            for (int l = 0; l < W; ++l) lanes[l] = c + l < call.channels ? from[c + l] : 0.0f;
            v = mul(load(lanes), share);
          }
          if (call.scale) v = mul(v, load(call.scale + c));
          if (call.mask) v = keep(v, call.mask, at + c);
          store(call.out + at + c, v);
        }
        if (++phase == call.step) phase = 0, ++from_x;
      }
    }
  }
}

// The largest magnitude in every `every`-th row, or NaN if there is one.
static float largest(const float* in, int64_t pitch, int stride, int height, int width, int every) {
  V most = all(0.0f);
  for (int y = 0; y < height; y += every) {
    const float* row = in + y * pitch;
    const int64_t floats = static_cast<int64_t>(width) * stride;
    for (int64_t i = 0; i < floats; i += W) {
      const V v = load(row + i);
      most = larger(add(relu(v), relu(sub(all(0.0f), v))), most);
    }
  }
  alignas(64) float lanes[W];
  store(lanes, most);
  for (int l = 1; l < W; ++l) {
    if (!(lanes[l] <= lanes[0])) lanes[0] = lanes[l];
  }
  return lanes[0];
}

// In double, by lanes of 16 channels in the order of the pixels, then lane after lane.
static double squares(const float* in, int64_t pitch, int stride, int height, int width) {
  double sum[16] = {};
  for (int y = 0; y < height; ++y) {
    const float* row = in + y * pitch;
    const int64_t floats = static_cast<int64_t>(width) * stride;
    for (int64_t i = 0; i < floats; i += 16) {
      for (int l = 0; l < 16; ++l) sum[l] += static_cast<double>(row[i + l]) * static_cast<double>(row[i + l]);
    }
  }
  double total = 0;
  for (int l = 0; l < 16; ++l) total += sum[l];
  return total;
}

}  // namespace resens::cpu::RESENS_ISA
