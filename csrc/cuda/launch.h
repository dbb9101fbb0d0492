// Entry points of the kernels for host code: no CUDA types, so that ops_cuda.cpp and tests can include it anywhere. `stream` is a cudaStream_t; the answer is
// a cudaError_t, 0 when the launch was accepted.
#pragma once
#include "tape.h"

namespace resens::cuda {
struct StemArguments;

int launch_stem(const StemArguments& arguments, int ctas, void* stream);
int launch_tape_bf16(const Arguments& arguments, int images, int width, int ctas, void* stream);
int launch_tape_fp16(const Arguments& arguments, int images, int width, int ctas, void* stream);
// Images per CTA of the best variant on the current device, 0 when none runs there; `shared_limit` bytes of shared memory per CTA with opt-in.
int best_images_bf16(int width, int shared_limit, int* error);
int best_images_fp16(int width, int shared_limit, int* error);
}  // namespace resens::cuda
