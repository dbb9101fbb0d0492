// See program.h. The plan's tape is read back into the trie it was drawn from (a node per RUN or SHORTCUT), the heads are split where the cost accumulated in tape
// order passes the next share, and each share's sub-trie is written out depth first, the child with most words last, so that slots stay few.
#include "program.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>

namespace resens::cuda {
namespace {

enum PlanOp : int32_t { kPlanSave = 0, kPlanRestore = 1, kPlanRun = 2, kPlanShortcut = 3, kPlanHead = 4 };  // csrc/plan.h

struct Node {
  int32_t parent, block;  // block -1: the stem's output
  float gate;
  bool run;
  int32_t stage;
};
struct Head { int32_t node, word; };
struct Trie {
  std::vector<Node> nodes;
  std::vector<Head> heads;
  std::vector<size_t> first_new;  // per head: number of nodes that exist when it is read
};

[[noreturn]] void fail(size_t at, const std::string& what) { throw std::invalid_argument("tape instruction " + std::to_string(at) + " " + what); }

Trie read_tape(const int32_t* tape, const float* gates, size_t length, const BlockInfo* blocks, int block_count) {
  Trie trie;
  trie.nodes.push_back({-1, -1, 0.f, false, 0});
  std::unordered_map<int32_t, int32_t> slots;
  int32_t current = 0;
  for (size_t i = 0; i < length; i++) {
    int32_t op = tape[2 * i], argument = tape[2 * i + 1];
    if (op == kPlanSave) {
      slots[argument] = current;
    } else if (op == kPlanRestore) {
      auto it = slots.find(argument);
      if (it == slots.end()) fail(i, "restores slot " + std::to_string(argument) + ", which nothing has saved");
      current = it->second;
    } else if (op == kPlanRun || op == kPlanShortcut) {
      if (argument < 0 || argument >= block_count) fail(i, "names block " + std::to_string(argument) + " of a network of " + std::to_string(block_count));
      const BlockInfo& b = blocks[argument];
      int32_t stage = trie.nodes[current].stage;
      if (b.stage != stage + (b.changes ? 1 : 0)) fail(i, "runs block " + std::to_string(argument) + " on a state of another shape");
      trie.nodes.push_back({current, argument, op == kPlanRun ? gates[i] : 0.f, op == kPlanRun, b.stage});
      current = static_cast<int32_t>(trie.nodes.size()) - 1;
    } else if (op == kPlanHead) {
      if (trie.nodes[current].stage != kStages - 1) fail(i, "reads the head on a state that has not reached the last stage");
      trie.heads.push_back({current, argument});
      trie.first_new.push_back(trie.nodes.size());
    } else {
      fail(i, "has the unknown operation " + std::to_string(op));
    }
  }
  return trie;
}

double cost_of(const Node& n, const BlockInfo* blocks) {  // in identity blocks; the counter model's ratios (benchmarks/roofline.py), rounded
  if (n.block < 0) return 0.2;
  if (!n.run) return blocks[n.block].changes ? 0.3 : 0.02;
  return blocks[n.block].changes ? 0.9 : 1.0;
}

struct Writer {
  const Trie& trie;
  const BlockInfo* blocks;
  int images, width;
  Program& out;

