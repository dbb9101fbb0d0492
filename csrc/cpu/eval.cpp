// The tape on all images: tiles of images over threads, every tile executes the same instructions, nothing is
// exchanged but the final counts (integers, so their order does not matter).
#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../plan.h"
#include "block.h"
#include "parallel.h"

namespace resens::cpu {
namespace {

constexpr double kLossScale = 16777216.0, kLossMost = 65536.0;  // 2^24, 2^16

struct Counts {
  std::vector<int64_t> errors, loss, nonfinite;
  explicit Counts(int64_t words) : errors(words), loss(words), nonfinite(words) {}
};

void count(const float* logits, int classes, int64_t label, int64_t word, Counts& counts) {
  int best = 0;
  bool finite = std::isfinite(logits[0]);
  for (int k = 1; k < classes; ++k) {
    finite = finite && std::isfinite(logits[k]);
    if (logits[k] > logits[best]) best = k;
  }
  if (!finite) {
    ++counts.nonfinite[word];
    ++counts.errors[word];
    return;
  }
  counts.errors[word] += best != label;
  double sum = 0;
  for (int k = 0; k < classes; ++k) sum += std::exp(static_cast<double>(logits[k]) - logits[best]);
  const double loss = std::log(sum) + (static_cast<double>(logits[best]) - logits[label]);
  counts.loss[word] += std::llround(std::min(loss, kLossMost) * kLossScale);
}

}  // namespace

// Few tiles leave threads idle: then the trie is cut, if the prefixes that are recomputed cost little beside a part.
Shape choose(const Network& network, const Request& r, const TapeCost& cost) {
  const int64_t threads = std::max(r.threads, 1);
  int64_t largest = 1;
  for (const Geometry& g : network.geometries) largest = std::max(largest, 4 * g.image());
  int64_t tile = r.tile > 0 ? r.tile : std::clamp<int64_t>((int64_t{4} << 20) / largest, 4, 16);
  tile = std::min(tile, r.batch);
  int64_t tiles = (r.batch + tile - 1) / tile, parts = 1;
  if (threads > 1 && tiles < 4 * threads) {
    const double words = cost.total / std::max(cost.longest, 1.0);  // as many of the longest cost as much
    const int64_t affordable = static_cast<int64_t>(words / 4);
    parts = std::clamp<int64_t>((4 * threads + tiles - 1) / tiles, 1, std::max<int64_t>(affordable, 1));
    if (parts > 1 && parts * tiles >= threads) {
      parts = std::max<int64_t>(parts * tiles / threads * threads / tiles, 1);  // no last round with few threads at work
    } else if (r.tile <= 0) {  // smaller tiles, an equal number for each thread
      tiles = std::min((tiles + threads - 1) / threads * threads, r.batch);
      tile = (r.batch + tiles - 1) / tiles;
      tiles = (r.batch + tile - 1) / tile;
      // Threads that still have no tile repeat prefixes rather than do nothing.
      parts = std::clamp<int64_t>((threads + tiles - 1) / tiles, 1, std::max<int64_t>(static_cast<int64_t>(words), 1));
    }
  }
  return {static_cast<int>(tile), static_cast<int>(tiles), static_cast<int>(parts)};
}

namespace {

// The same kernels with nothing in them: a worker that runs them takes its memory, none of which is touched.
Kernels idle(const Kernels& kernels) {
  Kernels k = kernels;
  for (OperandKernels* o : {&k.float32, &k.bfloat16}) {
    o->winograd = o->direct = [](const ConvCall&) {};
    o->operand = [](const PassCall&) {};
    o->stem = [](const StemCall&) {};
  }
  k.pass = [](const PassCall&) {};
  k.pad = [](const PadCall&) {};
  k.max_pool = [](const MaxPoolCall&) {};
  return k;
}

class Evaluation {
 public:
  Evaluation(const Network& network, const Kernels& kernels, const char* packed, Dtype dtype, const Request& request)
      : network_(network), kernels_(kernels), packed_(packed), dtype_(dtype), r_(request) {
    const TapeCost cost = tape_cost(network, r_.tape, r_.gates, r_.length, r_.words);
    shape_ = choose(network, r_, cost);
    programs_ = compile(network, r_.tape, r_.gates, r_.length, r_.words, shape_.parts);
  }

