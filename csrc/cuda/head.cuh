// HEAD: relu(scale x + shift) where the network has it, global average pool, linear, and the tallies of one word.
//
// Row sums by shuffles, [image][row][64] in shared memory; rows are then added in order, so the sum is the same in every variant. One warp per image finds the
// prediction (lowest index of the maximum) and the loss; three integer atomics per image, so the result does not depend on the order of CTAs.
#pragma once
#include "block.cuh"

namespace resens::cuda {

RF_DEV bool finite(float v) { return v - v == 0.f; }

// Errors, loss and non-finite of one image from its logits in shared memory; by one warp.
RF_DEV void score(SharedAddress logits, int classes, int label, int lane, unsigned long long* tally) {
  float best = 0.f, bad = 0.f;
  int index = 1 << 30;
  for (int k = lane; k < classes; k += 32) {
    float z = lds_float(logits + k * 4);
    if (!finite(z)) bad = 1.f;
    if (index == 1 << 30 || z > best) { best = z; index = k; }
  }
#pragma unroll 1
  for (int m = 1; m < 32; m *= 2) {
    float z = shuffle_xor(best, m);
    int k = static_cast<int>(shuffle_xor(static_cast<float>(index), m));  // below 2^24, or 2^30: exact
    if (k != 1 << 30 && (index == 1 << 30 || z > best || (z == best && k < index))) { best = z; index = k; }
    float other = shuffle_xor(bad, m);
    bad = bad + other;
  }
  float sum = 0.f;
  for (int k = lane; k < classes; k += 32) sum += expf(lds_float(logits + k * 4) - best);
#pragma unroll 1
  for (int m = 1; m < 32; m *= 2) sum += shuffle_xor(sum, m);
  if (lane != 0) return;
  if (bad > 0.f) {
    add_global(tally, 1);
    add_global(tally + 2, 1);
    return;
  }
  if (index != label) add_global(tally, 1);
  double loss = static_cast<double>(best - lds_float(logits + label * 4)) + static_cast<double>(logf(sum));
  if (loss > 65536.0) loss = 65536.0;
  add_global(tally + 1, static_cast<unsigned long long>(static_cast<long long>(rint(loss * 16777216.0))));
}

template <class G> RF_DEV void run_head(const float* x, const G& g, SharedAddress head, const Arguments& a, int word, int tile) {
  const float* parameters = a.parameters + a.head;
  const float* bias = parameters + a.classes * G::kChannels;
  const float* scale = bias + ((a.classes + 1) & ~1);
  constexpr int kSums = G::kSide * G::kChannels * 4;  // bytes per image
#pragma unroll
  for (int tile_n = 0; tile_n < G::kTiles; tile_n++) {
    Float2 s{1.f, 1.f}, t{0.f, 0.f};
    if (a.head_scaled) { s = load_pair(scale + g.channel(tile_n)); t = load_pair(scale + G::kChannels + g.channel(tile_n)); }
#pragma unroll
    for (int o = 0; o < G::kRows; o++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float v = x[G::element(o, tile_n) + 2 * h + e];
          if (a.head_scaled) v = fmaf(v, e ? s.y : s.x, e ? t.y : t.x);
          if (a.head_relu) v = relu(v);
          v += shuffle_xor(v, 4);
          v += shuffle_xor(v, 8);
          v += shuffle_xor(v, 16);
          int im, y, px;
          g.pixel(o, h, im, y, px);
          if (g.lane < 4) sts_float(head + im * kSums + (y * G::kChannels + g.channel(tile_n) + e) * 4, v);
        }
  }
  barrier();
  int thread = thread_id();
  if (thread < G::kImages * G::kChannels) {
    SharedAddress p = head + (thread / G::kChannels) * kSums + (thread % G::kChannels) * 4;
    float sum = 0.f;
    for (int y = 0; y < G::kSide; y++) sum += lds_float(p + y * G::kChannels * 4);
    sts_float(p, sum * (1.f / (G::kSide * G::kSide)));
  }
  barrier();
  for (int i = thread; i < G::kImages * a.classes; i += kThreads) {  // logits go where rows 1 to 7 were
    int im = i / a.classes, k = i % a.classes;
    float z = load_global(bias + k);
    for (int c = 0; c < G::kChannels; c++) z = fmaf(lds_float(head + im * kSums + c * 4), load_global(parameters + k * G::kChannels + c), z);
    sts_float(head + im * kSums + (G::kChannels + k) * 4, z);
    int n = tile * G::kImages + im;
    if (a.logits && n < a.image_count) store_state(a.logits + (static_cast<size_t>(word) * a.image_count + n) * a.classes + k, z);
  }
  barrier();
  int im = thread >> 5, n = tile * G::kImages + im;
  if (im < G::kImages && n < a.image_count)
    score(head + im * kSums + G::kChannels * 4, a.classes, load_global(a.labels + n), g.lane, a.tally + static_cast<size_t>(word) * 3);
  barrier();  // the next HEAD writes the sums
}
}  // namespace resens::cuda
