// C entry points of the host harness for tests/test_cuda_host.py: the program builder, the stem and the tape kernels on the CPU.
//   g++ -O2 -std=c++17 -shared -fPIC csrc/testing/host.cpp csrc/cuda/program.cpp -o libhost.so        (-DRF_ONLY_TWO_IMAGES_BF16: one variant, for mutations)
#include "../cuda/interpreter.cuh"
#include "../cuda/program.h"
#include "../cuda/stem.cuh"

#include <exception>
#include <string>

using namespace resens::cuda;

namespace {
Program last_program;
std::string last_error;

template <class T, int IMAGES, int WIDTH> void tape_kernel(void* a) { interpret<T, IMAGES, WIDTH>(*static_cast<Arguments*>(a)); }
void stem_kernel(void* a) { run_stem(*static_cast<StemArguments*>(a)); }

template <class G> void read_slot(const float* slot, float* out) {  // [images, C, H, W]
  for (int t = 0; t < kThreads; t++) {
    G g(t);
    for (int o = 0; o < G::kRows; o++)
      for (int tile = 0; tile < G::kTiles; tile++)
        for (int h = 0; h < 2; h++)
          for (int e = 0; e < 2; e++) {
            int im, y, x, i = G::element(o, tile);
            g.pixel(o, h, im, y, x);
            out[((im * G::kChannels + g.channel(tile) + e) * G::kSide + y) * G::kSide + x] = slot[(i / 4 * kThreads + t) * 4 + 2 * h + e];
          }
  }
}
template <int IMAGES, int WIDTH> void read_any(int stage, const float* slot, float* out) {
  if (stage == 0) read_slot<Geometry<0, IMAGES, WIDTH>>(slot, out);
  else if (stage == 1) read_slot<Geometry<1, IMAGES, WIDTH>>(slot, out);
  else read_slot<Geometry<2, IMAGES, WIDTH>>(slot, out);
}
}  // namespace

extern "C" {
const char* rf_error() { return last_error.c_str(); }
int rf_shared_bytes(int images, int width) { return shared_bytes(images, width); }
int rf_slot_floats(int images, int width) { return slot_floats(images, width); }

// sizes: instructions, chunks, parts, slots
int rf_build(const int32_t* tape, const float* gates, int64_t length, const int32_t* blocks, int block_count, int images, int width, int parts, int64_t* sizes) {
  try {
    last_program = build_program(tape, gates, length, reinterpret_cast<const BlockInfo*>(blocks), block_count, images, width, parts);
  } catch (const std::exception& e) {
    last_error = e.what();
    return 1;
  }
  sizes[0] = last_program.tape.size();
  sizes[1] = last_program.chunks.size();
  sizes[2] = last_program.parts.size();
  sizes[3] = last_program.slots;
  return 0;
}
void rf_copy(int32_t* tape, int32_t* chunks, int32_t* parts, double* cost) {
  memcpy(tape, last_program.tape.data(), last_program.tape.size() * sizeof(Instruction));
  memcpy(chunks, last_program.chunks.data(), last_program.chunks.size() * sizeof(Chunk));
  memcpy(parts, last_program.parts.data(), last_program.parts.size() * sizeof(Part));
  memcpy(cost, last_program.cost.data(), last_program.cost.size() * sizeof(double));
}

// pointers: tape chunks parts weights parameters stem labels slots tally logits; sizes: their bytes; numbers: parts tiles images slots classes head head_scaled head_relu
void rf_run(int fp16, int images, int width, int ctas, int stride, void** pointers, const int64_t* sizes, const int32_t* numbers, simt::Report* report) {
  simt::State& s = simt::state();
  s.ranges.clear();
  for (int i = 0; i < 10; i++)
    if (pointers[i]) simt::allow(pointers[i], sizes[i], i >= 7);
  int32_t next = 0;
  simt::allow(&next, 4, true);
  Arguments a{static_cast<Instruction*>(pointers[0]), static_cast<Chunk*>(pointers[1]), static_cast<Part*>(pointers[2]), static_cast<unsigned char*>(pointers[3]),
              static_cast<float*>(pointers[4]), static_cast<float*>(pointers[5]), static_cast<int32_t*>(pointers[6]), static_cast<float*>(pointers[7]),
              static_cast<unsigned long long*>(pointers[8]), static_cast<float*>(pointers[9]), &next,
              numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7]};
  s.report = {};
  void (*kernel)(void*) = tape_kernel<Bf16, 2, 16>;
#ifndef RF_ONLY_TWO_IMAGES_BF16
  if (width == 32) kernel = fp16 ? tape_kernel<Fp16, 1, 32> : tape_kernel<Bf16, 1, 32>;
  else if (images == 1) kernel = fp16 ? tape_kernel<Fp16, 1, 16> : tape_kernel<Bf16, 1, 16>;
  else if (fp16) kernel = tape_kernel<Fp16, 2, 16>;
#endif
  simt::launch(ctas, kThreads, shared_bytes(images, width), stride, kernel, &a);
  *report = s.report;
}

// sizes: bytes of images, parameters, states
void rf_stem(const float* images, const float* parameters, float* states, const int64_t* sizes, int image_count, int padded_count, int in_channels, int width, int with_relu, simt::Report* report) {
  simt::State& s = simt::state();
  s.ranges.clear();
  simt::allow(images, sizes[0], false);
  simt::allow(parameters, sizes[1], false);
  simt::allow(states, sizes[2], true);
  StemArguments a{images, parameters, states, image_count, padded_count, in_channels, width, with_relu};
  s.report = {};
  simt::launch(3, 256, 0, 1, stem_kernel, &a);
  *report = s.report;
}

void rf_read_slot(int images, int width, int stage, const float* slot, float* out) {
  if (width == 32) read_any<1, 32>(stage, slot, out);
  else if (images == 1) read_any<1, 16>(stage, slot, out);
  else read_any<2, 16>(stage, slot, out);
}
}
