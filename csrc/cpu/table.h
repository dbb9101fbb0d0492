// One table of kernels: included once for each instruction set, by conv_<isa>.cpp, with RESENS_ISA and RESENS_WIDTH
// defined.
#pragma once
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12 suspects its own intrinsics

#include "kernels.h"

#include "direct.h"
#include "masks.h"
#include "passes.h"
#include "winograd.h"

namespace resens::cpu::RESENS_ISA {

#ifdef RESENS_NATIVE_BF16
typedef BFloat16 Rounded;
#else
typedef RoundedFloat Rounded;
#endif

template <class Op>
static constexpr OperandKernels operand_kernels(bool rounded) {
  return {static_cast<int>(sizeof(typename Op::T)), rounded, Op::kPairs == 2, &winograd_any<Op>, &direct<Op>, &pass<Op>, &stem<Op>};
}

extern const Kernels kernels;  // a constant is local to its file otherwise
const Kernels kernels = {RESENS_NAME,
                         W,
                         kColumns,
                         kDirectColumns,
                         operand_kernels<Float32>(false),
                         operand_kernels<Rounded>(true),
                         &pass<Float32>,
                         &pad,
                         &max_pool,
                         &head,
                         &signs,
                         &mask,
                         &spread,
                         &largest,
                         &squares,
                         &winograd_scratch,
                         &direct_scratch,
                         &multiply_adds};

}  // namespace resens::cpu::RESENS_ISA
