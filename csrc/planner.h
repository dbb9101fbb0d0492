// A sweep becomes a plan: words -> prefix trie -> tape or levels. Standard library only; see planner.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"

namespace resens {

// The words of a sweep: word c is letters offsets[c] .. offsets[c + 1] of the three letter arrays.
struct WordsView {
  const int64_t* offsets;    // [count + 1]
  const int32_t* blocks;     // [letters], below `alphabet`
  const float* gates;        // [letters]; equal when their bits are, after -0 has become 0
  const int32_t* positions;  // [letters], place in the network, below `alphabet`
  int64_t count;             // configurations
  int64_t letters;           // length of the letter arrays
  int32_t alphabet;          // blocks of the network
};

struct Tape {
  std::vector<Instruction> instructions;
  std::vector<float> gates;
  int32_t slots = 0;
};

struct Levels {
  std::vector<Step> steps;
  std::vector<float> gates;
  int32_t buffers = 0;
  int32_t levels = 0;
};

// The prefix trie of a sweep. Nodes stand in preorder (node 0 is the empty prefix), so the sub-trie of v is the range
// v .. v + size[v], its first child is v + 1 and the sibling after c is c + size[c]: nothing here recurses over depth.
class Trie {
 public:
  // Throws std::invalid_argument with a full sentence when the arrays contradict each other.
  explicit Trie(const WordsView& view);

  Tape tape() const;                       // depth-first, the child with most words last
  Levels levels(int64_t budget) const;     // breadth-first over sub-tries that fit; throws when the budget is too small
  int64_t least_budget() const;            // the smallest budget that levels() accepts

  int64_t requested_runs = 0;  // RUN letters of all configurations, duplicates included
  int64_t executed_runs = 0;   // RUN letters of the trie
  int64_t words = 0;           // unique words, numbered in order of first appearance
  std::vector<int64_t> word_of;  // [count] configuration -> word

  // One entry per node. The letter of node 0 means nothing.
  std::vector<int32_t> parent, block, position, size, children, weight;  // weight: unique words in the sub-trie
  std::vector<int32_t> word;                                             // -1 where no word ends
  std::vector<float> gate;

  int64_t nodes() const { return static_cast<int64_t>(parent.size()); }
  Op op(int64_t node) const { return gate[node] == 0.0f ? SHORTCUT : RUN; }

 private:
  int64_t add(int64_t above, int32_t letter_block, float letter_gate, int32_t letter_position);
};

}  // namespace resens
