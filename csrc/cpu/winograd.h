// 3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3) with the interpolation points 0, +-sqrt(1/2), +-sqrt(2), inf:
// 36 products for 16 outputs instead of 144, at a quarter of the rounding error of the textbook's 0, +-1, +-2.
//
//   for a chunk of tiles:   V[e][tile][ci] = (B' d B)[e]      d: 6x6 window, e = 0..35
//                           M[e][tile][co] = q[e] bias[co] + sum over ci of V[e][tile][ci] U[e][ci][co]
//                           out            = A' M A, then residual, ReLU, gate
//
// q with A' q A = 1 lets the products start from the bias. Each output is one fixed sequence of operations whatever
// the chunk holds, so grouping images changes nothing in a result. The transforms take the rows of B' as {0} {1, 2}
// {3, 4} {5} and of A' as {0, 2} {1, 3}: more loads, but nothing spills, and loads are not what they wait for.
#include "points.h"
#include "simd.h"

namespace resens::cpu::RESENS_ISA {

template <class Op, int N>
RESENS_INLINE void put_row(typename Op::T* v, int64_t next, const V* t) {
  RESENS_UNROLL for (int j = 0; j < N; ++j) Op::put(v + j * next, t[j]);
}

RESENS_INLINE V input_end(V d0, V d2, V d4) { return fnma(all(2.5f), d2, add(d0, d4)); }

RESENS_INLINE void input_line(const V* d, V* t) {
  const V a = all(kA), b = all(kB), a2 = all(0.5f), b2 = all(2.0f);
  const V x = fnma(b2, d[2], d[4]), z = fnma(b2, d[1], d[3]), c = fnma(a2, d[2], d[4]), s = fnma(a2, d[1], d[3]);
  t[0] = input_end(d[0], d[2], d[4]);
  t[1] = fma(a, z, x);
  t[2] = fnma(a, z, x);
  t[3] = fma(b, s, c);
  t[4] = fnma(b, s, c);
  t[5] = input_end(d[1], d[3], d[5]);
}

// The six rows that a row of windows reads.
struct Rows {
  const float* row[6];
};

RESENS_INLINE Rows rows_at(const float* in, int64_t pitch) {
  return {{in, in + pitch, in + 2 * pitch, in + 3 * pitch, in + 4 * pitch, in + 5 * pitch}};
}

// Windows side by side share two columns, so the vertical half of the transform is rolled along a run of `tiles` windows
// of a row: four new columns a window, not six. The windows begin `at` floats into their six rows; all channels, to
// v[e * plane + tile * channels + c].
template <class Op, int C>
RESENS_INLINE void input_run(const Rows& rows, int64_t at, int channels, typename Op::T* v, int64_t plane, int tiles) {
  typedef typename Op::T T;
  const int stride = C ? C : channels;
  const int64_t step = 4 * stride, end = tiles * step;
  const V a = all(kA), b = all(kB), a2 = all(0.5f), b2 = all(2.0f);
  RESENS_ROLLED for (int c = 0; c < stride; c += W, v += W) {
    const float* row[6];
    RESENS_UNROLL for (int i = 0; i < 6; ++i) {
      row[i] = rows.row[i] + at + c;
      RESENS_OPAQUE(row[i]);
    }
    V d[6], f[6], t[6];
#define RESENS_D(i) load(row[i] + x)
    const auto ends = [&](int first, int j, int64_t x) RESENS_INLINED { d[j] = input_end(RESENS_D(first), RESENS_D(first + 2), RESENS_D(first + 4)); };
    const auto points = [&](V point, V square, int j, int64_t x) RESENS_INLINED {
      const V even = fnma(square, RESENS_D(2), RESENS_D(4)), odd = fnma(square, RESENS_D(1), RESENS_D(3));
      d[j] = fma(point, odd, even);
      f[j] = fnma(point, odd, even);
    };
#undef RESENS_D
    const auto run_ends = [&](int first, T* to) RESENS_INLINED {
      ends(first, 4, 0), ends(first, 5, stride);
      RESENS_ROLLED for (int64_t x = 0; x < end; x += step, to += stride) {
        d[0] = d[4], d[1] = d[5];
        RESENS_UNROLL for (int j = 2; j < 6; ++j) ends(first, j, x + j * stride);
        input_line(d, t);
        put_row<Op, 6>(to, plane, t);
      }
    };
    const auto run_points = [&](V point, V square, T* to) RESENS_INLINED {
      points(point, square, 4, 0), points(point, square, 5, stride);
      RESENS_ROLLED for (int64_t x = 0; x < end; x += step, to += stride) {
        d[0] = d[4], d[1] = d[5], f[0] = f[4], f[1] = f[5];
        RESENS_UNROLL for (int j = 2; j < 6; ++j) points(point, square, j, x + j * stride);
        input_line(d, t);
        put_row<Op, 6>(to, plane, t);
        input_line(f, t);
        put_row<Op, 6>(to + 6 * plane, plane, t);
      }
    };
    run_ends(0, v);
    run_points(a, b2, v + 6 * plane);
    run_points(b, a2, v + 18 * plane);
    run_ends(1, v + 30 * plane);
  }
}

RESENS_INLINE void output_line(const V* m, V* y) {
  const V a = all(kA), b = all(kB), two = all(2.0f);
  const V s1 = add(m[1], m[2]), d1 = sub(m[1], m[2]), s2 = add(m[3], m[4]), d2 = sub(m[3], m[4]);
  y[0] = fma(a, s2, fma(two, s1, m[0]));
  y[1] = fma(b, d1, d2);
  y[2] = fma(b, s2, s1);
  y[3] = fma(two, d2, fma(a, d1, m[5]));
}

// One 4x4 tile from m[e * plane + c] to `out`.
template <int C, bool kResidual, bool kRelu, bool kScale, bool kMask = false>
RESENS_INLINE void output_tile(const float* m, int64_t plane, float* out, const float* residual, int64_t pitch, int channels, V scale,
                               const uint8_t* mask = nullptr) {
  const int stride = C ? C : channels;
  const V a = all(kA), b = all(kB), two = all(2.0f);
  RESENS_ROLLED for (int c = 0; c < stride; c += W, m += W, out += W, residual += W) {
    V p[6], q[6], y[4];
#define RESENS_M(i, j) load(m + ((i) * 6 + (j)) * plane)
    const auto put = [&](int i, const V* line) RESENS_INLINED {
      output_line(line, y);
      RESENS_UNROLL for (int j = 0; j < 4; ++j) {
        V v = y[j];
        if (kResidual) v = add(v, load(residual + i * pitch + j * stride));
        if (kRelu) v = relu(v);
        if (kScale) v = mul(v, scale);
        if (kMask) v = keep(v, mask, i * pitch + j * stride + c);
        store(out + i * pitch + j * stride, v);
      }
    };
    RESENS_UNROLL for (int j = 0; j < 6; ++j) {
      const V s1 = add(RESENS_M(1, j), RESENS_M(2, j)), s2 = add(RESENS_M(3, j), RESENS_M(4, j));
      p[j] = fma(a, s2, fma(two, s1, RESENS_M(0, j)));
      q[j] = fma(b, s2, s1);
    }
    put(0, p);
    put(2, q);
    RESENS_UNROLL for (int j = 0; j < 6; ++j) {
      const V d1 = sub(RESENS_M(1, j), RESENS_M(2, j)), d2 = sub(RESENS_M(3, j), RESENS_M(4, j));
      p[j] = fma(b, d1, d2);
      q[j] = fma(two, d2, fma(a, d1, RESENS_M(5, j)));
    }
    put(1, p);
    put(3, q);
#undef RESENS_M
  }
}

// A tile that hangs over the border: transformed aside, then only its pixels inside the image are finished.
RESENS_INLINE void output_border_tile(const ConvCall& call, const float* m, int64_t plane, float* out, const float* residual, const uint8_t* mask,
                                      int rows, int columns) {
  alignas(64) float aside[16 * W];
  const V scale = all(call.out_scale);
  for (int c = 0; c < call.out_stride; c += W) {
    output_tile<W, false, false, false>(m + c, plane, aside, aside, 4 * W, W, scale);
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const int64_t at = i * call.out_pitch + static_cast<int64_t>(j) * call.out_stride + c;
        V v = load(aside + (i * 4 + j) * W);
        if (call.residual) v = add(v, load(residual + at));
        if (call.relu) v = relu(v);
        if (call.out_scale != 1.0f) v = mul(v, scale);
        if (mask) v = keep(v, mask, at);
        store(out + at, v);
      }
    }
  }
}

