// From a tape to programs: which buffer every step reads and writes, known before any image is. SAVE and RESTORE
// vanish: a state that is needed again stays in its buffer and the step after it writes to another one.
#include <algorithm>
#include <stdexcept>

#include "network.h"
#include "../plan.h"

namespace resens::cpu {
namespace {

struct Node {
  int32_t op = 0, index = 0, parent = -1;
  float gate = 1;
  int geometry = 0;
  std::vector<int32_t> children, heads;  // heads: positions in the tape's order
  int first_head = -1, last_head = -1;   // of the whole subtree
};

double step_cost(const Network& n, int op, int index) {
  const Block& b = n.blocks[index];
  return op == RUN ? b.cost + b.shortcut_cost : b.shortcut_cost + b.out.image();
}

struct Tree {
  std::vector<Node> nodes;
  std::vector<int32_t> words;         // by head
  std::vector<double> cost_at_head;   // of all nodes up to each head
  double total = 0;
};

Tree read_tape(const Network& network, const int32_t* tape, const float* gates, int64_t length, int64_t words) {
  Tree tree;
  tree.nodes.emplace_back();
  std::vector<int32_t> slots;
  int current = 0;
  for (int64_t i = 0; i < length; ++i) {
    const int32_t op = tape[2 * i], arg = tape[2 * i + 1];
    if (arg < 0) throw std::invalid_argument("The tape has a negative argument.");
    switch (op) {
      case SAVE:
        if (arg > 4096) throw std::invalid_argument("The tape saves to slot " + std::to_string(arg) + ".");
        if (arg >= static_cast<int32_t>(slots.size())) slots.resize(arg + 1, -1);
        slots[arg] = current;
        break;
      case RESTORE:
        if (arg >= static_cast<int32_t>(slots.size()) || slots[arg] < 0) throw std::invalid_argument("The tape restores slot " + std::to_string(arg) + " before it is saved.");
        current = slots[arg];
        break;
      case RUN:
      case SHORTCUT: {
        if (arg >= static_cast<int32_t>(network.blocks.size())) throw std::invalid_argument("The tape runs block " + std::to_string(arg) + " of " + std::to_string(network.blocks.size()) + ".");
        Node node;
        node.op = op, node.index = arg, node.parent = current, node.gate = op == RUN ? gates[i] : 0.0f;
        if (tree.nodes[current].geometry != network.blocks[arg].in_id) throw std::invalid_argument("Block " + std::to_string(arg) + " meets a state of another shape.");
        node.geometry = network.blocks[arg].out_id;
        tree.total += step_cost(network, op, arg);
        tree.nodes[current].children.push_back(static_cast<int32_t>(tree.nodes.size()));
        current = static_cast<int>(tree.nodes.size());
        tree.nodes.push_back(std::move(node));
        break;
      }
      case HEAD: {
        if (arg >= words) throw std::invalid_argument("The tape counts word " + std::to_string(arg) + " of " + std::to_string(words) + ".");
        const Geometry& g = network.geometries[tree.nodes[current].geometry];
        if (g.channels != network.head_channels) throw std::invalid_argument("The head meets a state of another shape.");
        const int32_t at = static_cast<int32_t>(tree.words.size());
        tree.nodes[current].heads.push_back(at);
        tree.words.push_back(arg);
        tree.cost_at_head.push_back(tree.total);
        for (int n = current; n >= 0; n = tree.nodes[n].parent) {
          if (tree.nodes[n].first_head < 0) tree.nodes[n].first_head = at;
          tree.nodes[n].last_head = at;
        }
        break;
      }
      default:
        throw std::invalid_argument("The tape has an unknown instruction, " + std::to_string(op) + ".");
    }
  }
  return tree;
}

class Emitter {
 public:
  Emitter(const Network& network, const Tree& tree, int first, int last) : network_(network), tree_(tree), first_(first), last_(last) {
    program_.geometry.push_back(0);
    in_use_.push_back(true);
    emit(0, 0);
  }
  Program take() { return std::move(program_); }

 private:
  bool wanted(const Node& n) const { return n.first_head >= 0 && n.first_head <= last_ && n.last_head >= first_; }

  // The node's state is in `buffer`; when this returns, the buffer is free.
  void emit(int at, int buffer) {
    const Node& node = tree_.nodes[at];
    for (int32_t h : node.heads) {
      if (h >= first_ && h <= last_) program_.steps.push_back({HEAD, tree_.words[h], buffer, buffer, 1.0f});
    }
    int left = 0;
    for (int32_t c : node.children) left += wanted(tree_.nodes[c]);
    if (left == 0) in_use_[buffer] = false;
    for (int32_t c : node.children) {
      const Node& child = tree_.nodes[c];
      if (!wanted(child)) continue;
      const bool last = --left == 0;
      // Only an identity shortcut can be written where it is read: the others' inputs are still needed.
      const bool in_place = last && network_.blocks[child.index].shortcut == ShortcutKind::kIdentity;
      const int target = in_place ? buffer : allocate(child.geometry);
      program_.steps.push_back({child.op, child.index, buffer, target, child.gate});
      program_.cost += step_cost(network_, child.op, child.index);
      if (last && !in_place) in_use_[buffer] = false;
      emit(c, target);
    }
  }

  int allocate(int geometry) {
    for (size_t i = 0; i < in_use_.size(); ++i) {
      if (!in_use_[i] && program_.geometry[i] == geometry) {
        in_use_[i] = true;
        return static_cast<int>(i);
      }
    }
    program_.geometry.push_back(geometry);
    in_use_.push_back(true);
    return static_cast<int>(in_use_.size()) - 1;
  }

  const Network& network_;
  const Tree& tree_;
  const int first_, last_;
  Program program_;
  std::vector<bool> in_use_;
};

}  // namespace

std::vector<Program> compile(const Network& network, const int32_t* tape, const float* gates, int64_t length, int64_t words, int parts) {
  const Tree tree = read_tape(network, tape, gates, length, words);
  std::vector<Program> programs;
  const int heads = static_cast<int>(tree.words.size());
  for (int first = 0; first < heads;) {
    // Up to the last head whose share of the whole cost falls into this part.
    const auto part = [&](int h) { return tree.total > 0 ? static_cast<int64_t>(tree.cost_at_head[h] / tree.total * parts * (1 - 1e-9)) : 0; };
    int last = first;
    while (last + 1 < heads && part(last + 1) == part(first)) ++last;
    programs.push_back(Emitter(network, tree, first, last).take());
    first = last + 1;
  }
  return programs;
}

TapeCost tape_cost(const Network& network, const int32_t* tape, const float* gates, int64_t length, int64_t words) {
  const Tree tree = read_tape(network, tape, gates, length, words);
  TapeCost cost;
  cost.total = tree.total;
  std::vector<double> depth(tree.nodes.size(), 0.0);
  for (size_t i = 1; i < tree.nodes.size(); ++i) {
    const Node& n = tree.nodes[i];
    depth[i] = depth[n.parent] + step_cost(network, n.op, n.index);
    cost.longest = std::max(cost.longest, depth[i]);
  }
  return cost;
}

}  // namespace resens::cpu
