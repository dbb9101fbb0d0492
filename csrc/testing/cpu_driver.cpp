// Runs the CPU engine without torch or Python, for AddressSanitizer and UBSan: small random networks of every kind on
// every instruction set compiled in, several threads and tiles, results compared bit for bit. Exit status 0: all equal.
//
//   c++ -std=c++20 -O1 -g -fsanitize=address,undefined -Icsrc csrc/testing/cpu_driver.cpp csrc/cpu/{block,...}.cpp
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../cpu/kernels.h"
#include "../cpu/network.h"
#include "../plan.h"

using namespace resens;
using namespace resens::cpu;

namespace {

std::mt19937 generator(1);

// Writes the description that cpu_layout.py writes, with random parameters behind it.
struct Builder {
  std::vector<int32_t> layout;
  std::vector<float> raw;
  void put(std::initializer_list<int> numbers) { layout.insert(layout.end(), numbers); }
  void tensor(int64_t count, float scale) {
    put({static_cast<int>(raw.size()), 0});
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = 0; i < count; ++i) raw.push_back(normal(generator));
  }
  void conv(int in, int out, int kernel, int step, int padding, bool relu) {
    put({in, out, kernel, step, padding, relu});
    tensor(static_cast<int64_t>(in) * out * kernel * kernel, 1.0f / (kernel * in));
    tensor(out, 0.1f);
  }
};

struct Case {
  int channels, height, width, first, second;
  bool bottleneck, prologue;
  int shortcut;  // of the block that changes shape: 1 padding, 2 projection, 3 average pool and padding
};

Builder build(const Case& c) {
  Builder b;
  b.put({1, c.channels, c.height, c.width, 7, 1});
  b.conv(c.channels, c.first, 3, 1, 1, true);
  b.put({0, 0, 0, 3});
  int channels = c.first, height = c.height, width = c.width;
  for (int i = 0; i < 3; ++i) {
    const bool change = i == 1;
    const int out = change ? c.second : channels, step = change ? 2 : 1;
    const int h = (height - 1) / step + 1, w = (width - 1) / step + 1, middle = c.bottleneck ? std::max(1, out / 4) : out;
    b.put({channels, height, width, out, h, w, c.prologue});
    b.tensor(c.prologue ? channels : 0, 1.0f);
    b.tensor(c.prologue ? channels : 0, 0.3f);
    b.put({c.bottleneck ? 3 : 2});
    if (c.bottleneck) b.conv(channels, middle, 1, 1, 0, true);
    b.conv(c.bottleneck ? middle : channels, middle, 3, step, 1, true);
    if (c.bottleneck) b.conv(middle, out, 1, 1, 0, false);
    else b.conv(middle, out, 3, 1, 1, false);
    if (!change) {
      b.put({0, 1, 0, 0, 0, !c.prologue});
    } else if (c.shortcut == 2) {
      b.put({2, 2, 0, 0, c.prologue, !c.prologue});
      b.conv(channels, out, 1, 2, 0, false);
    } else {
      b.put({1, c.shortcut == 3 ? 1 : 2, (out - channels) / 2, c.shortcut == 3 ? 2 : 0, 0, !c.prologue});
    }
    channels = out, height = h, width = w;
  }
  b.put({channels, c.prologue});
  b.tensor(c.prologue ? channels : 0, 1.0f);
  b.tensor(c.prologue ? channels : 0, 0.3f);
  b.put({c.prologue});
  b.tensor(7 * channels, 0.2f);
  b.tensor(7, 0.1f);
  return b;
}

bool check(const Case& c, const Kernels& kernels, Dtype dtype) {
  const Builder b = build(c);
  // Copies of exact size, so that one element too far is seen.
  const std::vector<int32_t> layout(b.layout);
  const Network network = read_network(layout.data(), static_cast<int64_t>(layout.size()), kernels, dtype);
  const std::unique_ptr<void, void (*)(void*)> packed(aligned_alloc(64, (network.packed_bytes + 63) / 64 * 64), free);
  std::memset(packed.get(), 0, network.packed_bytes);
  pack(network, kernels, dtype, b.raw.data(), static_cast<int64_t>(b.raw.size()), static_cast<char*>(packed.get()));
  const int batch = 5;
  std::vector<float> images(static_cast<size_t>(batch) * c.channels * c.height * c.width);
  std::normal_distribution<float> normal;
  for (float& x : images) x = normal(generator);
  const std::vector<int64_t> labels = {0, 1, 2, 3, 6};
  const std::vector<int32_t> tape = {SAVE, 0, RUN, 0, RUN, 1, SAVE, 1, RUN, 2, HEAD, 0, RESTORE, 1, HEAD, 1, RESTORE, 0, SHORTCUT, 1, RUN, 2, HEAD, 2};
  const std::vector<float> gates = {0, 1, 0.5f, 0, 1, 0, 0, 0, 0, 0, -1, 0};
  std::vector<float> first;
  for (const auto& [threads, tile] : {std::pair(1, 0), std::pair(3, 1), std::pair(2, 3)}) {
    std::vector<float> logits(3 * batch * 7);
    std::vector<int64_t> counts(9), control(3);
    Request r;
    r.images = images.data(), r.labels = labels.data(), r.batch = batch, r.words = 3;
    r.tape = tape.data(), r.gates = gates.data(), r.length = static_cast<int64_t>(gates.size());
    r.threads = threads, r.tile = tile;
    r.errors = counts.data(), r.loss = counts.data() + 3, r.nonfinite = counts.data() + 6;
    r.logits = logits.data(), r.control = control.data();
    if (!evaluate(network, kernels, static_cast<const char*>(packed.get()), dtype, r) || counts[6] || control[1] != control[2]) return false;
    if (first.empty()) first = logits;
    if (std::memcmp(first.data(), logits.data(), sizeof(float) * logits.size()) != 0) return false;
  }
  return true;
}

}  // namespace

// Arguments: the names of the instruction sets to run; none: all.
int main(int count, char** names) {
  const Case cases[] = {
      {3, 16, 16, 16, 32, false, false, 1}, {3, 16, 16, 16, 32, false, true, 2}, {3, 9, 13, 32, 64, false, false, 2}, {1, 8, 8, 64, 64, false, true, 1},
      {3, 7, 5, 3, 10, false, false, 1},    {2, 12, 8, 17, 65, true, true, 2},   {3, 8, 8, 48, 80, false, true, 3},   {3, 2, 3, 16, 16, true, false, 2},
      {1, 1, 1, 16, 16, false, false, 2},
  };
  for (int k = 0; k < kernel_count(); ++k) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= std::strcmp(names[i], kernels_at(k).name) == 0;
    if (!wanted) continue;
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16}) {
      for (size_t i = 0; i < std::size(cases); ++i) {
        if (check(cases[i], kernels_at(k), dtype)) continue;
        std::printf("case %zu differs on %s, dtype %d\n", i, kernels_at(k).name, static_cast<int>(dtype));
        return 1;
      }
    }
    std::printf("%s: ok\n", kernels_at(k).name);
  }
  return 0;
}