// Six rows of one image with the prologue applied, small enough for L1: a ring, in which the next row of windows
// replaces four.
template <int C>
struct Strip {
  float* ring;  // [6][pitch]
  int64_t pitch;
  int image = -1, ty = 0;

  RESENS_INLINE void zero(float* row, int64_t count) {
    for (int64_t i = 0; i < count; i += W) store(row + i, all(0.0f));
  }

  Rows rows(const ConvCall& call, int at_image, int at_ty) {
    const int stride = C ? C : call.in_stride;
    const int64_t filled = static_cast<int64_t>(call.width) * stride;
    if (image < 0) zero(ring, 6 * pitch);  // the borders stay zero
    const int known = image == at_image && ty == at_ty ? 6 : image == at_image && ty + 1 == at_ty ? 2 : 0;
    image = at_image, ty = at_ty;
    Rows found;
    for (int r = 0; r < 6; ++r) {
      float* row = ring + (4 * ty + r) % 6 * pitch;
      found.row[r] = row;
      if (r < known) continue;
      const int y = 4 * ty - 1 + r;
      float* to = row + stride;
      if (y < 0 || y >= call.height) {
        zero(to, filled);
        continue;
      }
      const float* from = static_cast<const float*>(call.in) + image * call.in_image + (y + 1) * call.in_pitch + stride;
      for (int c = 0; c < stride; c += W) {
        const V scale = load(call.scale + c), shift = load(call.shift + c);
        for (int64_t i = c; i < filled; i += stride) store(to + i, relu(fma(scale, load(from + i), shift)));
      }
    }
    return found;
  }
};

