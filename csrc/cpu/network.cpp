// Reads the int32 description of a network that resens_fast/engines/cpu_layout.py writes, and lays out its weights.
#include "network.h"

#include <algorithm>
#include <stdexcept>

#include "kernels.h"

namespace resens::cpu {
namespace {

constexpr int32_t kVersion = 1;
constexpr int kLargest = 255;               // pixels of a kernel, a padding or a pooling window
constexpr int64_t kMostBytes = 1LL << 48;  // of packed weights: sums of them stay far from overflow

class Reader {
 public:
  Reader(const int32_t* at, int64_t length) : at_(at), end_(at + length) {}
  int next() {
    if (at_ == end_) throw std::invalid_argument("The network's description ends too early.");
    return *at_++;
  }
  bool flag() { return next() != 0; }
  // Offsets into the parameters may pass 2^31: two int32.
  int64_t offset() {
    const uint32_t low = static_cast<uint32_t>(next());
    return static_cast<int64_t>(low) | (static_cast<int64_t>(next()) << 32);
  }
  int between(int low, int high, const char* what) {
    const int n = next();
    if (n < low || n > high) throw std::invalid_argument(std::string("The network's description gives ") + what + " as " + std::to_string(n) + ".");
    return n;
  }
  int positive(const char* what) { return between(1, 1 << 20, what); }
  bool done() const { return at_ == end_; }

 private:
  const int32_t *at_, *end_;
};

Conv read_conv(Reader& r) {
  Conv c;
  c.in_channels = r.positive("input channels");
  c.out_channels = r.positive("output channels");
  c.kernel = r.between(1, kLargest, "a kernel size");
  c.step = r.positive("a stride");
  c.padding = r.between(0, kLargest, "a padding");
  c.relu = r.flag();
  c.raw_weight = r.offset();
  c.raw_bias = r.offset();
  return c;
}

int convolved(int n, const Conv& c) {
  const int out = (n + 2 * c.padding - c.kernel) / c.step + 1;
  if (n + 2 * c.padding < c.kernel) throw std::invalid_argument("A kernel of size " + std::to_string(c.kernel) + " does not fit " + std::to_string(n) + " pixels.");
  return out;
}

// Where the packed arrays go, each aligned to a cache line.
class Arranger {
 public:
  Arranger(const Kernels& kernels, Dtype dtype) : operand_(dtype == Dtype::kBFloat16 ? kernels.bfloat16 : kernels.float32) {}
  int64_t take(int64_t bytes) {
    const int64_t at = used_;
    if (bytes > kMostBytes || used_ > kMostBytes) throw std::invalid_argument("The network's description asks for more weights than any memory holds.");
    used_ += (bytes + 63) / 64 * 64;
    return at;
  }
  int64_t vector(int channels) { return take(4LL * round_up(channels, kLanes)); }
  void place(Conv& c, int depth, Algorithm algorithm) {
    c.algorithm = algorithm;
    c.depth = round_up(depth, operand_.rounded ? 2 : 1);  // bf16 products come in pairs, emulated or not
    const int64_t taps = algorithm == Algorithm::kWinograd ? 36 : c.kernel * c.kernel;
    // The kernels fetch the weights that come next ahead of time, the last ones past their end: harmless.
    c.weight = take(taps * c.depth * round_up(c.out_channels, kLanes) * operand_.bytes);
    c.bias = vector(c.out_channels);
  }
  // The algorithm depends on the shape alone. Winograd computes whole 4x4 tiles: tiny images waste too much of them.
  // Of few channels a direct sum has so few terms that Winograd's transforms are the larger error: at 3 channels it
  // was 5 times torch's own, where 4 is promised.
  void place(Conv& c, const Geometry& out) {
    const double tiles = 36.0 * ((out.height + 3) / 4) * ((out.width + 3) / 4), pixels = 9.0 * out.height * out.width;
    const bool winograd = c.kernel == 3 && c.step == 1 && c.padding == 1 && c.in_channels >= 8 && 1.2 * tiles <= pixels;
    place(c, round_up(c.in_channels, kLanes), winograd ? Algorithm::kWinograd : Algorithm::kDirect);
  }
  int64_t used() const { return used_; }

