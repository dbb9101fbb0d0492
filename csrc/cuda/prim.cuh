// Everything the tape kernel does beyond plain C++ goes through these wrappers: PTX here, the host SIMT harness in csrc/testing/prim_host.h. A kernel written
// on them is proven on a machine without a GPU (tests/test_cuda_host.py) and compiled for every architecture from the same source.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define RF_DEV __device__ __forceinline__

namespace resens::cuda {
typedef uint32_t SharedAddress;  // byte address in shared memory
struct Bf16 {};
struct Fp16 {};
template <class T> struct IsBf16 { static constexpr bool value = false; };
template <> struct IsBf16<Bf16> { static constexpr bool value = true; };

struct alignas(8) Float2 { float x, y; };
struct alignas(16) Float4 { float x, y, z, w; };

// volatile: the compiler would otherwise hoist the lane addresses of all three stages out of the tape loop and spill them
RF_DEV int thread_id() { int t; asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t)); return t; }
RF_DEV int cta_id() { return static_cast<int>(blockIdx.x); }
RF_DEV int cta_count() { return static_cast<int>(gridDim.x); }
RF_DEV void barrier() { __syncthreads(); }
RF_DEV SharedAddress shared_base() {
  extern __shared__ __align__(128) unsigned char rf_shared[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(rf_shared));
}

RF_DEV void ldmatrix_x4(uint32_t (&a)[4], SharedAddress p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(p) : "memory");
}
RF_DEV void lds128(uint32_t (&a)[4], SharedAddress p) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(p) : "memory");
}
RF_DEV void sts32(SharedAddress p, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(p), "r"(v) : "memory"); }
RF_DEV void sts128_zero(SharedAddress p) { asm volatile("st.shared.v4.u32 [%0], {%1,%1,%1,%1};" ::"r"(p), "r"(0) : "memory"); }
RF_DEV void sts_float(SharedAddress p, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(p), "f"(v) : "memory"); }
RF_DEV float lds_float(SharedAddress p) { float v; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(p) : "memory"); return v; }
RF_DEV int lds_int(SharedAddress p) { int v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(p) : "memory"); return v; }

RF_DEV float relu(float v) { float r; asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(r) : "f"(v)); return r; }  // fmaxf would hide a NaN
template <class T> RF_DEV uint32_t pack2(float lo, float hi) {
  uint32_t d;
  if constexpr (IsBf16<T>::value) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
template <class T> RF_DEV uint32_t pack2_relu(float lo, float hi) {
  uint32_t d;
  if constexpr (IsBf16<T>::value) asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  else asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
}
#define RF_MMA(type)                                                                                                              \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T> RF_DEV void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (IsBf16<T>::value) RF_MMA("bf16");
  else RF_MMA("f16");
}
#undef RF_MMA

RF_DEV void cp_async16(SharedAddress to, const void* from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
RF_DEV void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> RF_DEV void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
RF_DEV float shuffle_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }

// Read-only data (tape, weights' list, parameters): volatile, so that nothing is loaded ahead and kept in registers across the tape loop.
RF_DEV int load_global(const int* p) { int v; asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(p)); return v; }
RF_DEV float load_global(const float* p) { float v; asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p)); return v; }
RF_DEV Float2 load_global(const Float2* p) { Float2 v; asm volatile("ld.global.nc.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p)); return v; }
// Slots and the stem's output: read once, so they bypass L1.
RF_DEV Float2 load_state(const Float2* p) { Float2 v; asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(p) : "memory"); return v; }
RF_DEV Float4 load_state(const Float4* p) {
  Float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
RF_DEV void store_state(Float4* p, Float4 v) { asm volatile("st.global.cg.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(p), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory"); }
RF_DEV void store_state(float* p, float v) { asm volatile("st.global.cg.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory"); }
RF_DEV void add_global(unsigned long long* p, unsigned long long v) { atomicAdd(p, v); }
RF_DEV int take_next(int* p) { return atomicAdd(p, 1); }
}  // namespace resens::cuda
#else
#include "../testing/prim_host.h"
namespace resens::cuda {
struct alignas(8) Float2 { float x, y; };
struct alignas(16) Float4 { float x, y, z, w; };
}  // namespace resens::cuda
#endif