// MR tiles x NR vectors of output channels, kept in registers over all input channels. `ahead` is fetched meanwhile:
// the weights that come next.
template <class Op, int MR, int NR, int CI>
RESENS_INLINE void product(const typename Op::T* v, const typename Op::T* u, const float* start, float* m, int depth, int out_stride,
                           const char* ahead) {
  const int ci = CI ? CI : depth, steps = ci / Op::kPairs;
  V sum[MR][NR];
  RESENS_UNROLL for (int n = 0; n < NR; ++n) {
    const V s = load(start + n * W);
    RESENS_UNROLL for (int p = 0; p < MR; ++p) sum[p][n] = s;
  }
  _Pragma("GCC unroll 4") for (int i = 0; i < steps; ++i) {
    const int c = Op::kSwap ? i ^ 1 : i;
    if ((i & 1) == 0) __builtin_prefetch(ahead + i * 32);
    typename Op::X w[NR];
    RESENS_UNROLL for (int n = 0; n < NR; ++n) w[n] = Op::weights(u + (c * NR + n) * W * Op::kPairs);
    RESENS_UNROLL for (int p = 0; p < MR; ++p) {
      const typename Op::X x = Op::broadcast(v + static_cast<int64_t>(p) * ci + c * Op::kPairs);
      RESENS_UNROLL for (int n = 0; n < NR; ++n) sum[p][n] = Op::mac(sum[p][n], x, w[n]);
    }
  }
  RESENS_UNROLL for (int p = 0; p < MR; ++p) {
    RESENS_UNROLL for (int n = 0; n < NR; ++n) store(m + static_cast<int64_t>(p) * out_stride + n * W, sum[p][n]);
  }
}

// All tiles of a chunk times one column of NR vectors.
template <class Op, int MR, int NR, int CI>
RESENS_INLINE void column(const typename Op::T* v, const typename Op::T* u, const float* start, float* m, int tiles, int depth,
                          int out_stride) {
  const int ci = CI ? CI : depth;
  const char* ahead = reinterpret_cast<const char*>(u + static_cast<int64_t>(ci) * NR * W);
  int t = 0;
  RESENS_ROLLED for (; t + MR <= tiles; t += MR, ahead += ci / Op::kPairs * 32) {
    product<Op, MR, NR, CI>(v + static_cast<int64_t>(t) * ci, u, start, m + static_cast<int64_t>(t) * out_stride, depth, out_stride, ahead);
  }
  RESENS_ROLLED for (; t + 4 <= tiles; t += 4) {
    product<Op, 4, NR, CI>(v + static_cast<int64_t>(t) * ci, u, start, m + static_cast<int64_t>(t) * out_stride, depth, out_stride, ahead);
  }
  RESENS_ROLLED for (; t < tiles; ++t) {
    product<Op, 1, NR, CI>(v + static_cast<int64_t>(t) * ci, u, start, m + static_cast<int64_t>(t) * out_stride, depth, out_stride, ahead);
  }
}

