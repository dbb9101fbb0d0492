// Trie -> level schedule: as much breadth-first work as the budget of state buffers allows, the rest depth-first.
//
// The level of a letter is its place in the network where that rises along the word (else one more than its parent's),
// so that all states that need the same block meet in one level. A state occupies a buffer from the level that writes
// it to the level that reads it last; both ends count, since no buffer is read and written in one level.
//
// If the whole trie fits, it is one breadth-first pass. If not, the schedule walks down the heavy path (at each node the
// sub-trie that needs most buffers, so that the walk is possible with as few as possible) and collects the light
// sub-tries that hang off it, as many as fit side by side, runs them as one breadth-first pass together with their piece
// of the path, and goes on from the path's end with all buffers free again but one. A light sub-trie that does not fit
// even alone is scheduled in the same way with one buffer less, while the path waits. With single deletions, for
// example, the path is the intact network and the variants run in batches as wide as the budget.
#include <algorithm>
#include <functional>
#include <queue>
#include <stdexcept>
#include <string>

#include "planner.h"

namespace resens {
namespace {

// How many buffers each sub-trie needs at least, its root's included: a register allocation (Sethi and Ullman). Also the
// child that must come last for that.
struct Needs {
  std::vector<int32_t> least, heavy;

  explicit Needs(const Trie& trie) : least(trie.nodes(), 1), heavy(trie.nodes(), -1) {
    std::vector<int32_t> second(trie.nodes(), 0);  // the largest need among the children that are not heavy
    for (int64_t v = trie.nodes() - 1; v >= 0; --v) {
      if (heavy[v] >= 0) least[v] = std::max({2, least[heavy[v]], second[v] + 1});
      if (v == 0) break;
      int32_t& best = heavy[trie.parent[v]];
      int32_t& runner_up = second[trie.parent[v]];
      if (best < 0 || least[v] > least[best] || (least[v] == least[best] && trie.weight[v] > trie.weight[best])) {
        if (best >= 0) runner_up = std::max(runner_up, least[best]);
        best = static_cast<int32_t>(v);
      } else {
        runner_up = std::max(runner_up, least[v]);
      }
    }
  }
};

// How many buffers are in use at each level, as differences from one level to the next.
class Profile {
 public:
  explicit Profile(int32_t levels) : change_(levels + 2, 0) {}

  void add(int32_t first, int32_t last, int32_t count) {
    change_[first] += count;
    change_[last + 1] -= count;
  }

  int64_t peak() const {
    int64_t sum = 0, most = 0;
    for (const int32_t c : change_) most = std::max(most, sum += c);
    return most;
  }

  void clear() { std::fill(change_.begin(), change_.end(), 0); }

 private:
  std::vector<int32_t> change_;
};

class Scheduler {
 public:
  Scheduler(const Trie& trie, int64_t budget)
      : trie_(trie), needs_(trie), budget_(budget), level_(trie.nodes(), 0), last_(trie.nodes(), 0),
        pending_(trie.children), buffer_(trie.nodes(), -1), profile_(0) {
    for (int64_t v = 1; v < trie.nodes(); ++v) {
      level_[v] = std::max(trie.position[v] + 1, level_[trie.parent[v]] + 1);
      end_ = std::max(end_, level_[v]);
    }
    for (int64_t v = trie.nodes() - 1; v >= 0; --v) {
      last_[v] = std::max(last_[v], level_[v]);
      if (v > 0) last_[trie.parent[v]] = std::max(last_[trie.parent[v]], level_[v]);
    }
    profile_ = Profile(end_);
  }

  Levels draw() {
    steps_.steps.reserve(trie_.nodes() + trie_.words);
    steps_.gates.reserve(trie_.nodes() + trie_.words);
    buffer_[0] = take();
    if (trie_.word[0] >= 0) {
      head(0);
      ++now_;
    }
    profile_.clear();
    count(0, trie_.nodes(), 1);
    if (profile_.peak() <= budget_) {
      group_.clear();
      collect(1, trie_.nodes());
      flush();
    } else {
      descend(0, budget_);
    }
    steps_.buffers = fresh_;
    steps_.levels = now_;
    return std::move(steps_);
  }

