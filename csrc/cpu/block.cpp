// Runs one block on one tile of images: prologue, convolutions, shortcut.
#include "block.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../plan.h"

namespace resens::cpu {

Buffer::Buffer(int64_t bytes) {
  const int64_t page = bytes >= (int64_t{1} << 21) ? int64_t{1} << 21 : 64;
  const int64_t size = (std::max<int64_t>(bytes, 1) + page - 1) / page * page;
  bytes_ = size + page;
  // calloc knows which memory the system has just zeroed, and does not touch it.
  block_ = std::calloc(1, bytes_);
  if (!block_) throw std::bad_alloc();
  data_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block_) + page - 1) / page * page);
#if defined(__linux__)
  if (page > 64) madvise(data_, size, MADV_HUGEPAGE);  // only speed depends on it
#endif
}

Buffer::~Buffer() { std::free(block_); }

Worker::Worker(const Network& network, const Kernels& kernels, const char* packed, Dtype dtype, int tile)
    : network_(network),
      kernels_(kernels),
      operand_(dtype == Dtype::kBFloat16 ? kernels.bfloat16 : kernels.float32),
      packed_(packed),
      tile_(tile),
      states_(network.geometries.size()) {
  int64_t most = 0;
  const auto count = [&](const Conv& c, const Geometry* activated) {
    const int64_t outputs = round_up(c.out_channels, kLanes), bytes = operand_.bytes;
    if (c.algorithm == Algorithm::kWinograd) {
      most = std::max(most, kernels.winograd_scratch(c.depth, static_cast<int>(outputs), activated ? activated->pitch() : 0));
    } else if (activated && takes_prologue(c)) {
      most = std::max(most, kernels.direct_scratch(bytes * activated->width * activated->stride, bytes * c.depth * outputs));
    }
  };
  for (const Conv& c : network.stem) count(c, nullptr);
  for (const Block& b : network.blocks) {
    for (const Conv& c : b.convs) count(c, b.prologue ? &b.in : nullptr);
    if (b.shortcut == ShortcutKind::kProjection) count(b.projection, nullptr);
  }
  convolution_ = std::make_unique<Buffer>(most);
  head_ = std::make_unique<Buffer>(4LL * (round_up(network.head_channels, kLanes) + round_up(network.classes, kLanes)));
}

void Worker::bind(const Program& program) {
  std::vector<size_t> used(states_.size(), 0);
  bound_.clear();
  for (int32_t g : program.geometry) {
    if (used[g] == states_[g].size()) states_[g].push_back(std::make_unique<Buffer>(4 * network_.geometries[g].image() * tile_));
    bound_.push_back({states_[g][used[g]++]->data(), g});
  }
}

int64_t Worker::bytes() const {
  int64_t sum = convolution_->bytes() + head_->bytes();
  for (const auto& buffers : states_) {
    for (const auto& b : buffers) sum += b->bytes();
  }
  for (const Scratch& s : scratch_) sum += s.buffer->bytes();
  return sum;
}

View Worker::view(char* base, const Geometry& g, int bytes) const {
  View v;
  v.origin = base + g.origin() * bytes;
  v.image = g.image();
  v.pitch = g.pitch();
  v.stride = g.stride;
  v.halo = g.halo;
  return v;
}

View Worker::state(int buffer, int image) {
  const Geometry& g = network_.geometries[bound_[buffer].geometry];
  return view(bound_[buffer].data + 4 * g.image() * image, g, 4);
}

View Worker::scratch(Role role, Geometry geometry, int images, int bytes) {
  for (Scratch& s : scratch_) {
    if (s.role == role && s.bytes == bytes && s.geometry == geometry && s.images >= images) return view(s.buffer->data(), geometry, bytes);
  }
  scratch_.push_back({role, geometry, images, bytes, std::make_unique<Buffer>(geometry.image() * images * bytes)});
  return view(scratch_.back().buffer->data(), geometry, bytes);
}

void Worker::copy(const View& from, View to, const Geometry& g, bool relu, int images) {
  kernels_.pass({from.floats(), from.image, from.pitch, to.origin, to.image, to.pitch, from.stride, to.stride, g.height, g.width, images, nullptr, nullptr, relu});
}

