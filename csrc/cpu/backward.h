// One thread's memory for path gradients of one tile of images: the intact forward that leaves its signs behind, and the
// blocks' transposes that read them.
#pragma once
#include <memory>
#include <vector>

#include "block.h"

namespace resens::cpu {

// Whether an unchosen block does something to a gradient, so that the tape names it.
inline bool has_letter(const Block& b) { return b.closing_relu || b.activated || b.shortcut != ShortcutKind::kIdentity; }

// Where in the way back every ReLU's mask is applied, and where its bits lie in a tile's memory.
class Masks {
 public:
  struct Mask {
    Geometry geometry;
    int64_t at = -1;  // in bytes from the tile's first image; -1: there is none
    int64_t image_bytes() const { return geometry.image() / 8; }
  };
  struct BlockMasks {
    Mask prologue, closing;
    std::vector<Mask> middle;  // by convolution of the forward: the ReLU behind it
    // The mask of the closing ReLU that the order has before this block, where this block's transpose can apply it to
    // what it writes; that block then finds it done.
    int finishes = -1;
    bool closed = false;
  };

  Masks(const Network& network, const std::vector<int>& order, int tile);
  const std::vector<BlockMasks>& blocks() const { return blocks_; }
  const Mask& head() const { return head_; }  // of the head's ReLU, else of a closing ReLU that the head can apply
  bool head_is_closing() const { return head_is_closing_; }
  // Bits of pixel (0, 0) of an image; null when there is no such mask.
  uint8_t* bits(const Mask& m, int image) const {
    return m.at < 0 ? nullptr : reinterpret_cast<uint8_t*>(buffer_->data()) + m.at + m.image_bytes() * image + m.geometry.origin() / 8;
  }

 private:
  std::vector<BlockMasks> blocks_;
  Mask head_;
  bool head_is_closing_ = false;
  std::unique_ptr<Buffer> buffer_;
};

// Runs the intact network and keeps what the way back needs: masks, and per image the loss's gradient at the pooled
// channels, scaled by a power of two so that long paths do not leave float32's range.
class Recorder : Worker {
 public:
  Recorder(const Network& network, const Kernels& kernels, const char* packed, const std::vector<int>& order, int tile);
  void run(const float* images, const int64_t* labels, int count);
  const Masks& masks() const { return masks_; }
  const float* pooled(int image) const { return pooled_.data() + static_cast<size_t>(image) * stride_; }
  int exponent(int image) const { return exponents_[image]; }

 private:
  void record(const Masks::Mask& mask, const View& view, int first, int count);
  void block(const Step& step, int images);
  void loss(const Step& head, int64_t label, int image);

  Masks masks_;
  Program program_;
  const int stride_;
  std::vector<float> pooled_;
  std::vector<int> exponents_;
};

// Runs the tape of paths on gradients. Long paths shrink them beyond float32's range (1e-46 at 53 blocks of a trained
// ResNet-110), so every state carries a power of two per image that is taken out of it.
class Backward : Worker {
 public:
  Backward(const Network& transposed, const Kernels& kernels, const char* packed, const Masks& masks, int tile);
  void start(const Program& program, const Recorder& recorder, int images);  // fills buffer 0
  // Runs steps[0], and with it the plain shortcuts behind it that only mask the same buffer; returns how many it ran.
  int run(const Step* steps, const Step* end, int images);
  double norm(int buffer, int image);
  void write(int buffer, int image, float* to);  // [C][H][W]

 private:
  bool only_masks(const Step& step) const;
  int mask(const Step* steps, const Step* end, int images);
  void branch(const Block& block, const Masks::BlockMasks& masks, View in, View to, float gate, const uint8_t* finish, int first, int images);
  void shortcut(const Block& block, View from, View to, const uint8_t* finish, int images);
  void convolve_back(const Conv& conv, View from, Geometry in, View to, Geometry out, const Finish& finish, int images);
  void spread(const View& from, const Geometry& in, View to, const Geometry& out, SpreadCall call, int images);
  int normalise(View state, const Geometry& g);  // one image; returns the power of two taken out

  const Masks& masks_;
  std::vector<std::vector<int>> exponents_;  // [buffer][image]
};

}  // namespace resens::cpu
