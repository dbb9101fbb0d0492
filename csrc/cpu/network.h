// What the CPU engine knows of a network: plain structs, read from one int32 array (network.cpp), with the offsets of
// its packed weights. No torch here, so that the native driver and the sanitizers can run everything below ops_cpu.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace resens::cpu {

constexpr int kLanes = 16;  // channels of every stored activation are a multiple of this, whatever the vector width

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// How an activation lies in memory: [y + halo][x + halo][channel], float32, a halo of zeros around it. Height and width
// are rounded up to the 4x4 tiles of the Winograd convolution, whose windows read over the border.
struct Geometry {
  int channels = 0, height = 0, width = 0;
  int stride = 0;  // floats from pixel to pixel: channels rounded up to kLanes
  int halo = 1;
  int rows() const { return round_up(height, 4) + 2 * halo; }
  int columns() const { return round_up(width, 4) + 2 * halo; }
  int64_t pitch() const { return static_cast<int64_t>(columns()) * stride; }
  int64_t image() const { return pitch() * rows(); }  // floats of one image
  int64_t origin() const { return halo * pitch() + static_cast<int64_t>(halo) * stride; }
  bool operator==(const Geometry& o) const {
    return channels == o.channels && height == o.height && width == o.width && stride == o.stride && halo == o.halo;
  }
};

enum class Algorithm : int32_t { kDirect = 0, kWinograd = 1 };

struct Conv {
  int in_channels = 0, out_channels = 0, kernel = 0, step = 1, padding = 0;
  bool relu = false;
  int64_t raw_weight = 0, raw_bias = 0;  // in floats, in the array of folded parameters
  Algorithm algorithm = Algorithm::kDirect;
  int depth = 0;                         // input channels the packed weights span
  int64_t weight = 0, bias = 0;          // in bytes, in the packed array
  int spread = 1;                        // transposed convolutions only: the stride of the one they are the transpose of
};

inline Geometry convolved(const Geometry& in, const Conv& c) {
  Geometry out;
  out.channels = c.out_channels, out.stride = round_up(c.out_channels, kLanes);
  out.height = (in.height + 2 * c.padding - c.kernel) / c.step + 1, out.width = (in.width + 2 * c.padding - c.kernel) / c.step + 1;
  return out;
}

enum class ShortcutKind : int32_t { kIdentity = 0, kPad = 1, kProjection = 2 };

struct Block {
  bool prologue = false;
  int64_t raw_scale = 0, raw_shift = 0, scale = 0, shift = 0;
  std::vector<Conv> convs;
  ShortcutKind shortcut = ShortcutKind::kIdentity;
  int step = 1, before = 0, pool = 0;
  bool activated = false;  // the shortcut reads the prologue's output
  Conv projection;
  bool closing_relu = false;
  Geometry in, out;
  int in_id = 0, out_id = 0;  // index into Network::geometries
  double cost = 0;            // multiply-adds of the branch per image, and of the shortcut
  double shortcut_cost = 0;
};

struct Network {
  int channels = 0, height = 0, width = 0, classes = 0;
  std::vector<Conv> stem;
  int pool_kernel = 0, pool_stride = 0, pool_padding = 0;  // kernel 0: no max pooling
  std::vector<Block> blocks;
  bool head_prologue = false, head_relu = false;
  int head_channels = 0;
  int64_t raw_head_scale = 0, raw_head_shift = 0, raw_head_weight = 0, raw_head_bias = 0;
  int64_t head_scale = 0, head_shift = 0, head_weight = 0, head_bias = 0;
  std::vector<Geometry> geometries;  // distinct geometries of the state; 0 is the stem's output
  int64_t packed_bytes = 0;
};

enum class Dtype : int32_t { kFloat32 = 0, kBFloat16 = 1 };

struct Kernels;  // kernels.h

// Reads the description and lays out the packed weights for these kernels and this dtype; throws std::invalid_argument.
Network read_network(const int32_t* layout, int64_t length, const Kernels& kernels, Dtype dtype);

// Packs the folded parameters (`raw_length` floats) into `packed` (network.packed_bytes, aligned to 64 bytes, zeroed).
void pack(const Network& network, const Kernels& kernels, Dtype dtype, const float* raw, int64_t raw_length, char* packed);

