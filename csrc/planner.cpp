// Words -> prefix trie -> tape. The level schedule is drawn in levels.cpp; plan.h says what both look like.
//
// The words are sorted; then neighbours share exactly their longest common prefix, and the trie falls out in preorder with
// flat arrays and no look-ups. 100,000 configurations of 54 blocks (4.4 million letters) take a quarter of a second.
#include "planner.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace resens {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

[[noreturn]] void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

// Letters compare as (block, gate bits): one integer each.
uint64_t letter_key(int32_t block, float gate) {
  const float plain = gate == 0.0f ? 0.0f : gate;  // -0 and 0 are the same letter
  uint32_t bits;
  std::memcpy(&bits, &plain, sizeof bits);
  return static_cast<uint64_t>(static_cast<uint32_t>(block)) << 32 | bits;
}

float key_gate(uint64_t key) {
  const uint32_t bits = static_cast<uint32_t>(key);
  float gate;
  std::memcpy(&gate, &bits, sizeof gate);
  return gate;
}

// The first four letters in 64 bits, in an order that agrees with that of the keys: it settles most comparisons of the
// sort without leaving the array that is sorted. 14 bits of block + 1 (0: the word has ended), 2 bits of gate (0, below
// 1, 1, anything else); a letter that does not fit is cut and ends the packing.
uint64_t front_letters(const uint64_t* keys, int64_t length) {
  constexpr uint32_t one = 0x3f800000;
  uint64_t front = 0;
  bool exact = true;
  for (int64_t i = 0; i < 4; ++i) {
    uint64_t code = 0;
    if (exact && i < length) {
      const uint32_t bits = static_cast<uint32_t>(keys[i]);
      const uint64_t block = std::min<uint64_t>((keys[i] >> 32) + 1, 0x3fff);
      const uint64_t gate = bits == 0 ? 0 : bits < one ? 1 : bits == one ? 2 : 3;
      exact = block < 0x3fff && gate % 2 == 0;
      code = block == 0x3fff ? block << 2 : block << 2 | gate;
    }
    front = front << 16 | code;
  }
  return front;
}

void check(const WordsView& view) {
  if (view.count < 1) refuse("a plan needs at least one configuration, but the sweep has none");
  if (view.alphabet < 0) refuse("the number of blocks is " + std::to_string(view.alphabet) + ", but it cannot be negative");
  if (view.count > kMost) refuse("a plan holds at most 2147483647 configurations, but the sweep has " + std::to_string(view.count));
  if (view.offsets[0] != 0) refuse("the first word offset is " + std::to_string(view.offsets[0]) + ", but it must be 0");
  for (int64_t c = 0; c < view.count; ++c) {
    if (view.offsets[c + 1] < view.offsets[c]) {
      refuse("word offsets must not fall, but offset " + std::to_string(c + 1) + " is " + std::to_string(view.offsets[c + 1]) +
             " after " + std::to_string(view.offsets[c]));
    }
  }
  if (view.offsets[view.count] != view.letters) {
    refuse("the last word offset is " + std::to_string(view.offsets[view.count]) + ", but there are " + std::to_string(view.letters) + " letters");
  }
  for (int64_t i = 0; i < view.letters; ++i) {
    if (view.blocks[i] < 0 || view.blocks[i] >= view.alphabet) {
      refuse("letter " + std::to_string(i) + " names block " + std::to_string(view.blocks[i]) + ", but the network has " +
             std::to_string(view.alphabet) + " blocks");
    }
    if (view.positions[i] < 0 || view.positions[i] >= view.alphabet) {
      refuse("letter " + std::to_string(i) + " stands at position " + std::to_string(view.positions[i]) + ", but the network has " +
             std::to_string(view.alphabet) + " blocks");
    }
    if (view.gates[i] != view.gates[i]) refuse("letter " + std::to_string(i) + " has a gate that is not a number");
  }
}

}  // namespace

int64_t Trie::add(int64_t above, int32_t letter_block, float letter_gate, int32_t letter_position) {
  const int64_t node = nodes();
  if (node >= kMost) refuse("the sweep needs more than 2147483647 trie nodes; split it into several sweeps");
  parent.push_back(static_cast<int32_t>(above));
  block.push_back(letter_block);
  gate.push_back(letter_gate);
  position.push_back(letter_position);
  word.push_back(-1);
  return node;
}