 private:
  // Runs the sub-trie below v, which is in a buffer, with `allowed` buffers, v's included. Recursion goes through light
  // children only, and each takes a buffer, so its depth is at most log2(words) + 1.
  void descend(int64_t v, int64_t allowed) {
    begin(v);
    for (int64_t path = v;;) {
      std::vector<int64_t> lights;
      for (int64_t c = path + 1; c < path + trie_.size[path]; c += trie_.size[c]) {
        if (c != needs_.heavy[path]) lights.push_back(c);
      }
      // The largest first: those that do not fit interrupt a group, and the small ones fill what is left.
      std::stable_sort(lights.begin(), lights.end(), [&](int64_t a, int64_t b) { return trie_.size[a] > trie_.size[b]; });
      int32_t busy_until = level_[path];  // the last level in which the group reads the path's state
      for (const int64_t c : lights) {
        const int64_t end = c + trie_.size[c];
        count(c, end, 1);
        if (profile_.peak() > allowed && !group_.empty()) {
          flush();
          begin(path);
          busy_until = level_[path];
          count(c, end, 1);
        }
        if (profile_.peak() <= allowed) {
          collect(c, end);
          busy_until = std::max(busy_until, level_[c]);
          continue;
        }
        group_.assign(1, static_cast<int32_t>(c));
        flush();
        descend(c, allowed - 1);
        begin(path);
      }
      const int64_t next = needs_.heavy[path];
      if (next < 0) break;
      if (!step(next, busy_until, allowed)) {
        flush();
        begin(path);
        step(next, level_[path], allowed);
      }
      path = next;
    }
    flush();
  }

  // Starts a group at a node of the path that is in a buffer already and stays there until the path moves on.
  void begin(int64_t path) {
    group_.clear();
    profile_.clear();
    profile_.add(level_[path], end_, 1);
  }

  // Moves the path to its child `next`, if that fits. The end keeps its buffer (the last node of all
  // gives it back at once), the node before it until its last reader.
  bool step(int64_t next, int32_t busy_until, int64_t allowed) {
    const int32_t released = std::max(busy_until, level_[next]) + 1;
    const int32_t kept = needs_.heavy[next] < 0 ? level_[next] : end_;
    if (released <= end_) profile_.add(released, end_, -1);
    profile_.add(level_[next], kept, 1);
    if (profile_.peak() > allowed) return false;
    group_.push_back(static_cast<int32_t>(next));
    return true;
  }

  void count(int64_t first, int64_t end, int32_t sign) {
    for (int64_t v = first; v < end; ++v) profile_.add(level_[v], last_[v], sign);
  }

  void collect(int64_t first, int64_t end) {
    for (int64_t v = first; v < end; ++v) group_.push_back(static_cast<int32_t>(v));
  }

  // Writes the group's steps, level by level.
  void flush() {
    const auto before = [&](int32_t a, int32_t b) {
      if (level_[a] != level_[b]) return level_[a] < level_[b];
      if (trie_.op(a) != trie_.op(b)) return trie_.op(a) < trie_.op(b);
      return trie_.block[a] != trie_.block[b] ? trie_.block[a] < trie_.block[b] : a < b;
    };
    std::sort(group_.begin(), group_.end(), before);
    for (size_t i = 0; i < group_.size();) {
      size_t end = i;
      while (end < group_.size() && level_[group_[end]] == level_[group_[i]]) ++end;
      for (size_t j = i; j < end; ++j) {
        const int32_t v = group_[j];
        buffer_[v] = take();
        steps_.steps.push_back({trie_.op(v), trie_.block[v], buffer_[trie_.parent[v]], buffer_[v], now_});
        steps_.gates.push_back(trie_.gate[v]);
      }
      for (size_t j = i; j < end; ++j) {
        if (trie_.word[group_[j]] >= 0) head(group_[j]);
      }
      for (size_t j = i; j < end; ++j) {  // only now, so that nothing in this level writes what it reads
        const int32_t v = group_[j];
        if (--pending_[trie_.parent[v]] == 0) free_.push(buffer_[trie_.parent[v]]);
        if (trie_.children[v] == 0) free_.push(buffer_[v]);
      }
      ++now_;
      i = end;
    }
    group_.clear();
  }

  void head(int64_t v) {
    steps_.steps.push_back({HEAD, trie_.word[v], buffer_[v], -1, now_});
    steps_.gates.push_back(0.0f);
  }

  int32_t take() {
    if (!free_.empty()) {
      const int32_t buffer = free_.top();
      free_.pop();
      return buffer;
    }
    if (fresh_ >= budget_) throw std::logic_error("the level schedule needs more buffers than it counted; please report this sweep");
    return fresh_++;
  }

  const Trie& trie_;
  const Needs needs_;
  const int64_t budget_;
  std::vector<int32_t> level_, last_, pending_, buffer_;  // by node; last_: the last level that reads it
  int32_t end_ = 0;                                       // the largest level
  Profile profile_;                                       // of the group that is being collected
  std::vector<int32_t> group_;                            // its nodes
  std::priority_queue<int32_t, std::vector<int32_t>, std::greater<int32_t>> free_;
  int32_t fresh_ = 0, now_ = 0;
  Levels steps_;
};

}  // namespace

int64_t Trie::least_budget() const { return Needs(*this).least[0]; }

Levels Trie::levels(int64_t budget) const {
  const int64_t least = least_budget();
  if (budget < least) {
    throw std::invalid_argument("a budget of " + std::to_string(budget) + " state buffers is too small for this plan; it needs at least " +
                                std::to_string(least));
  }
  return Scheduler(*this, budget).draw();
}

}  // namespace resens
