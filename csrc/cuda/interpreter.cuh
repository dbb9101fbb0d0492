// The tape interpreter: a persistent CTA takes (part, tile of images) items and runs the part's instructions on the tile.
//
// Mapping: 256 threads; the tile's residual stream in registers (geometry.cuh), operands and weights in shared memory, slots in global memory (L2 as long as they fit:
// CTAs * slots * 4 KB * width per image). One function per stage: register arrays that lived across stages would spill; the stream crosses through shared memory.
// Traffic per item: stem's output once per LOAD, a slot's state per SAVE and RESTORE, weights of every block from L2; what comes out is integers.
#pragma once
#include "head.cuh"

namespace resens::cuda {

template <class G> RF_DEV void load_stem(float* x, const G& g, const float* stem) {  // [images, 32, 32, width]
#pragma unroll
  for (int o = 0; o < G::kRows; o++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int im, y, px;
      g.pixel(o, h, im, y, px);
#pragma unroll
      for (int tile = 0; tile < G::kTiles; tile++) {
        Float2 v = load_state(reinterpret_cast<const Float2*>(stem + ((static_cast<size_t>(im) * G::kSide + y) * G::kSide + px) * G::kChannels + g.channel(tile)));
        x[G::element(o, tile) + 2 * h] = v.x;
        x[G::element(o, tile) + 2 * h + 1] = v.y;
      }
    }
}
// A slot is [register / 4][thread][4]: every thread gets back what it stored, so no barrier is needed.
template <class G> RF_DEV void save(const float* x, float* slot, int thread) {
#pragma unroll
  for (int i = 0; i < G::kRegisters / 4; i++)
    store_state(reinterpret_cast<Float4*>(slot) + i * kThreads + thread, Float4{x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]});
}
template <class G> RF_DEV void restore(float* x, const float* slot, int thread) {
#pragma unroll
  for (int i = 0; i < G::kRegisters / 4; i++) {
    Float4 v = load_state(reinterpret_cast<const Float4*>(slot) + i * kThreads + thread);
    x[4 * i] = v.x; x[4 * i + 1] = v.y; x[4 * i + 2] = v.z; x[4 * i + 3] = v.w;
  }
}

// Runs instructions while the state is of G's stage. GI: the stage before, GO: after (their own at the ends).
template <class T, class GI, class G, class GO, class S>
RF_DEV void run_stage(S& stream, SharedAddress X, SharedAddress Y, SharedAddress head, const Arguments& a, Cursor& at, int tile) {
  float x[G::kRegisters];
#pragma unroll
  for (int i = 0; i < G::kRegisters; i++) x[i] = 0.f;  // ends the live range: the stages' arrays would otherwise be carried around the tape loop together
  int code = at.code();
  bool entered = false;
  if constexpr (G::kStage > 0) {
    if (opcode_of(code) == kChange) {
      G g(thread_id());
      enter_stage<T, GI, G>(x, g, X, Y, stream, a, at);
      at.at++;
      code = at.code();
      entered = true;
    }
  }
  if (!entered) {
    barrier();  // other warps may still read the buffers in the old layout
    zero_halo<G>(X, thread_id());
    zero_halo<G>(Y, thread_id());
  }
  for (;;) {
    int op = opcode_of(code);
    G g(thread_id());
    if constexpr (G::kStage < kStages - 1) {
      if (op == kChange) { leave_stage<T, G>(x, g, X, Y, a, at); return; }
    }
    if (op == kEnd || stage_of(code) != G::kStage) return;
    if (op == kRun) {
      run_block<T, G>(x, g, X, Y, stream, a, at);
    } else if (op == kRelu) {
      close_with_relu<G>(x);
    } else if (op == kLoad) {
      if constexpr (G::kStage == 0) load_stem<G>(x, g, a.stem + static_cast<size_t>(tile) * G::kImages * G::kSide * G::kSide * G::kChannels);
    } else if (op == kHead) {
      if constexpr (G::kStage == kStages - 1) run_head<G>(x, g, head, a, at.argument(), tile);
    } else {
      float* slot = a.slots + (static_cast<size_t>(cta_id()) * a.slot_count + at.argument()) * slot_floats(G::kImages, G::kWidth);
      if (op == kSave) save<G>(x, slot, thread_id());
      else restore<G>(x, slot, thread_id());
    }
    at.at++;
    code = at.code();
  }
}

template <class T, int IMAGES, int WIDTH> RF_DEV void interpret(const Arguments& a) {
  typedef Geometry<0, IMAGES, WIDTH> G0;
  typedef Geometry<1, IMAGES, WIDTH> G1;
  typedef Geometry<2, IMAGES, WIDTH> G2;
  constexpr int kBuffer = buffer_bytes(IMAGES, WIDTH), kSlotBytes = ring_slot_bytes(IMAGES, WIDTH);
  SharedAddress X = shared_base(), Y = X + kBuffer, ring = Y + kBuffer, head = ring + kRingSlots * kSlotBytes, item_at = head + head_bytes(IMAGES, WIDTH);
  for (;;) {
    if (thread_id() == 0) sts32(item_at, static_cast<uint32_t>(take_next(a.next_item)));
    barrier();
    int item = lds_int(item_at);
    if (item >= a.part_count * a.tile_count) return;
    int part = item / a.tile_count, tile = item % a.tile_count;
    Cursor at{a.tape + load_global(&a.parts[part].instruction)};
    WeightStream<kSlotBytes> stream(a, ring, a.chunks + load_global(&a.parts[part].chunk));
    for (;;) {
      int code = at.code();
      if (opcode_of(code) == kEnd) break;
      if (stage_of(code) == 0) run_stage<T, G0, G0, G1>(stream, X, Y, head, a, at, tile);
      else if (stage_of(code) == 1) run_stage<T, G0, G1, G2>(stream, X, Y, head, a, at, tile);
      else run_stage<T, G1, G2, G2>(stream, X, Y, head, a, at, tile);
    }
    cp_async_wait<0>();  // the empty entries at the end
    barrier();           // the item number and the ring are free
  }
}
}  // namespace resens::cuda