  void instruction(int op, int stage, int flags, int32_t argument, int32_t parameters = 0, float gate = 0.f) {
    out.tape.push_back({op | stage << 8 | flags << 16, argument, parameters, gate});
  }
  void chunks(uint32_t& offset, int count, int bytes) {
    for (int i = 0; i < count; i++, offset += bytes) out.chunks.push_back({offset, static_cast<uint32_t>(bytes / 16)});
  }
  void letter(const Node& n) {
    const BlockInfo& b = blocks[n.block];
    uint32_t offset = b.weights;
    if (!b.changes) {
      if (!n.run) {
        if (b.flags & kClosing) instruction(kRelu, b.stage, 0, 0);
        return;
      }
      instruction(kRun, b.stage, b.flags, 0, b.parameters, n.gate);
      chunks(offset, 2 * 3 * (channels_of(width, b.stage) / 16) / groups_per_chunk(images, width, b.stage), chunk_bytes(images, width, b.stage));
      return;
    }
    instruction(kChange, b.stage, b.flags | (n.run ? 0 : kSkipped), b.before, b.parameters, n.gate);
    if (b.flags & kProjected) chunks(offset, 1, projection_bytes(width, b.stage));
    if (!n.run) return;
    int groups = entry_groups_per_chunk(images, width, b.stage);
    chunks(offset, 3 * (channels_of(width, b.stage - 1) / 16) / groups, groups * group_bytes(width, b.stage));
    chunks(offset, 3 * (channels_of(width, b.stage) / 16) / groups_per_chunk(images, width, b.stage), chunk_bytes(images, width, b.stage));
  }
  void part(size_t first, size_t last);
};

void Writer::part(size_t first, size_t last) {
  // The nodes this part needs, in order (a parent has a smaller index than its children), renumbered.
  std::vector<int32_t> needed;
  std::unordered_map<int32_t, int32_t> index;
  for (size_t h = first; h < last; h++)
    for (int32_t n = trie.heads[h].node; n >= 0 && index.emplace(n, 0).second; n = trie.nodes[n].parent) needed.push_back(n);
  std::sort(needed.begin(), needed.end());
  int32_t count = static_cast<int32_t>(needed.size());
  for (int32_t i = 0; i < count; i++) index[needed[i]] = i;
  std::vector<std::vector<int32_t>> children(count), words(count);
  std::vector<int32_t> weight(count, 0);
  for (size_t h = first; h < last; h++) words[index[trie.heads[h].node]].push_back(trie.heads[h].word);
  for (int32_t i = 1; i < count; i++) children[index[trie.nodes[needed[i]].parent]].push_back(i);
  double cost = 0;
  for (int32_t i = count - 1; i >= 0; i--) {
    weight[i] += static_cast<int32_t>(words[i].size());
    if (i > 0) weight[index[trie.nodes[needed[i]].parent]] += weight[i];
    auto& c = children[i];
    if (c.size() > 1) {
      auto heaviest = std::max_element(c.begin(), c.end(), [&](int32_t p, int32_t q) { return weight[p] < weight[q]; });
      std::rotate(heaviest, heaviest + 1, c.end());
    }
    cost += cost_of(trie.nodes[needed[i]], blocks) + 0.1 * words[i].size();
    if (i > 0 && c.size() > 1) cost += 0.4 * c.size();
  }
  out.parts.push_back({static_cast<int32_t>(out.tape.size()), static_cast<int32_t>(out.chunks.size())});
  out.cost.push_back(cost);
  out.words.push_back(static_cast<int32_t>(last - first));

  struct Frame { int32_t node; size_t next; int32_t slot; };
  std::vector<Frame> stack;
  int32_t slots = 0;
  auto enter = [&](int32_t i) {
    const Node& n = trie.nodes[needed[i]];
    if (i == 0) instruction(kLoad, 0, 0, 0);
    else letter(n);
    for (int32_t w : words[i]) instruction(kHead, kStages - 1, 0, w);
    Frame f{i, 0, -1};
    if (i > 0 && children[i].size() > 1) {
      f.slot = slots++;
      out.slots = std::max(out.slots, slots);
      instruction(kSave, n.stage, 0, f.slot);
    }
    stack.push_back(f);
  };
  enter(0);
  while (!stack.empty()) {
    Frame& f = stack.back();
    const auto& c = children[f.node];
    if (f.next == c.size()) { stack.pop_back(); continue; }
    if (f.next > 0) {  // the start is loaded again rather than kept in a slot: the same traffic
      if (f.node == 0) instruction(kLoad, 0, 0, 0);
      else instruction(kRestore, trie.nodes[needed[f.node]].stage, 0, f.slot);
      if (f.node > 0 && f.next + 1 == c.size()) slots--;  // the last child may use the slot again
    }
    enter(c[f.next++]);
  }
  instruction(kEnd, 0, 0, 0);
  for (int i = 0; i < kRingSlots; i++) out.chunks.push_back({0, 0});  // the prefetch runs ahead of the last instruction
}
}  // namespace

Program build_program(const int32_t* tape, const float* gates, size_t length, const BlockInfo* blocks, int block_count, int images, int width, int parts) {
  if (!(width == 16 && (images == 1 || images == 2)) && !(width == 32 && images == 1))
    throw std::invalid_argument("there is no kernel for " + std::to_string(images) + " images per CTA and " + std::to_string(width) + " channels");
  Trie trie = read_tape(tape, gates, length, blocks, block_count);
  Program out;
  Writer writer{trie, blocks, images, width, out};
  // Cost up to each head, in tape order; the prefixes that parts share are not counted again.
  double total = 0;
  std::vector<double> upto;
  size_t node = 0;
  for (size_t h = 0; h < trie.heads.size(); h++) {
    for (; node < trie.first_new[h]; node++) total += cost_of(trie.nodes[node], blocks);
    total += 0.1;
    upto.push_back(total);
  }
  size_t first = 0;
  double share = total / std::max(parts, 1);
  for (size_t h = 0; h < trie.heads.size(); h++)
    if (h + 1 == trie.heads.size() || upto[h] >= share * (out.parts.size() + 1)) {
      writer.part(first, h + 1);
      first = h + 1;
    }
  return out;
}
}  // namespace resens::cuda