// The network read from the loss end, for gradients: every block leads from its output's shape to its input's, its
// convolutions are the transposes in reverse order (flipped filters, channels exchanged, stride 1 over pixels `spread`
// apart; the prologue's scale is in the weights of the last one), its other fields are those of the forward's block.
// No stem and no head; the gradient starts as the output of block `last` (none: -1).
Network transpose(const Network& network, const Kernels& kernels, int last);

// Packs the folded parameters of `network` for its transpose; otherwise as `pack`.
void pack_transposed(const Network& network, const Network& transposed, const Kernels& kernels, const float* raw, int64_t raw_length, char* packed);

// One step of a compiled program: HEAD reads `source`; the others write `target` (which may be `source`).
struct Step {
  int32_t op = 0, index = 0;  // plan.h's Op; block or word
  int32_t source = 0, target = 0;
  float gate = 1;
};

// A part of the tape with every prefix it needs: buffers are numbered, buffer 0 holds the stem's output at the start.
struct Program {
  std::vector<Step> steps;
  std::vector<int32_t> geometry;  // of each buffer
  double cost = 0;                // multiply-adds per image
};

// Cuts a tape (plan.h) into at most `parts` programs of similar cost that together hold every HEAD once.
std::vector<Program> compile(const Network& network, const int32_t* tape, const float* gates, int64_t length, int64_t words, int parts);

// Multiply-adds per image of the whole tape with every shared prefix computed once, and of its longest word.
struct TapeCost {
  double total = 0, longest = 0;
};
TapeCost tape_cost(const Network& network, const int32_t* tape, const float* gates, int64_t length, int64_t words);

struct Request {
  const float* images = nullptr;    // [batch][C][H][W]
  const int64_t* labels = nullptr;  // [batch], or null when only logits are wanted
  int64_t batch = 0, words = 0;
  const int32_t* tape = nullptr;    // [length][2]
  const float* gates = nullptr;     // [length]
  int64_t length = 0;
  int threads = 1, tile = 0;        // tile 0: chosen
  int64_t* errors = nullptr;        // [words] each, added to; null when only logits are wanted
  int64_t* loss = nullptr;
  int64_t* nonfinite = nullptr;
  float* logits = nullptr;          // [words][batch][classes], or null
  int64_t* control = nullptr;       // [0] cancel (set by the caller), [1] steps x images done, [2] their total; or null
};

// What path gradients are asked for: words are read from the loss end (resens_fast/gradient_plan.py), the forward is intact.
struct GradientRequest {
  const float* images = nullptr;    // [batch][C][H][W]
  const int64_t* labels = nullptr;  // [batch]
  int64_t batch = 0, words = 0;
  const int64_t* order = nullptr;   // [blocks]: the forward's
  const int32_t* tape = nullptr;    // [length][2]
  const float* gates = nullptr;     // [length]
  int64_t length = 0;
  int threads = 1, tile = 0;        // tile 0: chosen
  double* norms = nullptr;          // [words][batch]
  float* gradients = nullptr;       // [words][batch][C][H][W] of the first block's input, or null
  int64_t* control = nullptr;       // as in Request
};

// The gradient of each image's own cross-entropy at the first block's input along every path; false when cancelled.
// `packed` and `packed_transposed` are of float32. Throws std::bad_alloc and std::invalid_argument.
bool path_gradients(const Network& network, const Kernels& kernels, const char* packed, const char* packed_transposed, const GradientRequest& request);
// How a request is cut, and the memory it takes, without doing anything.
struct Schedule {
  int tile = 0, tiles = 0;
  std::vector<double> costs;  // multiply-adds per image of each part of the tape; every tile runs every part
  int64_t bytes = 0;          // of states and scratch, all threads together
};
Schedule schedule(const Network& network, const Kernels& kernels, Dtype dtype, const Request& request);

// Runs the whole tape on all images; false when cancelled. Throws std::bad_alloc and std::invalid_argument.
bool evaluate(const Network& network, const Kernels& kernels, const char* packed, Dtype dtype, const Request& request);

}  // namespace resens::cpu
