// The table of function pointers between the interpreter and the kernels of one instruction set.
#pragma once
#include <cstdint>

namespace resens::cpu {

// A convolution of `images` images. Pointers point at pixel (0, 0) of the first image; pitches and strides in floats
// (of `in`: in elements of the operand). Rounded operands: bf16 products with fp32 accumulation.
struct ConvCall {
  const void* in;
  int64_t in_image, in_pitch;
  int in_stride, depth;       // floats from pixel to pixel; input channels to sum over
  float* out;
  const float* residual;      // added before the ReLU, lies as out does; or null
  int64_t out_image, out_pitch;
  int out_stride;             // also the number of output channels computed
  int height, width;          // of the output
  int kernel, step;           // direct only
  const void* weight;
  const float* bias;
  const float *scale, *shift; // the input is relu(scale * in + shift), zero around it, and `in` is fp32; Winograd or 1x1; or null
  float gate;                 // scales the bias
  float out_scale;            // multiplies what is written: the gate of the convolution that reads it
  bool relu;
  const uint8_t* mask;        // a bit for every float of out, 0 where zero is written instead; lies as out does; or null
  int images;
  void* scratch;
};

// Element-wise passes over `images` images of [height][width][stride] pixels.
struct PassCall {
  const float* in;
  int64_t in_image, in_pitch;
  void* out;
  int64_t out_image, out_pitch;
  int in_stride, out_stride, height, width, images;
  const float *scale, *shift;  // relu(scale * x + shift), or null
  bool relu;                   // without scale: relu(x)
};

// Subsampling shortcut: out = 0 except channels [before, before + channels) = mean over pool x pool, or in[step * y][step * x].
struct PadCall {
  const float* in;
  int64_t in_image, in_pitch;
  float* out;
  int64_t out_image, out_pitch;
  int in_stride, out_stride, height, width, images;
  int channels, before, step, pool;
};

struct MaxPoolCall {
  const float* in;
  int64_t in_image, in_pitch;
  float* out;
  int64_t out_image, out_pitch;
  int stride, in_height, in_width, height, width, images, kernel, step, padding;
};

// One bit for every float of `in`: whether it is positive, or NaN. The bits lie as the floats do, 8 to a byte.
struct SignsCall {
  const float* in;
  int64_t in_image, in_pitch;
  uint8_t* bits;
  int stride, height, width, images;
};

constexpr int kMostMasks = 8;

// out = in where all masks have their bit, else 0.
struct MaskCall {
  const float* in;
  int64_t in_image, in_pitch;
  float* out;
  int64_t out_image, out_pitch;
  int stride, height, width, images;
  const uint8_t* masks[kMostMasks];  // lie as out does
  int count;
};

// The transpose of subsampling or of a mean: pixel (y, x) of out is share * in[y / step][x / step], of channel c that of
// channel before + c; zero where there is no such pixel or channel or, unless `fill`, where step does not divide y and x.
struct SpreadCall {
  const float* in;
  int64_t in_image, in_pitch;
  float* out;
  int64_t out_image, out_pitch;
  int in_stride, out_stride, in_height, in_width, height, width, images;
  int channels, before, step;
  bool fill;
  float share;
  const float* scale;   // [channels rounded up], or null
  const uint8_t* mask;  // lies as out does; or null
};

struct HeadCall {
  const float* in;
  int64_t in_pitch;
  int stride, height, width, classes, classes_stride;  // classes rounded up to kLanes
  const float *scale, *shift;                          // or null
  bool relu;
  const float *weight, *bias;                          // [stride][classes_stride], [classes_stride]
  float* pooled;                                       // [stride] scratch
  float* logits;                                       // [classes_stride]
};

struct StemCall {
  const float* in;  // [C][H][W]
  void* out;        // operand [H][W][stride] inside a halo
  int64_t out_pitch;
  int channels, height, width, stride;
};

// Kernels of one operand type.
struct OperandKernels {
  int bytes;                                  // of one element of an operand
  bool rounded;                               // weights and operands are rounded to bf16
  bool paired;                                // native bf16: pairs of input channels side by side
  void (*winograd)(const ConvCall&);          // fp32 input, fp32 output
  void (*direct)(const ConvCall&);            // operand input, fp32 output
  void (*operand)(const PassCall&);           // fp32 -> operand
  void (*stem)(const StemCall&);              // image -> operand
};

struct Kernels {
  const char* name;
  int lanes;            // floats in a vector
  int winograd_columns; // vectors of output channels in a column of packed Winograd weights
  int direct_columns;   // and of direct weights
  OperandKernels float32, bfloat16;
  void (*pass)(const PassCall&);              // fp32 -> fp32
  void (*pad)(const PadCall&);
  void (*max_pool)(const MaxPoolCall&);
  void (*head)(const HeadCall&);
  void (*signs)(const SignsCall&);
  void (*mask)(const MaskCall&);
  void (*spread)(const SpreadCall&);
  float (*largest)(const float* in, int64_t pitch, int stride, int height, int width, int every);  // magnitude, in every so many rows
  double (*squares)(const float* in, int64_t pitch, int stride, int height, int width);  // their sum over one image
  int64_t (*winograd_scratch)(int depth, int out_stride, int64_t in_pitch);  // bytes
  int64_t (*direct_scratch)(int64_t row_bytes, int64_t weight_bytes);        // bytes, for a call with scale
  double (*multiply_adds)(int64_t rounds);                 // a yardstick: returns the operations it did
};

// Instruction sets compiled into this extension that this machine runs, best first; the portable one is always there.
int kernel_count();
const Kernels& kernels_at(int index);
// By name, or the best for "" or null; throws std::invalid_argument that names the known ones.
const Kernels& kernels_named(const char* name);

namespace portable { extern const Kernels kernels; }
// setup.py defines these where it compiles the file with the flags.
#ifdef RESENS_AVX2
namespace avx2 { extern const Kernels kernels; }
#endif
#ifdef RESENS_AVX512
namespace avx512 { extern const Kernels kernels; }
#endif
#ifdef RESENS_AVX512BF16
namespace avx512bf16 { extern const Kernels kernels; }
#endif

}  // namespace resens::cpu