  Schedule schedule() const {
    Schedule s;
    s.tile = shape_.tile, s.tiles = shape_.tiles;
    const Kernels none = idle(kernels_);
    Worker worker(network_, none, packed_, dtype_, shape_.tile);
    for (const Program& p : programs_) {
      s.costs.push_back(p.cost);
      worker.bind(p);
      worker.stem(nullptr, 1);
      std::vector<bool> seen(2 * network_.blocks.size());
      for (const Step& step : p.steps) {
        if (step.op == HEAD || seen[2 * step.index + (step.op == RUN)]) continue;
        seen[2 * step.index + (step.op == RUN)] = true;
        worker.run(step, shape_.tile);
      }
    }
    s.bytes = worker.bytes() * std::min<int64_t>(std::max(r_.threads, 1), static_cast<int64_t>(programs_.size()) * shape_.tiles);
    return s;
  }

  bool run() {
    int64_t total = 0;
    for (const Program& p : programs_) total += static_cast<int64_t>(p.steps.size()) * r_.batch;
    Crew crew(static_cast<int64_t>(programs_.size()) * shape_.tiles, r_.control, total);
    return crew.run(std::max(r_.threads, 1), [&] { work(crew); });
  }

 private:
  void work(Crew& crew) {
    Worker worker(network_, kernels_, packed_, dtype_, shape_.tile);
    Counts counts(r_.errors ? r_.words : 0);
    for (int64_t item; (item = crew.take()) >= 0;) {
      // All parts of a tile before the next tile: the longest-running items start first only by chance, but images stay in cache.
      tile(crew, worker, programs_[item % programs_.size()], item / static_cast<int64_t>(programs_.size()), counts);
    }
    if (!r_.errors) return;
    const std::lock_guard<std::mutex> lock(counting_);
    for (int64_t w = 0; w < r_.words; ++w) {
      r_.errors[w] += counts.errors[w];
      r_.loss[w] += counts.loss[w];
      r_.nonfinite[w] += counts.nonfinite[w];
    }
  }

  void tile(Crew& crew, Worker& worker, const Program& program, int64_t index, Counts& counts) {
    const int64_t first = index * shape_.tile;
    const int images = static_cast<int>(std::min<int64_t>(shape_.tile, r_.batch - first));
    worker.bind(program);
    worker.stem(r_.images + first * network_.channels * network_.height * network_.width, images);
    for (const Step& step : program.steps) {
      if (crew.cancelled()) return;
      if (step.op != HEAD) {
        worker.run(step, images);
      } else {
        for (int i = 0; i < images; ++i) {
          const float* logits = worker.head(step, i);
          if (r_.errors) count(logits, network_.classes, r_.labels[first + i], step.index, counts);
          if (r_.logits) std::copy_n(logits, network_.classes, r_.logits + (step.index * r_.batch + first + i) * network_.classes);
        }
      }
      crew.done(images);
    }
  }

  const Network& network_;
  const Kernels& kernels_;
  const char* packed_;
  const Dtype dtype_;
  const Request& r_;
  Shape shape_;
  std::vector<Program> programs_;
  std::mutex counting_;
};

}  // namespace

Schedule schedule(const Network& network, const Kernels& kernels, Dtype dtype, const Request& r) {
  if (r.batch <= 0 || r.words <= 0) return {};
  const std::unique_ptr<char[]> packed(new char[network.packed_bytes]);  // never read; only for pointers into it
  return Evaluation(network, kernels, packed.get(), dtype, r).schedule();
}

void check_labels(const Network& network, const int64_t* labels, int64_t batch) {
  for (int64_t i = 0; i < batch; ++i) {
    if (labels[i] < 0 || labels[i] >= network.classes) {
      throw std::invalid_argument("Label " + std::to_string(labels[i]) + " of image " + std::to_string(i) + " is not one of " + std::to_string(network.classes) + " classes.");
    }
  }
}

bool evaluate(const Network& network, const Kernels& kernels, const char* packed, Dtype dtype, const Request& r) {
  if (r.batch <= 0 || r.words <= 0) return true;
  if (r.errors) check_labels(network, r.labels, r.batch);
  return Evaluation(network, kernels, packed, dtype, r).run();
}

}  // namespace resens::cpu
