// Kernels for x86-64 with AVX2 and FMA: setup.py compiles this file, and no other, for them.
#define RESENS_ISA avx2
#define RESENS_NAME "avx2"
#define RESENS_WIDTH 8
#include "table.h"
