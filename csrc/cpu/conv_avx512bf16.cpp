// Kernels for x86-64 with AVX-512 and its bf16 dot product: setup.py compiles this file, and no other, for them.
#define RESENS_ISA avx512bf16
#define RESENS_NAME "avx512bf16"
#define RESENS_WIDTH 16
#define RESENS_NATIVE_BF16
#include "table.h"
