// 3x3 convolutions of a tile on the tensor cores, and the weight ring that feeds them.
//
// Computes acc[o][tile] += sum over dx, k, dy of A(row o + dy - 1, column + dx - 1, k) * W(dy, dx, k, tile). Traffic per chunk: weights L2 -> shared once per CTA
// (cp.async), each B fragment shared -> registers once per warp and chunk, each A fragment once per (dx, k) and row, used for up to three rows of outputs.
#pragma once
#include "geometry.cuh"

namespace resens::cuda {

// Ring of kRingSlots chunks in shared memory. The host has written down the order of consumption over the whole part, so the prefetch crosses instructions.
template <int SLOT_BYTES> struct WeightStream {
  const Arguments& arguments;
  SharedAddress ring;
  const Chunk* next;
  int slot;

  RF_DEV WeightStream(const Arguments& a, SharedAddress r, const Chunk* first) : arguments(a), ring(r), next(first), slot(0) {
    for (int s = 0; s < kRingSlots - 1; s++) issue(s);
  }
  RF_DEV void issue(int s) {
    const unsigned char* from = arguments.weights + static_cast<uint32_t>(load_global(reinterpret_cast<const int*>(&next->offset)));
    int sixteens = load_global(reinterpret_cast<const int*>(&next->sixteens));
    SharedAddress to = ring + s * SLOT_BYTES;
#pragma unroll 1
    for (int i = thread_id(); i < sixteens; i += kThreads) cp_async16(to + i * 16, from + i * 16);
    cp_async_commit();  // also for the empty entries at the end: the wait counts groups
    next++;
  }
  // The oldest chunk's address. The barrier makes every thread's copies visible and tells that all have left the slot that is filled next.
  RF_DEV SharedAddress acquire() {
    cp_async_wait<kRingSlots - 2>();
    barrier();
    int s = slot;
    issue(s == 0 ? kRingSlots - 1 : s - 1);
    slot = s + 1 == kRingSlots ? 0 : s + 1;
    return ring + s * SLOT_BYTES;
  }
};

// B fragments of one group: three vertical taps, the warp's kTiles channel tiles.
template <class G> RF_DEV void load_taps(uint32_t (&b)[3][G::kTiles][2], SharedAddress group, const G& g) {
#pragma unroll
  for (int dy = 0; dy < 3; dy++)
#pragma unroll
    for (int p = 0; p < G::kTiles / 2; p++) {
      uint32_t t[4];
      lds128(t, group + (dy * (G::kChannels / 16) + g.warp_n * (G::kTiles / 2) + p) * 512 + g.lane * 16);
      b[dy][2 * p][0] = t[0]; b[dy][2 * p][1] = t[1]; b[dy][2 * p + 1][0] = t[2]; b[dy][2 * p + 1][1] = t[3];
    }
}

// One chunk of a stride-1 convolution over ROWS rows from `first`: A fragment of input row t meets output rows t, t - 1, t - 2.
template <class T, class G, int ROWS> RF_DEV void multiply_chunk(float (*acc)[G::kTiles][4], const G& g, SharedAddress input, SharedAddress weights, int chunk, int first) {
#pragma unroll (G::kUnroll)
  for (int q = 0; q < G::kGroups; q++) {
    int group = chunk * G::kGroups + q, dx = group / G::kSteps, k = group % G::kSteps;
    uint32_t b[3][G::kTiles][2];
    load_taps<G>(b, weights + q * G::kGroupBytes, g);
    SharedAddress a0 = input + g.a_offset + first * G::kPitch + dx * 16 + k * 2 * G::kPlane;
#pragma unroll
    for (int t = 0; t < ROWS + 2; t++) {
      uint32_t a[4];
      ldmatrix_x4(a, a0 + t * G::kPitch);
#pragma unroll
      for (int dy = 0; dy < 3; dy++) {
        int o = t - dy;
        if (o < 0 || o >= ROWS) continue;
#pragma unroll
        for (int tile = 0; tile < G::kTiles; tile++) mma_16816<T>(acc[o][tile], a, b[dy][tile][0], b[dy][tile][1]);
      }
    }
  }
}

// Rows 0 to kRows - 1 of the first convolution at 32x32, whose weights (one chunk) all fit into registers: every input row is read once and meets the outputs of
// three rows, `bias` starts a row and write(acc, row) gets it when it is complete. Against sub-blocks of four rows this reads a quarter of the weights and
// three quarters of the rows.
template <class T, class G, class W> RF_DEV void multiply_rolling(const G& g, SharedAddress input, SharedAddress weights, const Float2 (&bias)[G::kTiles], W write) {
  static_assert(G::kSteps == 1 && G::kChunks == 1, "");
  uint32_t b[3][3][G::kTiles][2];
#pragma unroll
  for (int dx = 0; dx < 3; dx++) load_taps<G>(b[dx], weights + dx * G::kGroupBytes, g);
  float acc[3][G::kTiles][4];
#pragma unroll
  for (int t = 0; t < G::kRows + 2; t++) {
    if (t < G::kRows) {
#pragma unroll
      for (int tile = 0; tile < G::kTiles; tile++) {
        float* v = acc[t % 3][tile];
        v[0] = v[2] = bias[tile].x;
        v[1] = v[3] = bias[tile].y;
      }
    }
#pragma unroll
    for (int dx = 0; dx < 3; dx++) {
      uint32_t a[4];
      ldmatrix_x4(a, input + g.a_offset + t * G::kPitch + dx * 16);
#pragma unroll
      for (int dy = 0; dy < 3; dy++) {
        int o = t - dy;
        if (o < 0 || o >= G::kRows) continue;
#pragma unroll
        for (int tile = 0; tile < G::kTiles; tile++) mma_16816<T>(acc[o % 3][tile], a, b[dx][dy][tile][0], b[dx][dy][tile][1]);
      }
    }
    if (t >= 2) write(acc[(t - 2) % 3], t - 2);
  }
}

// One chunk of GROUPS groups of the stride-2 convolution from GI's layout into G's: input row 2 o + dy - 1, lanes two pixels apart (two-way bank conflicts; two
// blocks of a network pay them).
template <class T, class GI, class G, int GROUPS> RF_DEV void multiply_entry_chunk(float (*acc)[G::kTiles][4], const G& g, SharedAddress a_address, SharedAddress weights, int chunk) {
#pragma unroll 1
  for (int q = 0; q < GROUPS; q++) {
    int group = chunk * GROUPS + q, dx = group / GI::kSteps, k = group % GI::kSteps;
    uint32_t b[3][G::kTiles][2];
    load_taps<G>(b, weights + q * G::kGroupBytes, g);
#pragma unroll
    for (int t = 0; t < 2 * G::kRows + 1; t++) {
      uint32_t a[4];
      ldmatrix_x4(a, a_address + t * GI::kPitch + dx * 16 + k * 2 * GI::kPlane);
#pragma unroll
      for (int dy = 0; dy < 3; dy++) {
        int o = t - dy;
        if (o < 0 || (o & 1) || o / 2 >= G::kRows) continue;
#pragma unroll
        for (int tile = 0; tile < G::kTiles; tile++) mma_16816<T>(acc[o / 2][tile], a, b[dy][tile][0], b[dy][tile][1]);
      }
    }
  }
}

// Lane address for the two: element (2 row - 1, 2 column - 1) of GI's padded layout.
template <class GI, class G> RF_DEV SharedAddress entry_address(SharedAddress input, const G& g) {
  constexpr int kHalf = G::kSide >= 16 ? 16 * 16 : G::kImages == 2 ? GI::kImageStride : G::kSide * GI::kPitch;
  return input + g.image * GI::kImageStride + 2 * g.row * GI::kPitch + g.column * 32 + (g.lane & 7) * 32 + ((g.lane >> 3) & 1) * kHalf + (g.lane >> 4) * GI::kPlane;
}

// acc += 1x1 stride-2 projection of the operands in GI's layout.
template <class T, class GI, class G> RF_DEV void multiply_projection(float (*acc)[G::kTiles][4], const G& g, SharedAddress a_address, SharedAddress weights) {
#pragma unroll 1
  for (int k = 0; k < GI::kSteps; k++) {
    uint32_t b[G::kTiles][2];
#pragma unroll
    for (int p = 0; p < G::kTiles / 2; p++) {
      uint32_t t[4];
      lds128(t, weights + (k * (G::kChannels / 16) + g.warp_n * (G::kTiles / 2) + p) * 512 + g.lane * 16);
      b[2 * p][0] = t[0]; b[2 * p][1] = t[1]; b[2 * p + 1][0] = t[2]; b[2 * p + 1][1] = t[3];
    }
#pragma unroll
    for (int o = 0; o < G::kRows; o++) {
      uint32_t a[4];
      ldmatrix_x4(a, a_address + (2 * o + 1) * GI::kPitch + 16 + k * 2 * GI::kPlane);
#pragma unroll
      for (int tile = 0; tile < G::kTiles; tile++) mma_16816<T>(acc[o][tile], a, b[tile][0], b[tile][1]);
    }
  }
}
}  // namespace resens::cuda
