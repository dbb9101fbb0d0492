// Tape kernels with fp16 operands, one and two images per CTA.
#include "tape_launch.cuh"

namespace resens::cuda {
int launch_tape_fp16(const Arguments& arguments, int images, int ctas, void* stream) { return launch_tape<Fp16>(arguments, images, ctas, stream); }
}  // namespace resens::cuda
