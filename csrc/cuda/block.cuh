// Residual blocks on a tile: y = shortcut(x) + gate * (W2 relu(W1 h + b1) + b2), h = relu(scale x + shift) or x, then ReLU where the block closes with one.
//
// The stream x stays in fp32 in the accumulator registers; only the 16-bit operand copy goes to shared memory: h in X, the branch's inner activation in Y. The second
// convolution accumulates onto the stream itself. The gate multiplies that convolution's operands and bias, never the stream (dividing the stream by a small
// gate would lose it). A block reads its weights once from L2 per CTA, two biases, and nothing else; barriers are those of the weight ring.
#pragma once
#include "conv.cuh"

namespace resens::cuda {

struct Cursor {  // the instruction being run; fields are loaded where they are used
  const Instruction* at;
  RF_DEV int code() const { return load_global(&at->code); }
  RF_DEV int argument() const { return load_global(&at->argument); }
  RF_DEV float gate() const { return load_global(&at->gate); }
  RF_DEV const float* parameters(const Arguments& a) const { return a.parameters + load_global(&at->parameters); }
};
RF_DEV int opcode_of(int code) { return code & 255; }
RF_DEV int stage_of(int code) { return (code >> 8) & 255; }
RF_DEV int flags_of(int code) { return code >> 16; }
RF_DEV Float2 load_pair(const float* p) { return load_global(reinterpret_cast<const Float2*>(p)); }

// Operand copy of the stream: x, or relu(scale x + shift) when `scale` is given (shift follows it).
template <class T, class G> RF_DEV void write_operands(const float* x, const G& g, SharedAddress to, const float* scale) {
#pragma unroll
  for (int tile = 0; tile < G::kTiles; tile++) {
    if (scale) {
      Float2 s = load_pair(scale + g.channel(tile)), t = load_pair(scale + G::kChannels + g.channel(tile));
#pragma unroll
      for (int o = 0; o < G::kRows; o++) {
        const float* v = x + G::element(o, tile);
        SharedAddress p = to + g.store_offset + o * G::kPitch + tile * G::kPlane;
        sts32(p, pack2_relu<T>(v[0] * s.x + t.x, v[1] * s.y + t.y));
        sts32(p + G::kHalf, pack2_relu<T>(v[2] * s.x + t.x, v[3] * s.y + t.y));
      }
    } else {
#pragma unroll
      for (int o = 0; o < G::kRows; o++) {
        const float* v = x + G::element(o, tile);
        SharedAddress p = to + g.store_offset + o * G::kPitch + tile * G::kPlane;
        sts32(p, pack2<T>(v[0], v[1]));
        sts32(p + G::kHalf, pack2<T>(v[2], v[3]));
      }
    }
  }
}
// The inner activation gate * relu(acc) of rows first .. first + ROWS.
template <class T, class G, int ROWS> RF_DEV void write_inner(float (*acc)[G::kTiles][4], const G& g, SharedAddress to, int first, float gate) {
  bool plain = gate == 1.f;  // nearly every block of nearly every word: the conversion does the ReLU
#pragma unroll
  for (int o = 0; o < ROWS; o++)
#pragma unroll
    for (int tile = 0; tile < G::kTiles; tile++) {
      SharedAddress p = to + g.store_offset + (first + o) * G::kPitch + tile * G::kPlane;
      float* v = acc[o][tile];
      if (plain) {
        sts32(p, pack2_relu<T>(v[0], v[1]));
        sts32(p + G::kHalf, pack2_relu<T>(v[2], v[3]));
      } else {
        sts32(p, pack2<T>(gate * relu(v[0]), gate * relu(v[1])));
        sts32(p + G::kHalf, pack2<T>(gate * relu(v[2]), gate * relu(v[3])));
      }
    }
}
template <class G, int ROWS> RF_DEV void start_with_bias(float (*acc)[G::kTiles][4], const G& g, const float* bias) {
#pragma unroll
  for (int tile = 0; tile < G::kTiles; tile++) {
    Float2 v = load_pair(bias + g.channel(tile));
#pragma unroll
    for (int o = 0; o < ROWS; o++) { acc[o][tile][0] = acc[o][tile][2] = v.x; acc[o][tile][1] = acc[o][tile][3] = v.y; }
  }
}
template <class G> RF_DEV void close_with_relu(float* x) {
#pragma unroll
  for (int i = 0; i < G::kRegisters; i++) x[i] = relu(x[i]);
}
// x += gate * bias2 + W2 * Y (whose operands carry the gate), then the closing ReLU.
template <class T, class G, class S> RF_DEV void add_second(float* x, const G& g, SharedAddress Y, S& stream, const Arguments& a, Cursor at) {
  const float* bias = at.parameters(a) + G::kChannels;
  float gate = at.gate();
#pragma unroll
  for (int tile = 0; tile < G::kTiles; tile++) {
    Float2 v = load_pair(bias + g.channel(tile));
    v.x *= gate;
    v.y *= gate;
#pragma unroll
    for (int o = 0; o < G::kRows; o++) { float* q = x + G::element(o, tile); q[0] += v.x; q[1] += v.y; q[2] += v.x; q[3] += v.y; }
  }
#pragma unroll 1
  for (int chunk = 0; chunk < G::kChunks; chunk++) {
    SharedAddress w = stream.acquire();
    multiply_chunk<T, G, G::kRows>(reinterpret_cast<float(*)[G::kTiles][4]>(x), g, Y, w, chunk, 0);
  }
  if (flags_of(at.code()) & kClosing) close_with_relu<G>(x);
}

// An identity block. Barriers between the writes to X and Y and their readers are those of acquire().
template <class T, class G, class S> RF_DEV void run_block(float* x, const G& g, SharedAddress X, SharedAddress Y, S& stream, const Arguments& a, Cursor at) {
  write_operands<T, G>(x, g, X, flags_of(at.code()) & kScaled ? at.parameters(a) + 2 * G::kChannels : nullptr);
  if constexpr (G::kSubRows == G::kRows) {
    float acc[G::kRows][G::kTiles][4];
    start_with_bias<G, G::kRows>(acc, g, at.parameters(a));
#pragma unroll 1
    for (int chunk = 0; chunk < G::kChunks; chunk++) {
      SharedAddress w = stream.acquire();
      multiply_chunk<T, G, G::kRows>(acc, g, X, w, chunk, 0);
    }
    write_inner<T, G, G::kRows>(acc, g, Y, 0, at.gate());
  } else if constexpr (G::kRolling) {
    SharedAddress w = stream.acquire();
    float gate = at.gate();
    Float2 bias[G::kTiles];
#pragma unroll
    for (int tile = 0; tile < G::kTiles; tile++) bias[tile] = load_pair(at.parameters(a) + g.channel(tile));
    multiply_rolling<T, G>(g, X, w, bias, [&](float(&row)[G::kTiles][4], int o) { write_inner<T, G, 1>(&row, g, Y, o, gate); });
  } else {
    SharedAddress w = stream.acquire();
#pragma unroll 1
    for (int first = 0; first < G::kRows; first += G::kSubRows) {
      float acc[G::kSubRows][G::kTiles][4];
      start_with_bias<G, G::kSubRows>(acc, g, at.parameters(a));
      multiply_chunk<T, G, G::kSubRows>(acc, g, X, w, 0, first);
      write_inner<T, G, G::kSubRows>(acc, g, Y, first, at.gate());
    }
  }
  add_second<T, G>(x, g, Y, stream, a, at);
}

// A transition block in two halves, so that the registers of only one stage are alive at a time. leave: X gets the branch's input, Y the shortcut's: the even
// pixels of x or h in fp32 [image][y][x][C] for option A, operands in the old layout for a projection that reads x. enter: shortcut into the new stream, the
// stride-2 convolution, the frames of the new layout, the second convolution.
template <class T, class GI> RF_DEV void leave_stage(const float* x, const GI& gi, SharedAddress X, SharedAddress Y, const Arguments& a, Cursor at) {
  barrier();  // other warps may still read Y in the block before
  int flags = flags_of(at.code());
  write_operands<T, GI>(x, gi, X, flags & kScaled ? at.parameters(a) + 4 * GI::kChannels : nullptr);
  if (!(flags & kProjected)) {
    constexpr int kSide = GI::kSide / 2;
    const float* scale = flags & kActivated ? at.parameters(a) + 4 * GI::kChannels : nullptr;
#pragma unroll
    for (int tile = 0; tile < GI::kTiles; tile++) {
      Float2 s{1.f, 1.f}, t{0.f, 0.f};
      if (scale) { s = load_pair(scale + gi.channel(tile)); t = load_pair(scale + GI::kChannels + gi.channel(tile)); }
#pragma unroll
      for (int o = 0; o < GI::kRows; o++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          int im, y, px;
          gi.pixel(o, h, im, y, px);
          if ((y | px) & 1) continue;
          SharedAddress p = Y + (((im * kSide + y / 2) * kSide + px / 2) * GI::kChannels + gi.channel(tile)) * 4;
          float v0 = x[GI::element(o, tile) + 2 * h], v1 = x[GI::element(o, tile) + 2 * h + 1];
          if (scale) { v0 = relu(fmaf(v0, s.x, t.x)); v1 = relu(fmaf(v1, s.y, t.y)); }
          sts_float(p, v0);
          sts_float(p + 4, v1);
        }
    }
  } else if (!(flags & kActivated)) {
    write_operands<T, GI>(x, gi, Y, nullptr);
  }
  barrier();
}
template <class T, class GI, class G, class S> RF_DEV void enter_stage(float* x, const G& g, SharedAddress X, SharedAddress Y, S& stream, const Arguments& a, Cursor at) {
  int flags = flags_of(at.code());
  if (flags & kProjected) {
    float(*acc)[G::kTiles][4] = reinterpret_cast<float(*)[G::kTiles][4]>(x);
    start_with_bias<G, G::kRows>(acc, g, at.parameters(a) + 2 * G::kChannels + 2 * GI::kChannels);
    SharedAddress w = stream.acquire();
    multiply_projection<T, GI, G>(acc, g, entry_address<GI, G>(flags & kActivated ? X : Y, g), w);
  } else {
    int before = at.argument();
#pragma unroll
    for (int o = 0; o < G::kRows; o++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        int im, y, px;
        g.pixel(o, h, im, y, px);
#pragma unroll
        for (int tile = 0; tile < G::kTiles; tile++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            int c = g.channel(tile) + e - before;
            bool real = c >= 0 && c < GI::kChannels;
            x[G::element(o, tile) + 2 * h + e] = real ? lds_float(Y + (((im * G::kSide + y) * G::kSide + px) * GI::kChannels + c) * 4) : 0.f;
          }
      }
  }
  if (flags & kSkipped) {
    barrier();  // X and Y have been read
    zero_halo<G>(X, thread_id());
    zero_halo<G>(Y, thread_id());
    if (flags & kClosing) close_with_relu<G>(x);
    return;
  }
  float acc[G::kRows][G::kTiles][4];
  start_with_bias<G, G::kRows>(acc, g, at.parameters(a));
  constexpr int kGroups = entry_groups_per_chunk(G::kImages, G::kWidth, G::kStage), kChunks = 3 * GI::kSteps / kGroups;
  SharedAddress a_address = entry_address<GI, G>(X, g);
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; chunk++) {
    SharedAddress w = stream.acquire();
    multiply_entry_chunk<T, GI, G, kGroups>(acc, g, a_address, w, chunk);
  }
  barrier();  // X and Y have been read in the old layout
  zero_halo<G>(X, thread_id());
  zero_halo<G>(Y, thread_id());
  write_inner<T, G, G::kRows>(acc, g, Y, 0, at.gate());
  add_second<T, G>(x, g, Y, stream, a, at);
}
}  // namespace resens::cuda
