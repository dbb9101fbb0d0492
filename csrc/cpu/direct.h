// Every other convolution, 1x1 included, directly: MR pixels of a row x NR vectors of output channels in registers
// over all taps and input channels. An output is bias, then ky, kx, channel in order, whatever the blocking.
#include "simd.h"

namespace resens::cpu::RESENS_ISA {

#if RESENS_WIDTH == 16
constexpr int kPixels = 14, kDirectColumns = 2;  // 28 sums, 2 weights, a broadcast; 56, 28, 14 and 7 divide well
#else
constexpr int kPixels = 6, kDirectColumns = 2;
#endif

template <class Op, int MR, int NR>
RESENS_INLINE void direct_block(const ConvCall& call, const typename Op::T* in, const typename Op::T* weight, const float* bias, float* out,
                                const float* residual) {
  typedef typename Op::T T;
  V sum[MR][NR];
  const V gate = all(call.gate);
  RESENS_UNROLL for (int n = 0; n < NR; ++n) {
    const V s = mul(load(bias + n * W), gate);
    RESENS_UNROLL for (int p = 0; p < MR; ++p) sum[p][n] = s;
  }
  const int64_t next = static_cast<int64_t>(call.step) * call.in_stride;
  const int steps = call.depth / Op::kPairs;
  for (int ky = 0; ky < call.kernel; ++ky) {
    for (int kx = 0; kx < call.kernel; ++kx) {
      const T* x0 = in + ky * call.in_pitch + static_cast<int64_t>(kx) * call.in_stride;
      _Pragma("GCC unroll 2") for (int i = 0; i < steps; ++i) {
        const int c = Op::kSwap ? i ^ 1 : i;
        const T *xc = x0 + c * Op::kPairs, *wc = weight + c * (NR * W * Op::kPairs);
        typename Op::X w[NR];
        RESENS_UNROLL for (int n = 0; n < NR; ++n) w[n] = Op::weights(wc + n * W * Op::kPairs);
        RESENS_UNROLL for (int p = 0; p < MR; ++p) {
          const typename Op::X x = Op::broadcast(xc + p * next);
          RESENS_UNROLL for (int n = 0; n < NR; ++n) sum[p][n] = Op::mac(sum[p][n], x, w[n]);
        }
      }
      weight += static_cast<int64_t>(steps) * (NR * W * Op::kPairs);
    }
  }
  const V scale = all(call.out_scale);
  RESENS_UNROLL for (int p = 0; p < MR; ++p) {
    RESENS_UNROLL for (int n = 0; n < NR; ++n) {
      V v = sum[p][n];
      if (call.residual) v = add(v, load(residual + static_cast<int64_t>(p) * call.out_stride + n * W));
      if (call.relu) v = relu(v);
      float* to = out + static_cast<int64_t>(p) * call.out_stride + n * W;
      v = mul(v, scale);
      if (call.mask) v = keep(v, call.mask, to - call.out);
      store(to, v);
    }
  }
}

// Picks the instantiation for `pixels` <= MR.
template <class Op, int MR, int NR>
static void direct_pixels(int pixels, const ConvCall& call, const typename Op::T* in, const typename Op::T* weight, const float* bias, float* out,
                          const float* residual) {
  if constexpr (MR > 1) {
    if (pixels < MR) return direct_pixels<Op, MR - 1, NR>(pixels, call, in, weight, bias, out, residual);
  }
  direct_block<Op, MR, NR>(call, in, weight, bias, out, residual);
}

template <class Op, int NR>
RESENS_INLINE void direct_column(const ConvCall& call, const typename Op::T* weight, int channel) {
  const typename Op::T* in = static_cast<const typename Op::T*>(call.in);
  const int blocks = (call.width + kPixels - 1) / kPixels;
  for (int image = 0; image < call.images; ++image) {
    for (int y = 0; y < call.height; ++y) {
      const typename Op::T* row = in + image * call.in_image + static_cast<int64_t>(y) * call.step * call.in_pitch;
      const int64_t at = image * call.out_image + y * call.out_pitch + channel;
      for (int b = 0, x = 0; b < blocks; ++b) {
        const int pixels = (call.width - x + blocks - b - 1) / (blocks - b);  // blocks of nearly equal size
        const int64_t here = at + static_cast<int64_t>(x) * call.out_stride;
        direct_pixels<Op, kPixels, NR>(pixels, call, row + static_cast<int64_t>(x) * call.step * call.in_stride, weight, call.bias + channel,
                                       call.out + here, call.residual ? call.residual + here : nullptr);
        x += pixels;
      }
    }
  }
}

template <class Op>
static void direct(const ConvCall& call) {
  const typename Op::T* weight = static_cast<const typename Op::T*>(call.weight);
  const int64_t depth = static_cast<int64_t>(call.kernel) * call.kernel * call.depth;  // of one output channel
  int n = 0;
  for (; n + kDirectColumns * W <= call.out_stride; n += kDirectColumns * W) direct_column<Op, kDirectColumns>(call, weight + depth * n, n);
  if (n < call.out_stride) direct_column<Op, 1>(call, weight + depth * n, n);
}

}  // namespace resens::cpu::RESENS_ISA