View Worker::activate(Role role, const View& from, const Geometry& g, const Block& block, int images) {
  View to = scratch(role, g, images, 4);
  kernels_.pass({from.floats(), from.image, from.pitch, to.origin, to.image, to.pitch, from.stride, to.stride, g.height, g.width, images,
                 reinterpret_cast<const float*>(packed_ + block.scale), reinterpret_cast<const float*>(packed_ + block.shift), false});
  return to;
}

View Worker::operand(Role role, const Conv& conv, const View& from, const Geometry& g, const Block* prologue, int images) {
  const bool floats = reads_floats(conv);
  if (!prologue && floats && conv.padding <= from.halo) return from;
  Geometry wide = g;
  wide.halo = std::max(1, conv.padding);
  View to = scratch(role, wide, images, floats ? 4 : operand_.bytes);
  const PassCall call = {from.floats(), from.image, from.pitch, to.origin, to.image, to.pitch, from.stride, to.stride, g.height, g.width, images,
                         prologue ? reinterpret_cast<const float*>(packed_ + prologue->scale) : nullptr,
                         prologue ? reinterpret_cast<const float*>(packed_ + prologue->shift) : nullptr, false};
  (floats ? kernels_.pass : operand_.operand)(call);
  return to;
}

void Worker::convolve(const Conv& conv, const View& in, View out, const Geometry& g, const Finish& finish, int images) {
  const int64_t bytes = reads_floats(conv) ? 4 : operand_.bytes;
  ConvCall call = {};
  call.in = in.origin - conv.padding * (in.pitch + in.stride) * bytes;
  call.in_image = in.image, call.in_pitch = in.pitch, call.in_stride = in.stride, call.depth = conv.depth;
  call.out = out.floats(), call.residual = finish.residual;
  call.out_image = out.image, call.out_pitch = out.pitch, call.out_stride = out.stride;
  call.height = g.height, call.width = g.width, call.kernel = conv.kernel, call.step = conv.step;
  call.weight = packed_ + conv.weight;
  call.bias = reinterpret_cast<const float*>(packed_ + conv.bias);
  if (finish.prologue) {
    call.scale = reinterpret_cast<const float*>(packed_ + finish.prologue->scale);
    call.shift = reinterpret_cast<const float*>(packed_ + finish.prologue->shift);
  }
  call.gate = finish.gate, call.out_scale = finish.scale, call.relu = finish.relu, call.mask = finish.mask;
  call.images = images;
  call.scratch = convolution_->data();
  (conv.algorithm == Algorithm::kWinograd ? operand_.winograd : operand_.direct)(call);
}

void Worker::stem(const float* images, int count) {
  const Network& n = network_;
  for (int image = 0; image < count; ++image) {
    Geometry g;
    g.channels = n.channels, g.height = n.height, g.width = n.width;
    g.stride = n.stem[0].depth, g.halo = std::max(1, n.stem[0].padding);
    View in = scratch(kOperand, g, 1, operand_.bytes);
    operand_.stem({images + static_cast<int64_t>(image) * n.channels * n.height * n.width, in.origin, in.pitch, n.channels, n.height, n.width, in.stride});
    for (size_t i = 0; i < n.stem.size(); ++i) {
      const Conv& c = n.stem[i];
      if (i) in = operand(kOperand, c, in, g, nullptr, 1);
      g.height = (g.height + 2 * c.padding - c.kernel) / c.step + 1;
      g.width = (g.width + 2 * c.padding - c.kernel) / c.step + 1;
      g.channels = c.out_channels, g.stride = round_up(c.out_channels, kLanes), g.halo = 1;
      const bool last = i + 1 == n.stem.size();
      const View out = last && !n.pool_kernel ? state(0, image) : scratch(i % 2 ? kMiddle2 : kMiddle, g, 1, 4);
      Finish finish;
      finish.relu = c.relu;
      convolve(c, in, out, g, finish, 1);
      in = out;
    }
    if (n.pool_kernel) {
      View out = state(0, image);
      const Geometry& s = n.geometries[0];
      kernels_.max_pool({in.floats(), in.image, in.pitch, out.floats(), out.image, out.pitch, out.stride, g.height, g.width, s.height, s.width, 1,
                         n.pool_kernel, n.pool_stride, n.pool_padding});
    }
  }
}

