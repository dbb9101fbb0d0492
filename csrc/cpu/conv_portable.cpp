// Kernels for any machine, aarch64 included: the compiler's own 16-byte vectors, no fused multiply-add.
#define RESENS_ISA portable
#define RESENS_NAME "portable"
#define RESENS_WIDTH 4
#include "table.h"