 private:
  const OperandKernels& operand_;
  int64_t used_ = 0;
};

Geometry geometry(int channels, int height, int width) {
  Geometry g;
  g.channels = channels;
  g.height = height;
  g.width = width;
  g.stride = round_up(channels, kLanes);
  return g;
}

double cost_of(const Conv& c, int height, int width) {
  return static_cast<double>(c.in_channels) * c.out_channels * c.kernel * c.kernel * height * width;
}

int find_or_add(std::vector<Geometry>& all, const Geometry& g) {
  const auto at = std::find(all.begin(), all.end(), g);
  if (at != all.end()) return static_cast<int>(at - all.begin());
  all.push_back(g);
  return static_cast<int>(all.size()) - 1;
}

Block read_block(Reader& r, Arranger& arranger, std::vector<Geometry>& geometries) {
  Block b;
  const int in_channels = r.positive("channels"), in_height = r.positive("a height"), in_width = r.positive("a width");
  const int out_channels = r.positive("channels"), out_height = r.positive("a height"), out_width = r.positive("a width");
  b.in = geometry(in_channels, in_height, in_width);
  b.out = geometry(out_channels, out_height, out_width);
  b.in_id = find_or_add(geometries, b.in);
  b.out_id = find_or_add(geometries, b.out);
  b.prologue = r.flag();
  b.raw_scale = r.offset();
  b.raw_shift = r.offset();
  if (b.prologue) b.scale = arranger.vector(in_channels), b.shift = arranger.vector(in_channels);
  const int convs = r.positive("the number of convolutions");
  if (convs < 2) throw std::invalid_argument("A branch has at least two convolutions, but one has " + std::to_string(convs) + ".");
  int channels = in_channels, height = in_height, width = in_width;
  for (int i = 0; i < convs; ++i) {
    Conv c = read_conv(r);
    if (c.in_channels != channels) throw std::invalid_argument("A convolution of " + std::to_string(c.in_channels) + " channels meets " + std::to_string(channels) + ".");
    height = convolved(height, c), width = convolved(width, c), channels = c.out_channels;
    arranger.place(c, geometry(channels, height, width));
    b.cost += cost_of(c, height, width);
    b.convs.push_back(c);
  }
  if (!(geometry(channels, height, width) == b.out)) throw std::invalid_argument("A block's convolutions do not lead to its output's shape.");
  b.shortcut = static_cast<ShortcutKind>(r.next());
  b.step = r.positive("a shortcut's stride");
  b.before = r.between(0, 1 << 20, "a padding of channels");
  b.pool = r.between(0, kLargest, "a pooling window");
  b.activated = r.flag();
  b.closing_relu = r.flag();
  if (b.shortcut == ShortcutKind::kIdentity) {
    if (!(b.in == b.out)) throw std::invalid_argument("An identity shortcut changes no shape.");
  } else if (b.shortcut == ShortcutKind::kPad) {
    if (b.before + in_channels > round_up(out_channels, kLanes)) throw std::invalid_argument("A padding shortcut pads past its output.");
    const int step = b.pool ? b.pool : b.step;
    if ((out_height - 1) * step + std::max(b.pool, 1) > in_height || (out_width - 1) * step + std::max(b.pool, 1) > in_width) {
      throw std::invalid_argument("A padding shortcut reads past its input.");
    }
  } else if (b.shortcut == ShortcutKind::kProjection) {
    b.projection = read_conv(r);
    const int pool = std::max(b.pool, 1);
    if (convolved(in_height / pool, b.projection) != out_height || convolved(in_width / pool, b.projection) != out_width) {
      throw std::invalid_argument("A projection does not lead to its block's output shape.");
    }
    arranger.place(b.projection, b.out);
    b.shortcut_cost = cost_of(b.projection, out_height, out_width);
  } else {
    throw std::invalid_argument("The network's description names an unknown shortcut.");
  }
  return b;
}

}  // namespace

Network read_network(const int32_t* layout, int64_t length, const Kernels& kernels, Dtype dtype) {
  Reader r(layout, length);
  if (r.next() != kVersion) throw std::invalid_argument("The network's description is of another version.");
  Network n;
  Arranger arranger(kernels, dtype);
  n.channels = r.positive("channels");
  n.height = r.positive("a height");
  n.width = r.positive("a width");
  n.classes = r.positive("the number of classes");
  const int stems = r.positive("the number of stem convolutions");
  int channels = n.channels, height = n.height, width = n.width;
  for (int i = 0; i < stems; ++i) {
    Conv c = read_conv(r);
    if (c.in_channels != channels) throw std::invalid_argument("The stem's convolutions do not fit one another.");
    height = convolved(height, c), width = convolved(width, c), channels = c.out_channels;
    if (i == 0) arranger.place(c, c.in_channels, Algorithm::kDirect);  // few channels: not padded to a vector
    else arranger.place(c, geometry(channels, height, width));
    n.stem.push_back(c);
  }
  n.pool_kernel = r.between(0, kLargest, "a pooling window");
  n.pool_stride = r.between(0, kLargest, "a pooling stride");
  n.pool_padding = r.between(0, kLargest, "a pooling padding");
  if (n.pool_kernel) {
    if (n.pool_stride < 1 || std::min(height, width) + 2 * n.pool_padding < n.pool_kernel) throw std::invalid_argument("The stem's pooling is malformed.");
    height = (height + 2 * n.pool_padding - n.pool_kernel) / n.pool_stride + 1;
    width = (width + 2 * n.pool_padding - n.pool_kernel) / n.pool_stride + 1;
  }
  n.geometries.push_back(geometry(channels, height, width));
  const int blocks = r.next();
  if (blocks < 0) throw std::invalid_argument("The network's description has a negative number of blocks.");
  for (int i = 0; i < blocks; ++i) n.blocks.push_back(read_block(r, arranger, n.geometries));
  n.head_channels = r.positive("the head's channels");
  n.head_prologue = r.flag();
  n.raw_head_scale = r.offset();
  n.raw_head_shift = r.offset();
  n.head_relu = r.flag();
  n.raw_head_weight = r.offset();
  n.raw_head_bias = r.offset();
  if (!r.done()) throw std::invalid_argument("The network's description is too long.");
  const int lanes = round_up(n.classes, kLanes);
  if (n.head_prologue) n.head_scale = arranger.vector(n.head_channels), n.head_shift = arranger.vector(n.head_channels);
  n.head_weight = arranger.take(4LL * round_up(n.head_channels, kLanes) * lanes);
  n.head_bias = arranger.vector(lanes);
  n.packed_bytes = arranger.used();
  return n;
}

Network transpose(const Network& n, const Kernels& kernels, int last) {
  Network t;
  Arranger arranger(kernels, Dtype::kFloat32);
  t.geometries.push_back(last < 0 ? n.geometries[0] : n.blocks[last].out);
  const auto conv = [&](const Conv& c, const Geometry& from) {
    Conv back;
    back.in_channels = c.out_channels, back.out_channels = c.in_channels;
    back.kernel = c.kernel, back.padding = c.kernel - 1 - c.padding, back.spread = c.step;
    arranger.place(back, from);
    return back;
  };
  for (const Block& b : n.blocks) {
    Block back = b;
    back.convs.clear();
    Geometry from = b.in;
    for (const Conv& c : b.convs) {
      back.convs.insert(back.convs.begin(), conv(c, from));
      from = convolved(from, c);
    }
    if (b.prologue) back.scale = arranger.vector(b.in.channels);
    if (b.shortcut == ShortcutKind::kProjection) {
      const int pool = std::max(b.pool, 1);
      back.projection = conv(b.projection, geometry(b.in.channels, b.in.height / pool, b.in.width / pool));
    }
    std::swap(back.in, back.out);
    back.in_id = find_or_add(t.geometries, back.in);
    back.out_id = find_or_add(t.geometries, back.out);
    t.blocks.push_back(std::move(back));
  }
  t.head_channels = n.geometries[0].channels;
  t.packed_bytes = arranger.used();
  return t;
}

}  // namespace resens::cpu
