// Gradients of one tile of images, block by block: the transposes of what block.cpp runs.
#include "backward.h"

#include <algorithm>
#include <cmath>

#include "../plan.h"

namespace resens::cpu {
Masks::Masks(const Network& n, const std::vector<int>& order, int tile) : blocks_(n.blocks.size()) {
  int64_t used = 0;
  const auto place = [&](Mask& m, const Geometry& g) {
    m.geometry = g;
    m.at = used;
    used += (m.image_bytes() * tile + 63) / 64 * 64;
  };
  for (int j : order) {
    const Block& b = n.blocks[j];
    BlockMasks& m = blocks_[j];
    if (b.prologue) place(m.prologue, b.in);
    Geometry g = b.in;
    for (size_t i = 0; i + 1 < b.convs.size(); ++i) {
      g = convolved(g, b.convs[i]);
      place(m.middle.emplace_back(), g);
    }
    if (b.closing_relu) place(m.closing, b.out);
  }
  for (size_t k = 0; k + 1 < order.size(); ++k) {
    const Block& next = n.blocks[order[k + 1]];
    if (!n.blocks[order[k]].closing_relu || next.prologue || !has_letter(next)) continue;
    blocks_[order[k]].closed = true;
    blocks_[order[k + 1]].finishes = order[k];
  }
  if (n.head_relu) {
    place(head_, order.empty() ? n.geometries[0] : n.blocks[order.back()].out);
  } else if (!order.empty() && n.blocks[order.back()].closing_relu) {
    blocks_[order.back()].closed = head_is_closing_ = true;
    head_ = blocks_[order.back()].closing;
  }
  buffer_ = std::make_unique<Buffer>(used);
}

Recorder::Recorder(const Network& network, const Kernels& kernels, const char* packed, const std::vector<int>& order, int tile)
    : Worker(network, kernels, packed, Dtype::kFloat32, tile),
      masks_(network, order, tile),
      stride_(round_up(network.head_channels, kLanes)),
      pooled_(static_cast<size_t>(stride_) * tile),
      exponents_(tile) {
  std::vector<int32_t> tape;
  for (int b : order) tape.insert(tape.end(), {RUN, b});
  tape.insert(tape.end(), {HEAD, 0});
  program_ = compile(network, tape.data(), std::vector<float>(tape.size() / 2, 1.0f).data(), static_cast<int64_t>(tape.size() / 2), 1, 1).at(0);
}

void Recorder::run(const float* images, const int64_t* labels, int count) {
  bind(program_);
  stem(images, count);
  for (const Step& step : program_.steps) {
    if (step.op == RUN) {
      block(step, count);
    } else {
      for (int i = 0; i < count; ++i) loss(step, labels[i], i);
    }
  }
}

void Recorder::record(const Masks::Mask& mask, const View& v, int first, int count) {
  const Geometry& g = mask.geometry;
  kernels_.signs({v.floats(), v.image, v.pitch, masks_.bits(mask, first), g.stride, g.height, g.width, count});
}

void Recorder::block(const Step& step, int images) {
  const Block& b = network_.blocks[step.index];
  const Masks::BlockMasks& masks = masks_.blocks()[step.index];
  const int most = group(b);
  for (int first = 0; first < images; first += most) {
    const int count = std::min(most, images - first);
    const View from = state(step.source, first);
    View to = state(step.target, first), in = from;
    Geometry g = b.in;
    if (b.prologue) {
      in = activate(kMasked, from, b.in, b, count);
      record(masks.prologue, in, first, count);
    }
    Finish last;
    last.relu = b.closing_relu;
    if (b.shortcut == ShortcutKind::kIdentity) {
      last.residual = b.activated ? in.floats() : from.floats();
    } else {
      shortcut(b, from, to, false, count);
      last.residual = to.floats();
    }
    for (size_t i = 0; i < b.convs.size(); ++i) {
      const Conv& c = b.convs[i];
      in = operand(kOperand, c, in, g, nullptr, count);
      g = convolved(g, c);
      if (i + 1 == b.convs.size()) {
        convolve(c, in, to, g, last, count);
      } else {
        const View out = scratch(i % 2 ? kMiddle2 : kMiddle, g, count, 4);
        Finish finish;
        finish.relu = true;
        convolve(c, in, out, g, finish, count);
        record(masks.middle[i], out, first, count);
        in = out;
      }
    }
    if (b.closing_relu) record(masks.closing, to, first, count);
  }
}

// Softmax and cross-entropy in double: the gradient of a confident image is the small sum of the other classes.
void Recorder::loss(const Step& step, int64_t label, int image) {
  const Network& n = network_;
  const Geometry& g = n.geometries[bound_[step.source].geometry];
  const View x = state(step.source, image);
  if (n.head_relu) {
    View active = x;
    if (n.head_prologue) {
      active = scratch(kMasked, g, 1, 4);
      kernels_.pass({x.floats(), x.image, x.pitch, active.origin, active.image, active.pitch, x.stride, active.stride, g.height, g.width, 1,
                     reinterpret_cast<const float*>(packed_ + n.head_scale), reinterpret_cast<const float*>(packed_ + n.head_shift), false});
    }
    record(masks_.head(), active, image, 1);
  }
  const float* logits = head(step, image);
  const float best = *std::max_element(logits, logits + n.classes);
  std::vector<double> slope(n.classes);
  double sum = 0, others = 0;
  for (int k = 0; k < n.classes; ++k) sum += slope[k] = std::exp(static_cast<double>(logits[k]) - best);
  for (int k = 0; k < n.classes; ++k) {
    slope[k] /= sum;
    if (k != label) others += slope[k];
  }
  slope[label] = -others;
  const float* weight = reinterpret_cast<const float*>(packed_ + n.head_weight);
  const float* scale = n.head_prologue ? reinterpret_cast<const float*>(packed_ + n.head_scale) : nullptr;
  const int lanes = round_up(n.classes, kLanes);
  std::vector<double> pooled(g.channels);
  double largest = 0;
  for (int c = 0; c < g.channels; ++c) {
    for (int k = 0; k < n.classes; ++k) pooled[c] += slope[k] * weight[static_cast<int64_t>(c) * lanes + k];
    pooled[c] *= (scale ? scale[c] : 1.0) / (static_cast<double>(g.height) * g.width);
    if (!(std::abs(pooled[c]) <= largest)) largest = std::abs(pooled[c]);
  }
  exponents_[image] = largest > 0 && std::isfinite(largest) ? std::ilogb(largest) : 0;
  float* to = pooled_.data() + static_cast<size_t>(image) * stride_;
  for (int c = 0; c < g.channels; ++c) to[c] = static_cast<float>(std::scalbn(pooled[c], -exponents_[image]));
}

Backward::Backward(const Network& transposed, const Kernels& kernels, const char* packed, const Masks& masks, int tile)
    : Worker(transposed, kernels, packed, Dtype::kFloat32, tile), masks_(masks) {}

void Backward::start(const Program& program, const Recorder& recorder, int images) {
  bind(program);
  exponents_.assign(program.geometry.size(), std::vector<int>(images));
  const Geometry& g = network_.geometries[0];
  for (int i = 0; i < images; ++i) {
    exponents_[0][i] = recorder.exponent(i);
    View from;  // one pixel that all others repeat
    from.origin = const_cast<char*>(reinterpret_cast<const char*>(recorder.pooled(i)));
    from.stride = g.stride;
    SpreadCall call = {};
    call.step = std::max(g.height, g.width), call.fill = true, call.share = 1, call.channels = g.channels;
    call.mask = masks_.bits(masks_.head(), i);
    Geometry pixel = g;
    pixel.height = pixel.width = 1;
    spread(from, pixel, state(0, i), g, call, 1);
  }
}

void Backward::spread(const View& from, const Geometry& in, View to, const Geometry& out, SpreadCall call, int images) {
  call.in = from.floats(), call.in_image = from.image, call.in_pitch = from.pitch;
  call.out = to.floats(), call.out_image = to.image, call.out_pitch = to.pitch;
  call.in_stride = from.stride, call.out_stride = to.stride;
  call.in_height = in.height, call.in_width = in.width, call.height = out.height, call.width = out.width;
  call.images = images;
  kernels_.spread(call);
}

bool Backward::only_masks(const Step& step) const {
  const Block& b = network_.blocks[step.index];
  return step.op == SHORTCUT && b.shortcut == ShortcutKind::kIdentity && !b.activated;
}

int Backward::mask(const Step* steps, const Step* end, int images) {
  const Geometry& g = network_.blocks[steps->index].out;
  const View from = state(steps->source, 0);
  View to = state(steps->target, 0);
  MaskCall call = {from.floats(), from.image, from.pitch, to.floats(), to.image, to.pitch, to.stride, g.height, g.width, images, {}, 0};
  int ran = 0;
  const auto add = [&](const Masks::Mask& m) { call.masks[call.count++] = masks_.bits(m, 0); };
  for (const Step* s = steps; s != end && only_masks(*s) && call.count + 2 <= kMostMasks; ++s, ++ran) {
    if (ran && (s->source != steps->target || s->target != steps->target)) break;
    const Masks::BlockMasks& m = masks_.blocks()[s->index];
    if (m.closing.at >= 0 && !m.closed) add(m.closing);
    if (m.finishes >= 0) add(masks_.blocks()[m.finishes].closing);
  }
  if (call.count || steps->source != steps->target) kernels_.mask(call);
  exponents_[steps->target] = exponents_[steps->source];
  return ran;
}

int Backward::run(const Step* steps, const Step* end, int images) {
  if (only_masks(*steps)) return mask(steps, end, images);
  const Block& b = network_.blocks[steps->index];
  const Masks::BlockMasks& m = masks_.blocks()[steps->index];
  const bool activates = b.prologue && (steps->op == RUN || b.activated);
  const Masks::Mask none, &finish = activates ? m.prologue : m.finishes >= 0 ? masks_.blocks()[m.finishes].closing : none;
  const int most = group(b);
  for (int first = 0; first < images; first += most) {
    const int count = std::min(most, images - first);
    View from = state(steps->source, first);
    const View to = state(steps->target, first);
    if (m.closing.at >= 0 && !m.closed) {
      View masked = scratch(kMasked, b.in, count, 4);
      kernels_.mask({from.floats(), from.image, from.pitch, masked.floats(), masked.image, masked.pitch, masked.stride, b.in.height, b.in.width, count,
                     {masks_.bits(m.closing, first)}, 1});
      from = masked;
    }
    if (steps->op == RUN) {
      branch(b, m, from, to, steps->gate, masks_.bits(finish, first), first, count);
    } else {
      shortcut(b, from, to, masks_.bits(finish, first), count);
    }
    for (int i = first; i < first + count; ++i) exponents_[steps->target][i] = exponents_[steps->source][i] + normalise(state(steps->target, i), b.out);
  }
  return 1;
}

int Backward::normalise(View x, const Geometry& g) {
  constexpr int kSample = 4, kNear = 24;  // a quarter of the rows tells the magnitude well enough
  float most = kernels_.largest(x.floats(), x.pitch, x.stride, g.height, g.width, kSample);
  if (most == 0.0f) most = kernels_.largest(x.floats(), x.pitch, x.stride, g.height, g.width, 1);
  if (most == 0.0f || !std::isfinite(most)) return 0;
  const int exponent = std::clamp(std::ilogb(most), -100, 100);
  if (std::abs(exponent) <= kNear) return 0;
  SpreadCall call = {};
  call.step = 1, call.channels = g.channels, call.share = std::scalbn(1.0f, -exponent);
  spread(x, g, x, g, call, 1);
  return exponent;
}

void Backward::branch(const Block& b, const Masks::BlockMasks& m, View in, View to, float gate, const uint8_t* finish, int first, int images) {
  Geometry g = b.in;
  const size_t last = b.convs.size() - 1;
  for (size_t i = 0; i <= last; ++i) {
    Finish f;
    f.scale = i == 0 ? gate : 1.0f;
    if (i == last) {
      f.mask = finish;
      convolve_back(b.convs[i], in, g, to, b.out, f, images);
    } else {
      const Masks::Mask& behind = m.middle[last - 1 - i];
      f.mask = masks_.bits(behind, first);
      const View out = scratch(i % 2 ? kMiddle2 : kMiddle, behind.geometry, images, 4);
      convolve_back(b.convs[i], in, g, out, behind.geometry, f, images);
      in = out;
      g = behind.geometry;
    }
  }
}

void Backward::shortcut(const Block& b, View from, View to, const uint8_t* finish, int images) {
  SpreadCall call = {};
  call.mask = finish, call.channels = b.out.channels, call.step = std::max(b.pool, 1), call.fill = b.pool > 0;
  call.share = 1.0f / static_cast<float>(call.step * call.step);
  const float* scale = b.activated ? reinterpret_cast<const float*>(packed_ + b.scale) : nullptr;
  if (b.shortcut != ShortcutKind::kProjection) {  // the identity subsamples by 1
    if (b.shortcut == ShortcutKind::kPad && !b.pool) call.step = b.step;
    call.before = b.shortcut == ShortcutKind::kPad ? b.before : 0;
    call.scale = scale;
    return spread(from, b.in, to, b.out, call, images);
  }
  Finish last;
  last.mask = finish;
  if (!b.pool) return convolve_back(b.projection, from, b.in, to, b.out, last, images);
  Geometry g = b.out;
  g.height /= b.pool, g.width /= b.pool;
  const View pooled = scratch(kMiddle, g, images, 4);
  convolve_back(b.projection, from, b.in, pooled, g, {}, images);
  spread(pooled, g, to, b.out, call, images);
}

void Backward::convolve_back(const Conv& c, View from, Geometry in, View to, Geometry out, const Finish& finish, int images) {
  if (c.spread == 1) return convolve(c, operand(kOperand, c, from, in, nullptr, images), to, out, finish, images);
  SpreadCall call = {};
  call.step = c.spread, call.share = 1;
  if (c.kernel == 1 && c.padding == 0) {
    Geometry small = in;
    small.channels = call.channels = c.out_channels, small.stride = out.stride;
    const View low = scratch(kPooled, small, images, 4);
    Finish first = finish;
    first.mask = nullptr;
    call.mask = finish.mask;
    convolve(c, from, low, small, first, images);
    return spread(low, small, to, out, call, images);
  }
  // The forward's windows reach `kernel - 1 - padding` pixels over the border.
  Geometry wide = in;
  wide.height = std::max(out.height, (in.height - 1) * c.spread + 1), wide.width = std::max(out.width, (in.width - 1) * c.spread + 1);
  wide.halo = std::max({1, c.padding, c.kernel - 1 - c.padding});
  call.channels = in.channels;
  const View apart = scratch(kShortcutOperand, wide, images, 4);
  spread(from, in, apart, wide, call, images);
  convolve(c, apart, to, out, finish, images);
}

double Backward::norm(int buffer, int image) {
  const View x = state(buffer, image);
  const Geometry& g = network_.geometries[bound_[buffer].geometry];
  return std::scalbn(std::sqrt(kernels_.squares(x.floats(), x.pitch, x.stride, g.height, g.width)), exponents_[buffer][image]);
}

void Backward::write(int buffer, int image, float* to) {
  const View x = state(buffer, image);
  const Geometry& g = network_.geometries[bound_[buffer].geometry];
  for (int c = 0; c < g.channels; ++c) {
    for (int y = 0; y < g.height; ++y) {
      const float* from = x.floats() + y * x.pitch + c;
      for (int i = 0; i < g.width; ++i) *to++ = static_cast<float>(std::scalbn(static_cast<double>(from[static_cast<int64_t>(i) * x.stride]), exponents_[buffer][image]));
    }
  }
}

}  // namespace resens::cpu
