// Path gradients of all images: tiles of images over threads. Whoever takes a part of a tile runs the intact forward of
// that tile first, unless its last part was of the same one.
#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>

#include "../plan.h"
#include "backward.h"
#include "parallel.h"

namespace resens::cpu {
namespace {

std::vector<int> read_order(const Network& n, const int64_t* order) {
  std::vector<int> found;
  std::vector<bool> seen(n.blocks.size());
  int state = 0;
  for (size_t k = 0; k < n.blocks.size(); ++k) {
    const int64_t j = order[k];
    if (j < 0 || j >= static_cast<int64_t>(n.blocks.size()) || seen[j]) throw std::invalid_argument("The order is no permutation of the blocks: " + std::to_string(j) + " at position " + std::to_string(k) + ".");
    if (n.blocks[j].in_id != state) throw std::invalid_argument("Block " + std::to_string(j) + " meets a state of another shape.");
    state = n.blocks[j].out_id, seen[j] = true;
    found.push_back(static_cast<int>(j));
  }
  if (n.geometries[state].channels != n.head_channels) throw std::invalid_argument("The head meets a state of another shape.");
  return found;
}

// Every word must name the blocks from the last to the first, and leave out none whose shortcut does something: masks are
// applied by the neighbour that the order promises.
void check_tape(const Network& n, const std::vector<int>& order, const int32_t* tape, int64_t length) {
  const int blocks = static_cast<int>(order.size());
  std::vector<int> position(blocks), least(blocks + 1), slots;
  for (int k = 0; k < blocks; ++k) {
    position[order[k]] = k;
    least[k + 1] = has_letter(n.blocks[order[k]]) ? k + 1 : least[k];  // words may jump from k + 1 down to this
  }
  int at = blocks;
  for (int64_t i = 0; i < length; ++i) {
    const int32_t op = tape[2 * i], arg = tape[2 * i + 1];
    if (op == SAVE) {
      if (arg >= static_cast<int32_t>(slots.size())) slots.resize(arg + 1);
      slots[arg] = at;
    } else if (op == RESTORE) {
      at = slots[arg];
    } else if (op == HEAD) {
      if (least[at] != 0) throw std::invalid_argument("Word " + std::to_string(arg) + " of the tape ends before block " + std::to_string(order[least[at] - 1]) + ".");
    } else {
      const int k = position[arg];
      if (k >= at || k + 1 < least[at]) throw std::invalid_argument("The tape runs block " + std::to_string(arg) + " out of the order of the way back.");
      at = k;
    }
  }
}

class Gradients {
 public:
  Gradients(const Network& network, const Network& transposed, const Kernels& kernels, const char* packed, const char* packed_transposed,
            const std::vector<int>& order, const GradientRequest& request)
      : network_(network), transposed_(transposed), kernels_(kernels), packed_(packed), packed_transposed_(packed_transposed), order_(order), r_(request) {
    TapeCost cost = tape_cost(transposed, r_.tape, r_.gates, r_.length, r_.words);
    check_tape(network, order, r_.tape, r_.length);
    for (const Block& b : network.blocks) cost.longest += b.cost + b.shortcut_cost;  // every part runs the forward
    Request shape;
    shape.batch = r_.batch, shape.threads = r_.threads, shape.tile = r_.tile;
    shape_ = choose(network, shape, cost);
    programs_ = compile(transposed, r_.tape, r_.gates, r_.length, r_.words, shape_.parts);
  }

  bool run() {
    int64_t total = 0;
    for (const Program& p : programs_) total += static_cast<int64_t>(p.steps.size()) * r_.batch;
    const int64_t parts = static_cast<int64_t>(programs_.size());
    Crew crew(parts * shape_.tiles, r_.control, total);
    return crew.run(std::max(r_.threads, 1), [&] {
      Recorder recorder(network_, kernels_, packed_, order_, shape_.tile);
      Backward backward(transposed_, kernels_, packed_transposed_, recorder.masks(), shape_.tile);
      int64_t recorded = -1;
      for (int64_t item; (item = crew.take()) >= 0;) {
        const int64_t tile = item / parts, first = tile * shape_.tile;
        const int images = static_cast<int>(std::min<int64_t>(shape_.tile, r_.batch - first));
        if (tile != recorded) recorder.run(r_.images + first * network_.channels * network_.height * network_.width, r_.labels + first, images);
        recorded = tile;
        part(crew, programs_[item % parts], recorder, backward, first, images);
      }
    });
  }

 private:
  void part(Crew& crew, const Program& program, const Recorder& recorder, Backward& backward, int64_t first, int images) {
    backward.start(program, recorder, images);
    const Geometry& g = network_.geometries[0];
    const int64_t floats = static_cast<int64_t>(g.channels) * g.height * g.width;
    const Step *step = program.steps.data(), *end = step + program.steps.size();
    while (step != end && !crew.cancelled()) {
      int ran = 1;
      if (step->op != HEAD) {
        ran = backward.run(step, end, images);
      } else {
        for (int i = 0; i < images; ++i) {
          const int64_t at = step->index * r_.batch + first + i;
          r_.norms[at] = backward.norm(step->source, i);
          if (r_.gradients) backward.write(step->source, i, r_.gradients + at * floats);
        }
      }
      step += ran;
      crew.done(static_cast<int64_t>(ran) * images);
    }
  }

  const Network &network_, &transposed_;
  const Kernels& kernels_;
  const char *packed_, *packed_transposed_;
  const std::vector<int>& order_;
  const GradientRequest& r_;
  Shape shape_;
  std::vector<Program> programs_;
};

}  // namespace

bool path_gradients(const Network& network, const Kernels& kernels, const char* packed, const char* packed_transposed, const GradientRequest& r) {
  if (r.batch <= 0 || r.words <= 0) return true;
  check_labels(network, r.labels, r.batch);
  const std::vector<int> order = read_order(network, r.order);
  const Network transposed = transpose(network, kernels, order.empty() ? -1 : order.back());
  return Gradients(network, transposed, kernels, packed, packed_transposed, order, r).run();
}

}  // namespace resens::cpu
