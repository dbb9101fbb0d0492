// The contract between the host (program.cpp, ops_cuda.cpp) and the tape kernel: plain structs, integer offsets, no torch, no CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define RF_BOTH __host__ __device__
#else
#define RF_BOTH
#endif

namespace resens::cuda {

constexpr int kThreads = 256;
constexpr int kStages = 3;
constexpr int kMaxClasses = 448;  // what fits beside the pooled features in the head's shared memory

// A variant of the kernel is its images per CTA and its width, the channels of the first stage: (2, 16) where 197 KB of shared memory are, (1, 16) everywhere,
// (1, 32) for wide networks of 32, 64 and 128 channels where 221 KB are.
RF_BOTH constexpr int channels_of(int width, int stage) { return width << stage; }
RF_BOTH constexpr int side_of(int stage) { return 32 >> stage; }

// One instruction of the device tape. `code` packs opcode | stage << 8 | flags << 16; the stage is that of the state after it.
enum Opcode : int32_t {
  kLoad = 0,     // state = stem's output
  kSave = 1,     // slot[argument] = state
  kRestore = 2,  // state = slot[argument]
  kRun = 3,      // identity block
  kChange = 4,   // transition block: state of stage - 1 in, of stage out
  kRelu = 5,     // a deleted identity block that ends in a ReLU
  kHead = 6,     // tally word `argument`
  kEnd = 7
};
enum Flag : int32_t {
  kScaled = 1,     // pre-activation: the branch reads relu(scale * x + shift)
  kClosing = 2,    // ReLU after the addition
  kProjected = 4,  // 1x1 projection shortcut (else option A)
  kActivated = 8,  // the shortcut reads the branch's input h, not x (only with a prologue or a projection)
  kSkipped = 16    // SHORTCUT: no branch
};
struct alignas(16) Instruction {
  int32_t code, argument, parameters;  // argument: slot, word, or the zero channels before an option-A shortcut; parameters: offset in floats
  float gate;
};
// Floats at `parameters`: bias1[C] bias2[C] scale[Cin] shift[Cin] projection_bias[C], present or not (unused ones are not read), offsets multiples of two.

struct alignas(8) Chunk { uint32_t offset, sixteens; };  // a piece of the weight stream: bytes from the start, length / 16
struct alignas(8) Part { int32_t instruction, chunk; };  // a sub-tape: where its instructions and its chunks start

// Weights: B fragments of mma.m16n8k16, [convolution][dx][k / 16][dy][n / 16][lane][4 registers][2], in 16-bit operands; a 1x1 projection is [k / 16][n / 16][...]
// and comes before the block's convolutions. A group is one (dx, k / 16) with its three dy; a chunk is `groups_per_chunk` groups.
RF_BOTH constexpr int group_bytes(int width, int stage) { return 3 * (channels_of(width, stage) / 16) * 512; }
RF_BOTH constexpr int groups_per_chunk(int images, int width, int stage) {
  if (stage == 0) return 3 * width / 16;  // the whole convolution, which is walked over in sub-blocks of rows
  if (width == 32) return stage == 1 ? 3 : 1;
  return stage == 1 ? (images == 1 ? 2 : 3) : (images == 1 ? 1 : 2);
}
RF_BOTH constexpr int entry_groups_per_chunk(int images, int width, int stage) {  // the stride-2 convolution into `stage` has half the input channels
  return (3 * channels_of(width, stage - 1) / 16) % groups_per_chunk(images, width, stage) == 0 ? groups_per_chunk(images, width, stage) : 1;
}
RF_BOTH constexpr int chunk_bytes(int images, int width, int stage) { return group_bytes(width, stage) * groups_per_chunk(images, width, stage); }
RF_BOTH constexpr int projection_bytes(int width, int stage) { return (channels_of(width, stage - 1) / 16) * (channels_of(width, stage) / 16) * 512; }

// Shared memory of a variant: operand buffers X and Y, weight ring, head, item number.
constexpr int kRingSlots = 4;
RF_BOTH constexpr int larger(int a, int b) { return a > b ? a : b; }
RF_BOTH constexpr int buffer_bytes(int images, int width, int stage) {
  return images * (channels_of(width, stage) / 8) * (side_of(stage) + 2) * (side_of(stage) + 2) * 16;
}
RF_BOTH constexpr int buffer_bytes(int images, int width) {
  return larger(buffer_bytes(images, width, 0), larger(buffer_bytes(images, width, 1), buffer_bytes(images, width, 2)));
}
RF_BOTH constexpr int ring_slot_bytes(int images, int width) {
  return larger(chunk_bytes(images, width, 0), larger(chunk_bytes(images, width, 1), chunk_bytes(images, width, 2)));
}
RF_BOTH constexpr int head_bytes(int images, int width) { return images * side_of(2) * channels_of(width, 2) * 4; }
RF_BOTH constexpr int shared_bytes(int images, int width) {
  return 2 * buffer_bytes(images, width) + kRingSlots * ring_slot_bytes(images, width) + head_bytes(images, width) + 16;
}
static_assert(shared_bytes(1, 16) <= 99 * 1024, "one image must fit the 99 KB of sm_86, sm_89 and sm_120");
static_assert(shared_bytes(2, 16) <= 227 * 1024, "two images must fit sm_90 and sm_100");
static_assert(shared_bytes(1, 32) <= 227 * 1024, "a wide image must fit sm_90 and sm_100; the 163 KB of sm_80 are too few");
static_assert(projection_bytes(16, 2) <= ring_slot_bytes(1, 16) && projection_bytes(32, 2) <= ring_slot_bytes(1, 32), "a projection is one chunk");

// Floats of one slot: the state of the first stage, which is the largest.
RF_BOTH constexpr int slot_floats(int images, int width) { return images * width * 32 * 32; }

struct Arguments {
  const Instruction* tape;
  const Chunk* chunks;
  const Part* parts;                // [part_count]
  const unsigned char* weights;
  const float* parameters;
  const float* stem;                // [tiles * images, 32, 32, width]
  const int32_t* labels;            // [image_count]
  float* slots;                     // [CTAs, slot_count, slot_floats]
  unsigned long long* tally;        // [words, 3]: errors, loss in 2^-24, non-finite
  float* logits;                    // [words, image_count, classes] or null
  int32_t* next_item;               // 0 at launch
  int32_t part_count, tile_count, image_count, slot_count, classes;
  int32_t head, head_scaled, head_relu;  // parameters: weight[classes][C] bias[classes rounded up to two] scale[C] shift[C], C = 4 width
};
}  // namespace resens::cuda
