// One thread's memory and what it does to the states of one tile of images.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "network.h"

namespace resens::cpu {

// Aligned, zeroed memory in large pages where the system has them; throws std::bad_alloc.
class Buffer {
 public:
  explicit Buffer(int64_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* block_;
  char* data_;
  int64_t bytes_;  // of the whole block
};

// A run of images in memory: pixel (0, 0) of the first one, distances in elements.
struct View {
  char* origin = nullptr;
  int64_t image = 0, pitch = 0;
  int stride = 0, halo = 0;
  const float* floats() const { return reinterpret_cast<const float*>(origin); }
  float* floats() { return reinterpret_cast<float*>(origin); }
};

class Worker {
 public:
  // `tile`: the most images a tile has. `packed` outlives the worker.
  Worker(const Network& network, const Kernels& kernels, const char* packed, Dtype dtype, int tile);

  void bind(const Program& program);                 // gives its buffers memory; programs share it
  void stem(const float* images, int count);         // [count][C][H][W] -> buffer 0
  void run(const Step& step, int images);            // RUN or SHORTCUT
  const float* head(const Step& step, int image);    // the logits of one image
  int64_t bytes() const;                             // of all its buffers so far

 protected:
  enum Role { kOperand, kShortcutOperand, kMiddle, kMiddle2, kPooled, kMasked, kRoles };
  struct Scratch {
    Role role;
    Geometry geometry;
    int images, bytes;
    std::unique_ptr<Buffer> buffer;
  };

  View state(int buffer, int image);
  View scratch(Role role, Geometry geometry, int images, int bytes);
  View view(char* base, const Geometry& g, int bytes) const;
  // What `conv` reads in place of `from`: the prologue applied, rounded, with a halo as wide as its padding.
  View operand(Role role, const Conv& conv, const View& from, const Geometry& g, const Block* prologue, int images);
  View activate(Role role, const View& from, const Geometry& g, const Block& block, int images);  // relu(scale * x + shift), fp32
  bool reads_floats(const Conv& conv) const { return conv.algorithm == Algorithm::kWinograd || !operand_.rounded; }
  // Whether a convolution applies a prologue itself, to a few rows at a time, and so needs no pass before it.
  static bool takes_prologue(const Conv& c) { return c.algorithm == Algorithm::kWinograd || (c.kernel == 1 && c.step == 1 && c.padding == 0); }
  struct Finish {  // what happens to a convolution's sums, and before it to its input
    const Block* prologue = nullptr;
    const float* residual = nullptr;
    float gate = 1, scale = 1;
    bool relu = false;
    const uint8_t* mask = nullptr;
  };
  void convolve(const Conv& conv, const View& in, View out, const Geometry& g, const Finish& finish, int images);
  // Writes the shortcut to `to` (not for an identity that reads the state itself).
  void shortcut(const Block& block, const View& from, View to, bool relu, int images);
  void branch(const Block& block, const View& from, View to, float gate, int images);
  void copy(const View& from, View to, const Geometry& g, bool relu, int images);
  int group(const Block& block) const;  // images that go through a block together: weights are loaded once for all

  const Network& network_;
  const Kernels& kernels_;
  const OperandKernels& operand_;
  const char* packed_;
  const int tile_;
  std::vector<std::vector<std::unique_ptr<Buffer>>> states_;  // by geometry: a halo, once zero, stays zero
  struct Bound {
    char* data;
    int geometry;
  };
  std::vector<Bound> bound_;
  std::vector<Scratch> scratch_;
  std::unique_ptr<Buffer> convolution_, head_;
};

}  // namespace resens::cpu
