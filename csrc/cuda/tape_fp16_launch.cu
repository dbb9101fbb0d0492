// Tape kernels with fp16 operands, every variant.
#include "tape_launch.cuh"

namespace resens::cuda {
int launch_tape_fp16(const Arguments& arguments, int images, int width, int ctas, void* stream) { return launch_tape<Fp16>(arguments, images, width, ctas, stream); }
int best_images_fp16(int width, int shared_limit, int* error) { return best_images_of<Fp16>(width, shared_limit, error); }
}  // namespace resens::cuda
