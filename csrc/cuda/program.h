// From a plan's tape to what the kernel reads: the tape is cut into parts of about equal cost (sub-tries with the prefix they need recomputed), each part becomes
// a tape of its own with the list of weight chunks it will consume. Host code without torch and CUDA.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tape.h"

namespace resens::cuda {

struct BlockInfo {      // one row of the packed network's table
  int32_t stage;        // of its output
  int32_t changes;      // 1: a transition block
  int32_t flags;        // Flag, without kSkipped
  int32_t before;       // option A: zero channels before
  int32_t parameters;   // floats
  int32_t weights;      // bytes
};

struct Program {
  std::vector<Instruction> tape;
  std::vector<Chunk> chunks;
  std::vector<Part> parts;
  std::vector<double> cost;  // per part, in identity blocks
  std::vector<int32_t> words;  // per part
  int32_t slots = 0;
};

// `tape` [length, 2] and `gates` [length] as plan.h defines them. Throws std::invalid_argument with one sentence when an instruction does not fit the network.
Program build_program(const int32_t* tape, const float* gates, size_t length, const BlockInfo* blocks, int block_count, int images, int width, int parts);
}  // namespace resens::cuda
