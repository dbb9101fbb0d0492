// Tape kernels with bf16 operands, every variant.
#include "tape_launch.cuh"

namespace resens::cuda {
int launch_tape_bf16(const Arguments& arguments, int images, int width, int ctas, void* stream) { return launch_tape<Bf16>(arguments, images, width, ctas, stream); }
int best_images_bf16(int width, int shared_limit, int* error) { return best_images_of<Bf16>(width, shared_limit, error); }
}  // namespace resens::cuda
