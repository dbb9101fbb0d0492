// Entry points of the kernels for host code: no CUDA types, so that ops_cuda.cpp and tests can include it anywhere. `stream` is a cudaStream_t; the answer is
// a cudaError_t, 0 when the launch was accepted.
#pragma once
#include "tape.h"

namespace resens::cuda {
struct StemArguments;

int launch_stem(const StemArguments& arguments, int ctas, void* stream);
int launch_tape_bf16(const Arguments& arguments, int images, int ctas, void* stream);
int launch_tape_fp16(const Arguments& arguments, int images, int ctas, void* stream);
}  // namespace resens::cuda
