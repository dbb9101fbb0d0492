// Every other convolution, 1x1 included, directly: MR pixels of a row x NR vectors of output channels in registers
// over all taps and input channels. An output is bias, then ky, kx, channel in order, whatever the blocking.
#include "passes.h"

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
  const float* touched = residual ? residual : out;  // at the end, and from L3 or memory where images are large
  RESENS_UNROLL for (int p = 0; p < MR; ++p) {
    RESENS_UNROLL for (int n = 0; n < NR; ++n) __builtin_prefetch(touched + static_cast<int64_t>(p) * call.out_stride + n * W, 1);
  }
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
  // Each question is asked once, not once for every sum: with 16 input channels this end is a third of the work.
#define RESENS_SUMS RESENS_UNROLL for (int p = 0; p < MR; ++p) RESENS_UNROLL for (int n = 0; n < NR; ++n)
  if (residual) RESENS_SUMS sum[p][n] = add(sum[p][n], load(residual + static_cast<int64_t>(p) * call.out_stride + n * W));
  if (call.relu) RESENS_SUMS sum[p][n] = relu(sum[p][n]);
  if (call.out_scale != 1.0f) RESENS_SUMS sum[p][n] = mul(sum[p][n], all(call.out_scale));
  if (call.mask) RESENS_SUMS sum[p][n] = keep(sum[p][n], call.mask, out + static_cast<int64_t>(p) * call.out_stride + n * W - call.out);
  RESENS_SUMS store(out + static_cast<int64_t>(p) * call.out_stride + n * W, sum[p][n]);
#undef RESENS_SUMS
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

// Output rows first to last of all images, counted through, times one column of NR vectors. `aside`: `in` holds
// the rows from `first` on, one after the other; else all images.
template <class Op, int NR>
RESENS_INLINE void direct_column(const ConvCall& call, const typename Op::T* in, bool aside, const typename Op::T* weight, int channel, int first,
                                 int last) {
  const int blocks = (call.width + kPixels - 1) / kPixels;
  int image = first / call.height, y = first % call.height;
  for (int r = first; r < last; ++r) {
    const typename Op::T* row = aside ? in + static_cast<int64_t>(r - first) * call.width * call.in_stride : in + image * call.in_image + static_cast<int64_t>(y) * call.step * call.in_pitch;
    const int64_t at = image * call.out_image + y * call.out_pitch + channel;
    for (int b = 0, x = 0; b < blocks; ++b) {
      const int pixels = (call.width - x + blocks - b - 1) / (blocks - b);  // blocks of nearly equal size
      const int64_t here = at + static_cast<int64_t>(x) * call.out_stride;
      direct_pixels<Op, kPixels, NR>(pixels, call, row + static_cast<int64_t>(x) * call.step * call.in_stride, weight, call.bias + channel,
                                     call.out + here, call.residual ? call.residual + here : nullptr);
      x += pixels;
    }
    if (++y == call.height) y = 0, ++image;
  }
}

// Rows that meet all columns before the next rows do: about as many bytes as the weights, since every column reads
// these rows again and all rows read the weights again; and no more than stay in L2 beside a column.
static int64_t direct_rows(int64_t row_bytes, int64_t weight_bytes) {
  const int64_t bytes = weight_bytes < 16384 ? 16384 : weight_bytes > (1 << 20) ? 1 << 20 : weight_bytes;
  return bytes < row_bytes ? 1 : bytes / row_bytes;
}

static int64_t direct_scratch(int64_t row_bytes, int64_t weight_bytes) { return direct_rows(row_bytes, weight_bytes) * row_bytes; }

template <class Op>
static void direct(const ConvCall& call) {
  typedef typename Op::T T;
  const T* weight = static_cast<const T*>(call.weight);
  const int64_t depth = static_cast<int64_t>(call.kernel) * call.kernel * call.depth;  // of one output channel
  const int64_t read = call.kernel == 1 ? static_cast<int64_t>(call.width) * call.in_stride : call.in_pitch * call.step;  // by one row
  const int64_t row = read * static_cast<int64_t>(sizeof(T));
  const int total = call.images * call.height;
  const int64_t most = direct_rows(row, depth * call.out_stride * static_cast<int64_t>(sizeof(T)));
  for (int first = 0; first < total;) {
    const int last = total - first < most ? total : first + static_cast<int>(most);
    const T* in = static_cast<const T*>(call.in);
    if (call.scale) {
      for (int r = first; r < last; ++r) {
        const float* from = static_cast<const float*>(call.in) + r / call.height * call.in_image + r % call.height * call.in_pitch;
        pass<Op>({from, 0, 0, static_cast<T*>(call.scratch) + (r - first) * read, 0, 0, call.in_stride, call.in_stride, 1, call.width, 1,
                  call.scale, call.shift, false});
      }
      in = static_cast<const T*>(call.scratch);
    }
    int n = 0;
    for (; n + kDirectColumns * W <= call.out_stride; n += kDirectColumns * W) {
      direct_column<Op, kDirectColumns>(call, in, call.scale, weight + depth * n, n, first, last);
    }
    if (n < call.out_stride) direct_column<Op, 1>(call, in, call.scale, weight + depth * n, n, first, last);
    first = last;
  }
}

}  // namespace resens::cpu::RESENS_ISA