#if RESENS_WIDTH == 16
// 16 -> 16 channels: the whole matrix of one e stays in 16 registers and the products wait for nothing but themselves.
template <class Op, int MR>
RESENS_INLINE void product_resident(const typename Op::T* v, const typename Op::X* w, V start, float* m) {
  constexpr int steps = 16 / Op::kPairs;
  V sum[MR];
  RESENS_UNROLL for (int p = 0; p < MR; ++p) sum[p] = start;
  RESENS_UNROLL for (int i = 0; i < steps; ++i) {
    const int c = Op::kSwap ? i ^ 1 : i;
    RESENS_UNROLL for (int p = 0; p < MR; ++p) sum[p] = Op::mac(sum[p], Op::broadcast(v + p * 16 + c * Op::kPairs), w[c]);
  }
  RESENS_UNROLL for (int p = 0; p < MR; ++p) store(m + p * 16, sum[p]);
}

template <class Op>
RESENS_INLINE void column_resident(const typename Op::T* v, const typename Op::T* u, const float* start, float* m, int tiles) {
  constexpr int steps = 16 / Op::kPairs;
  typename Op::X w[steps];
  RESENS_UNROLL for (int c = 0; c < steps; ++c) w[c] = Op::weights(u + c * 16 * Op::kPairs);
  const V s = load(start);
  int t = 0;
  RESENS_ROLLED for (; t + 8 <= tiles; t += 8) product_resident<Op, 8>(v + t * 16, w, s, m + t * 16);
  RESENS_ROLLED for (; t + 4 <= tiles; t += 4) product_resident<Op, 4>(v + t * 16, w, s, m + t * 16);
  RESENS_ROLLED for (; t < tiles; ++t) product_resident<Op, 1>(v + t * 16, w, s, m + t * 16);
}
constexpr int kColumns = 4;  // 6 tiles x 4 vectors: 24 sums, 4 weights, and broadcasts
constexpr int kRows1 = 12, kRows2 = 12, kRows3 = 8, kRows4 = 6;
#else
constexpr int kColumns = 2;  // 6 tiles x 2 vectors in 16 registers
constexpr int kRows1 = 8, kRows2 = 6, kRows3 = 4, kRows4 = 3;
#endif

// Tiles of a chunk. At 16 channels V stays in L1 (half as many cycles in the input transform as with twice the tiles);
// above, smaller chunks would fetch the weights from L2 more often than they save (benchmarks/NOTES.md).
RESENS_INLINE int chunk_tiles(int ci, int co) {
  if (ci == 16 && co == 16) return 8;
  if (ci == 32 && co == 32) return 32;
  const int tiles = 2500000 / (144 * (ci + co)) / 8 * 8;
  return tiles > 64 ? 64 : tiles < 8 ? 8 : tiles;
}

static int64_t winograd_scratch(int ci, int co, int64_t pitch) {
  const int64_t tiles = chunk_tiles(ci, co);
  return 144 * ((tiles * ci + 16) + (tiles * co + 16) + co) + 24 * pitch + 256;
}

