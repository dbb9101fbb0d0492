// Kernels for x86-64 with AVX-512 (F, BW, DQ, VL): setup.py compiles this file, and no other, for them.
#define RESENS_ISA avx512
#define RESENS_NAME "avx512"
#define RESENS_WIDTH 16
#include "table.h"
