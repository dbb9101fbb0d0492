// Items of work over threads, the same for forwards and gradients: whoever is free takes the next one.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "network.h"

namespace resens::cpu {

// How the images and the tape are cut: `tiles` of `tile` images, the tape into `parts`.
struct Shape {
  int tile, tiles, parts;
};
Shape choose(const Network& network, const Request& request, const TapeCost& cost);  // eval.cpp
void check_labels(const Network& network, const int64_t* labels, int64_t batch);

class Crew {
 public:
  // control: [0] set by the caller to cancel, [1] what is done, [2] the total; or null.
  Crew(int64_t items, int64_t* control, int64_t total) : items_(items), control_(control) {
    if (control_) at(2).store(total, std::memory_order_relaxed);
  }

  // Calls work() on each of the threads; false when cancelled; throws what the first of them threw.
  template <typename Work>
  bool run(int threads, Work work) {
    const auto guarded = [&] {
      try {
        work();
      } catch (...) {
        fail();
      }
    };
    std::vector<std::thread> others;
    try {
      for (int64_t t = 1; t < std::min<int64_t>(threads, items_); ++t) others.emplace_back(guarded);
    } catch (...) {
      fail();
    }
    guarded();
    for (std::thread& t : others) t.join();
    if (error_) std::rethrow_exception(error_);
    return !cancelled();
  }

  // The next item, or -1 when there are none or the work was cancelled.
  int64_t take() {
    const int64_t item = cancelled() ? items_ : next_.fetch_add(1);
    return item < items_ ? item : -1;
  }
  bool cancelled() const { return failed_.load(std::memory_order_relaxed) || (control_ && at(0).load(std::memory_order_relaxed)); }
  void done(int64_t amount) {
    if (control_) at(1).fetch_add(amount, std::memory_order_relaxed);
  }

 private:
  std::atomic<int64_t>& at(int i) const { return reinterpret_cast<std::atomic<int64_t>*>(control_)[i]; }
  void fail() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_.store(true, std::memory_order_relaxed);
  }

  const int64_t items_;
  int64_t* const control_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace resens::cpu