template <class Op, int CI, int CO>
static void winograd(const ConvCall& call) {
  typedef typename Op::T T;
  const int ci = CI ? CI : call.in_stride, co = CO ? CO : call.out_stride;
  const int most = CI && CO ? chunk_tiles(CI, CO) : chunk_tiles(ci, co);
  // Planes are no power of two apart, or all 36 would meet in the same cache set.
  const int64_t plane_v = static_cast<int64_t>(most) * ci + 16 * Op::kPairs;
  // One column holds all outputs: a tile's products are finished before they are stored, so M may take V's place.
  constexpr bool in_place = CI && CI == CO && CO <= kColumns * W && sizeof(T) == sizeof(float);
  const int64_t plane_m = in_place ? plane_v : static_cast<int64_t>(most) * co + 16;
  Strip<CI> strip = {static_cast<float*>(call.scratch), call.in_pitch};
  float* start = strip.ring + (call.scale ? 6 * call.in_pitch : 0);
  T* v = reinterpret_cast<T*>(start + 36 * co);
  float* m = in_place ? reinterpret_cast<float*>(v) : reinterpret_cast<float*>(v + 36 * plane_v);

  for (int e = 0; e < 36; ++e) {
    const V q = all(kStart[e] * call.gate);
    for (int c = 0; c < co; c += W) store(start + e * co + c, mul(load(call.bias + c), q));
  }
  const int across = (call.width + 3) / 4, tiles_of_image = (call.height + 3) / 4 * across, total = tiles_of_image * call.images;
  const float* in = static_cast<const float*>(call.in);
  const T* u = static_cast<const T*>(call.weight);
  const V scale = all(call.out_scale);
  const bool scaled = call.out_scale != 1.0f;
  for (int first = 0; first < total; first += most) {
    const int tiles = total - first < most ? total - first : most;
    int image = first / tiles_of_image, ty = first % tiles_of_image / across, tx = first % across;
    const int image0 = image, ty0 = ty, tx0 = tx;
    for (int t = 0; t < tiles;) {
      const int run = across - tx < tiles - t ? across - tx : tiles - t;
      const Rows rows = call.scale ? strip.rows(call, image, ty) : rows_at(in + image * call.in_image + ty * 4 * call.in_pitch, call.in_pitch);
      input_run<Op, CI>(rows, static_cast<int64_t>(tx) * 4 * ci, ci, v + static_cast<int64_t>(t) * ci, plane_v, run);
      t += run, tx += run;
      if (tx == across) tx = 0, ++ty;
      if (ty * across == tiles_of_image) ty = 0, ++image;
    }
    for (int e = 0; e < 36; ++e) {
      const T *ve = v + e * plane_v, *ue = u + static_cast<int64_t>(e) * ci * co;
      const float* se = start + e * co;
      float* me = m + e * plane_m;
#if RESENS_WIDTH == 16
      if (CI == 16 && CO == 16) {
        column_resident<Op>(ve, ue, se, me, tiles);
        continue;
      }
#endif
      int n = 0;
      for (; n + kColumns * W <= co; n += kColumns * W) {
        column<Op, kColumns == 4 ? kRows4 : kRows2, kColumns, CI>(ve, ue + static_cast<int64_t>(n) * ci, se + n, me + n, tiles, ci, co);
      }
      const int rest = (co - n) / W;
      const T* un = ue + static_cast<int64_t>(n) * ci;
      if (rest == 1) column<Op, kRows1, 1, CI>(ve, un, se + n, me + n, tiles, ci, co);
      if (kColumns > 2 && rest == 2) column<Op, kRows2, 2, CI>(ve, un, se + n, me + n, tiles, ci, co);
      if (kColumns > 2 && rest == 3) column<Op, kRows3, 3, CI>(ve, un, se + n, me + n, tiles, ci, co);
    }
    image = image0, ty = ty0, tx = tx0;
    for (int t = 0; t < tiles; ++t) {
      const int64_t at = image * call.out_image + ty * 4 * call.out_pitch + static_cast<int64_t>(tx) * 4 * co;
      const float* mt = m + static_cast<int64_t>(t) * co;
      float* out = call.out + at;
      const float* residual = call.residual ? call.residual + at : out;
      const uint8_t* mask = call.mask ? call.mask + at / 8 : nullptr;
      const int rows = call.height - ty * 4, columns = call.width - tx * 4;
      if (rows < 4 || columns < 4) {
        output_border_tile(call, mt, plane_m, out, residual, mask, rows < 4 ? rows : 4, columns < 4 ? columns : 4);
      } else if (mask) {
        if (scaled) output_tile<CO, false, false, true, true>(mt, plane_m, out, residual, call.out_pitch, co, scale, mask);
        else output_tile<CO, false, false, false, true>(mt, plane_m, out, residual, call.out_pitch, co, scale, mask);
      } else if (call.residual) {
        if (call.relu) output_tile<CO, true, true, false>(mt, plane_m, out, residual, call.out_pitch, co, scale);
        else output_tile<CO, true, false, false>(mt, plane_m, out, residual, call.out_pitch, co, scale);
      } else if (call.relu) {
        if (scaled) output_tile<CO, false, true, true>(mt, plane_m, out, residual, call.out_pitch, co, scale);
        else output_tile<CO, false, true, false>(mt, plane_m, out, residual, call.out_pitch, co, scale);
      } else {
        output_tile<CO, false, false, true>(mt, plane_m, out, residual, call.out_pitch, co, scale);
      }
      if (++tx == across) tx = 0, ++ty;
      if (ty * across == tiles_of_image) ty = 0, ++image;
    }
  }
}

// The widths of CIFAR networks get their own code, with constant strides; every other width shares one.
template <class Op>
static void winograd_any(const ConvCall& call) {
  if (call.in_stride == 16 && call.out_stride == 16) return winograd<Op, 16, 16>(call);
  if (call.in_stride == 32 && call.out_stride == 32) return winograd<Op, 32, 32>(call);
  if (call.in_stride == 64 && call.out_stride == 64) return winograd<Op, 64, 64>(call);
  winograd<Op, 0, 0>(call);
}

}  // namespace resens::cpu::RESENS_ISA