void Worker::shortcut(const Block& b, const View& from, View to, bool relu, int images) {
  View x = from;
  if (b.shortcut == ShortcutKind::kIdentity) {
    if (b.activated) x = activate(kShortcutOperand, from, b.in, b, images);
    copy(x, to, b.out, relu, images);
    return;
  }
  Geometry g = b.in;
  const Block* prologue = b.activated ? &b : nullptr;
  const bool pads = b.shortcut == ShortcutKind::kPad;
  if (prologue && (pads || b.pool)) x = activate(kShortcutOperand, from, g, b, images), prologue = nullptr;
  if (pads || b.pool) {
    const int step = b.pool ? b.pool : b.step;
    View out = to;
    if (!pads) {
      g.height /= step, g.width /= step;
      out = scratch(kPooled, g, images, 4);
    } else {
      g = b.out;
    }
    kernels_.pad({x.floats(), x.image, x.pitch, out.floats(), out.image, out.pitch, x.stride, out.stride, g.height, g.width, images, b.in.channels,
                  pads ? b.before : 0, step, b.pool});
    x = out;
  }
  if (pads) {
    if (relu) copy(to, to, b.out, true, images);
    return;
  }
  Finish finish;
  finish.relu = relu;
  convolve(b.projection, operand(kShortcutOperand, b.projection, x, g, prologue, images), to, b.out, finish, images);
}

void Worker::branch(const Block& b, const View& from, View to, float gate, int images) {
  Finish last;
  last.gate = gate;
  last.relu = b.closing_relu;
  if (b.shortcut == ShortcutKind::kIdentity) {
    last.residual = b.activated ? activate(kShortcutOperand, from, b.in, b, images).floats() : from.floats();
  } else {
    shortcut(b, from, to, false, images);
    last.residual = to.floats();
  }
  View in = from;
  Geometry g = b.in;
  for (size_t i = 0; i < b.convs.size(); ++i) {
    const Conv& c = b.convs[i];
    const Block* prologue = i == 0 && b.prologue ? &b : nullptr;
    const Block* within = takes_prologue(c) ? prologue : nullptr;
    if (!within) in = operand(kOperand, c, in, g, prologue, images);
    g.height = (g.height + 2 * c.padding - c.kernel) / c.step + 1;
    g.width = (g.width + 2 * c.padding - c.kernel) / c.step + 1;
    g.channels = c.out_channels, g.stride = round_up(c.out_channels, kLanes);
    if (i + 1 == b.convs.size()) {
      last.prologue = within;
      convolve(c, in, to, g, last, images);
    } else {
      Finish finish;
      finish.relu = true;
      finish.prologue = within;
      if (i + 2 == b.convs.size()) finish.scale = gate;  // the gate scales the last convolution's input and its bias
      const View out = scratch(i % 2 ? kMiddle2 : kMiddle, g, images, 4);
      convolve(c, in, out, g, finish, images);
      in = out;
    }
  }
}

int Worker::group(const Block& b) const { return std::min(tile_, std::max(1, 1024 / (b.out.height * b.out.width))); }

void Worker::run(const Step& step, int images) {
  const Block& b = network_.blocks[step.index];
  const int most = group(b);
  for (int first = 0; first < images; first += most) {
    const int count = std::min(most, images - first);
    const View from = state(step.source, first), to = state(step.target, first);
    if (step.op == RUN) {
      branch(b, from, to, step.gate, count);
    } else {
      shortcut(b, from, to, b.closing_relu, count);
    }
  }
}

const float* Worker::head(const Step& step, int image) {
  const Network& n = network_;
  const View x = state(step.source, image);
  const Geometry& g = n.geometries[bound_[step.source].geometry];
  float* pooled = reinterpret_cast<float*>(head_->data());
  const auto at = [&](int64_t offset) { return reinterpret_cast<const float*>(packed_ + offset); };
  float* logits = pooled + g.stride;
  kernels_.head({x.floats(), x.pitch, x.stride, g.height, g.width, n.classes, round_up(n.classes, kLanes), n.head_prologue ? at(n.head_scale) : nullptr,
                 n.head_prologue ? at(n.head_shift) : nullptr, n.head_relu, at(n.head_weight), at(n.head_bias), pooled, logits});
  return logits;
}

}  // namespace resens::cpu