Trie::Trie(const WordsView& view) {
  check(view);
  std::vector<uint64_t> keys(view.letters);
  for (int64_t i = 0; i < view.letters; ++i) keys[i] = letter_key(view.blocks[i], view.gates[i]);

  struct Entry {
    uint64_t front;
    int64_t word;
  };
  std::vector<Entry> order(view.count);
  for (int64_t c = 0; c < view.count; ++c) {
    order[c] = {front_letters(keys.data() + view.offsets[c], view.offsets[c + 1] - view.offsets[c]), c};
  }
  std::sort(order.begin(), order.end(), [&](const Entry& a, const Entry& b) {
    if (a.front != b.front) return a.front < b.front;
    const uint64_t* x = keys.data() + view.offsets[a.word];
    const uint64_t* y = keys.data() + view.offsets[b.word];
    const int64_t m = view.offsets[a.word + 1] - view.offsets[a.word], n = view.offsets[b.word + 1] - view.offsets[b.word];
    const int64_t shorter = std::min(m, n);
    for (int64_t i = 0; i < shorter; ++i) {
      if (x[i] != y[i]) return x[i] < y[i];
    }
    return m != n ? m < n : a.word < b.word;  // equal words stay in order, so that the first one names the word
  });

  add(-1, -1, 0.0f, -1);
  std::vector<int32_t> path{0};     // the nodes of the word before, by depth
  std::vector<int64_t> first_of;    // unique word, in sorted order -> its first configuration
  std::vector<int64_t> sorted_word(view.count);
  const uint64_t* before = nullptr;
  for (int64_t rank = 0; rank < view.count; ++rank) {
    const int64_t c = order[rank].word;
    const int64_t begin = view.offsets[c], length = view.offsets[c + 1] - begin;
    const uint64_t* letters = keys.data() + begin;
    const int64_t shared_most = std::min<int64_t>(length, static_cast<int64_t>(path.size()) - 1);
    int64_t shared = 0;
    while (before && shared < shared_most && before[shared] == letters[shared]) {
      // Words that share a node may reach it at different positions; the smallest keeps positions rising along a path.
      int32_t& place = position[path[shared + 1]];
      place = std::min(place, view.positions[begin + shared]);
      ++shared;
    }
    path.resize(shared + 1);
    for (int64_t i = shared; i < length; ++i) {
      const uint64_t key = letters[i];
      path.push_back(static_cast<int32_t>(add(path.back(), static_cast<int32_t>(key >> 32), key_gate(key), view.positions[begin + i])));
      if (static_cast<uint32_t>(key) != 0) ++executed_runs;
    }
    int32_t& end = word[path.back()];
    if (end < 0) {
      end = static_cast<int32_t>(first_of.size());  // number in sorted order, renumbered below
      first_of.push_back(c);
    }
    sorted_word[c] = end;
    before = letters;
  }
  for (const uint64_t key : keys) requested_runs += static_cast<uint32_t>(key) != 0;

  // Number the words by first appearance, so that a sweep without duplicates has word_of = 0, 1, 2, ...
  words = static_cast<int64_t>(first_of.size());
  std::vector<int32_t> rename(words);
  word_of.resize(view.count);
  int32_t next = 0;
  for (int64_t c = 0; c < view.count; ++c) {
    if (first_of[sorted_word[c]] == c) rename[sorted_word[c]] = next++;
    word_of[c] = rename[sorted_word[c]];
  }

  const int64_t count = nodes();
  size.assign(count, 1);
  children.assign(count, 0);
  weight.assign(count, 0);
  for (int64_t v = count - 1; v >= 0; --v) {  // children stand behind their parent
    if (word[v] >= 0) {
      word[v] = rename[word[v]];
      ++weight[v];
    }
    if (v > 0) {
      size[parent[v]] += size[v];
      weight[parent[v]] += weight[v];
      ++children[parent[v]];
    }
  }
}

Tape Trie::tape() const {
  // Light children first: each holds at most half of its parent's words, so at most log2(words) slots are in use.
  struct Frame {
    int64_t next, end, heavy;  // the next child, the end of the sub-trie, the child that comes last
  };
  Tape tape;
  tape.instructions.reserve(nodes() + nodes() / 2);
  tape.gates.reserve(tape.instructions.capacity());
  const auto emit = [&](Op what, int32_t arg, float value) {
    tape.instructions.push_back({what, arg});
    tape.gates.push_back(value);
  };
  std::vector<Frame> frames;
  for (int64_t v = 0;;) {
    if (v > 0) emit(op(v), block[v], gate[v]);
    if (word[v] >= 0) emit(HEAD, word[v], 0.0f);
    if (children[v] == 1) {
      v = v + 1;
      continue;
    }
    if (children[v] > 1) {
      const int64_t end = v + size[v];
      int64_t heavy = v + 1;
      for (int64_t c = v + 1; c < end; c += size[c]) {
        if (weight[c] >= weight[heavy]) heavy = c;
      }
      emit(SAVE, static_cast<int32_t>(frames.size()), 0.0f);
      frames.push_back({v + 1, end, heavy});
      tape.slots = std::max(tape.slots, static_cast<int32_t>(frames.size()));
    } else {
      if (frames.empty()) break;
      emit(RESTORE, static_cast<int32_t>(frames.size()) - 1, 0.0f);
    }
    Frame& frame = frames.back();
    if (frame.next == frame.heavy) frame.next += size[frame.heavy];
    if (frame.next < frame.end) {
      v = frame.next;
      frame.next += size[v];
    } else {
      v = frame.heavy;
      frames.pop_back();  // from here on its slot is free
    }
  }
  return tape;
}

}  // namespace resens
