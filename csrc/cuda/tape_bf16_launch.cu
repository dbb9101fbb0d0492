// Tape kernels with bf16 operands, one and two images per CTA.
#include "tape_launch.cuh"

namespace resens::cuda {
int launch_tape_bf16(const Arguments& arguments, int images, int ctas, void* stream) { return launch_tape<Bf16>(arguments, images, ctas, stream); }
int best_images_bf16(int shared_limit, int* error) { return best_images_of<Bf16>(shared_limit, error); }
}  // namespace resens::cuda
