// The only contract between the host and the kernels: what a plan looks like in memory.
//
// Plain structs and integer offsets; no torch, no CUDA, no allocation, so that a kernel, a host harness and the planner
// can all include it. See planner.h for how a sweep becomes a plan.
#pragma once

#include <cstdint>

namespace resens {

// What one instruction does to the state (the activations of one tile of images between two blocks).
enum Op : int32_t {
  SAVE = 0,      // slot[arg] = state
  RESTORE = 1,   // state = slot[arg]; the slot stays valid until its last RESTORE
  RUN = 2,       // state = block[arg](state), its branch scaled by the gate (never 0)
  SHORTCUT = 3,  // state = block[arg] without its branch; only for blocks whose deletion is not the identity
  HEAD = 4,      // pool, multiply, compare with the labels, add to tally[arg]; leaves the state as it is
};

// One instruction of a tape: two int32, so that a tape is an int32 tensor [T, 2].
struct Instruction {
  int32_t op;   // Op
  int32_t arg;  // SAVE, RESTORE: slot; RUN, SHORTCUT: block; HEAD: word
};
static_assert(sizeof(Instruction) == 8, "a tape is an int32 tensor [T, 2]");

// A depth-first schedule, for engines that keep a tile's state close by. It starts with the stem's output as the state.
struct TapeView {
  const Instruction* instructions;  // [length]
  const float* gates;               // [length]; 0 where the instruction is no RUN
  int64_t length;
  int64_t words;                    // HEAD arguments are below this
  int32_t slots;                    // SAVE and RESTORE arguments are below this
};

// One step of a level schedule: five int32, so that the schedule is an int32 tensor [N, 5].
struct Step {
  int32_t op;     // RUN, SHORTCUT or HEAD
  int32_t arg;    // block, or word for HEAD
  int32_t src;    // buffer that is read
  int32_t dst;    // buffer that is written; -1 for HEAD
  int32_t level;  // never falls from one step to the next
};
static_assert(sizeof(Step) == 20, "a level schedule is an int32 tensor [N, 5]");

// A breadth-first schedule, for engines that want large uniform work. Buffer 0 holds the stem's output at the start.
// In a level the steps stand grouped by (op, arg), HEADs last. No RUN or SHORTCUT of a level reads a buffer that the
// level writes, so a group can run as one batch and groups in any order; HEADs read what their level has written
// (and the very first HEAD, that of the empty word, reads buffer 0 in a level of its own).
struct LevelsView {
  const Step* steps;   // [length]
  const float* gates;  // [length]; 0 where the step is no RUN
  int64_t length;
  int64_t words;
  int32_t buffers;     // src and dst are below this; at most the budget
  int32_t levels;
};

}  // namespace resens
