// The passes beside the convolutions: operands, shortcuts without weights, pooling, the head.
#pragma once
#include "simd.h"

namespace resens::cpu::RESENS_ISA {

// out = in, relu(in) or relu(scale * in + shift), stored as the operand; the halo stays as it is: zero.
template <class Op>
static void pass(const PassCall& call) {
  typedef typename Op::T T;
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      const float* in = call.in + image * call.in_image + y * call.in_pitch;
      T* out = static_cast<T*>(call.out) + image * call.out_image + y * call.out_pitch;
      for (int c = 0; c < call.in_stride; c += W) {
        const float* from = in + c;
        T* to = out + c;
        if (call.scale) {
          const V scale = load(call.scale + c), shift = load(call.shift + c);
          for (int x = 0; x < call.width; ++x, from += call.in_stride, to += call.out_stride) Op::put(to, relu(fma(scale, load(from), shift)));
        } else if (call.relu) {
          for (int x = 0; x < call.width; ++x, from += call.in_stride, to += call.out_stride) Op::put(to, relu(load(from)));
        } else {
          for (int x = 0; x < call.width; ++x, from += call.in_stride, to += call.out_stride) Op::put(to, load(from));
        }
      }
    }
  }
}

// One image [C][H][W] to the first convolution's operand.
template <class Op>
static void stem(const StemCall& call) {
  typedef typename Op::T T;
  const int64_t area = static_cast<int64_t>(call.height) * call.width;
  for (int y = 0; y < call.height; ++y) {
    T* out = static_cast<T*>(call.out) + y * call.out_pitch;
    for (int c = 0; c < call.channels; ++c) {
      const float* in = call.in + c * area + static_cast<int64_t>(y) * call.width;
      for (int x = 0; x < call.width; ++x) Op::put_one(out + static_cast<int64_t>(x) * call.stride + c, in[x]);
    }
  }
}

static void pad(const PadCall& call) {
  const float share = 1.0f / static_cast<float>(call.pool ? call.pool * call.pool : 1);
  const int size = call.pool ? call.pool : 1;
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      for (int x = 0; x < call.width; ++x) {
        float* out = call.out + image * call.out_image + y * call.out_pitch + static_cast<int64_t>(x) * call.out_stride;
        const float* in = call.in + image * call.in_image + static_cast<int64_t>(y) * call.step * call.in_pitch +
                          static_cast<int64_t>(x) * call.step * call.in_stride;
        for (int c = 0; c < call.out_stride; c += W) store(out + c, all(0.0f));
        int c = 0;
        for (; c + W <= call.channels; c += W) {
          V sum = all(0.0f);
          for (int i = 0; i < size; ++i) {
            for (int j = 0; j < size; ++j) sum = add(sum, load(in + i * call.in_pitch + static_cast<int64_t>(j) * call.in_stride + c));
          }
          store(out + call.before + c, mul(sum, all(share)));
        }
        for (; c < call.channels; ++c) {
          float sum = 0.0f;
          for (int i = 0; i < size; ++i) {
            for (int j = 0; j < size; ++j) sum += in[i * call.in_pitch + static_cast<int64_t>(j) * call.in_stride + c];
          }
          out[call.before + c] = sum * share;
        }
      }
    }
  }
}

static void max_pool(const MaxPoolCall& call) {
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      for (int x = 0; x < call.width; ++x) {
        const int y0 = y * call.step - call.padding, x0 = x * call.step - call.padding;
        float* out = call.out + image * call.out_image + y * call.out_pitch + static_cast<int64_t>(x) * call.stride;
        for (int c = 0; c < call.stride; c += W) {
          V best = all(-__builtin_huge_valf());
          for (int i = y0 < 0 ? 0 : y0; i < y0 + call.kernel && i < call.in_height; ++i) {
            for (int j = x0 < 0 ? 0 : x0; j < x0 + call.kernel && j < call.in_width; ++j) {
              best = larger(load(call.in + image * call.in_image + i * call.in_pitch + static_cast<int64_t>(j) * call.stride + c), best);
            }
          }
          store(out + c, best);
        }
      }
    }
  }
}

// relu(scale * x + shift), mean over the pixels in four interleaved sums, linear layer.
static void head(const HeadCall& call) {
  const V share = all(1.0f / static_cast<float>(static_cast<int64_t>(call.height) * call.width));
  for (int c = 0; c < call.stride; c += W) {
    V sum[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
    const V scale = call.scale ? load(call.scale + c) : all(1.0f), shift = call.scale ? load(call.shift + c) : all(0.0f);
    for (int y = 0; y < call.height; ++y) {
      const float* in = call.in + y * call.in_pitch + c;
      for (int x = 0; x < call.width; ++x) {
        V v = load(in + static_cast<int64_t>(x) * call.stride);
        if (call.scale) v = fma(scale, v, shift);
        if (call.relu) v = relu(v);
        sum[x & 3] = add(sum[x & 3], v);
      }
    }
    store(call.pooled + c, mul(add(add(sum[0], sum[1]), add(sum[2], sum[3])), share));
  }
  for (int k = 0; k < call.classes_stride; k += W) {
    V sum = load(call.bias + k);
    for (int c = 0; c < call.stride; ++c) sum = fma(all(call.pooled[c]), load(call.weight + static_cast<int64_t>(c) * call.classes_stride + k), sum);
    store(call.logits + k, sum);
  }
}

static double multiply_adds(int64_t rounds) {
  V sum[12];
  V a = all(1.0001f), b = all(1e-9f);
  RESENS_UNROLL for (int i = 0; i < 12; ++i) sum[i] = all(static_cast<float>(i));
  for (int64_t r = 0; r < rounds; ++r) {
    RESENS_UNROLL for (int i = 0; i < 12; ++i) {
      sum[i] = fma(sum[i], a, b);
#if RESENS_WIDTH == 16
      asm volatile("" : "+v"(sum[i]));  // neither vectorised further nor left out
#elif RESENS_WIDTH == 8
      asm volatile("" : "+x"(sum[i]));
#endif
    }
  }
  alignas(64) float lanes[W];
  RESENS_UNROLL for (int i = 1; i < 12; ++i) sum[0] = add(sum[0], sum[i]);
  store(lanes, sum[0]);
  return lanes[0] == 12345.0f ? 0.0 : 2.0 * 12 * W * static_cast<double>(rounds);
}

}  // namespace resens::cpu::RESENS_ISA
