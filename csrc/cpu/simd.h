// A vector of W floats and the dozen operations the kernels need, for the instruction set that the including file chose
// with RESENS_WIDTH (16: AVX-512, 8: AVX2, 4: the compiler's generic vectors) and RESENS_ISA (its namespace).
// Everything is static: two files that include this for different instruction sets must not share a symbol, or the
// linker keeps one of them and a machine without AVX-512 runs into an illegal instruction. For the same reason the
// kernels use no standard library templates. Multiply-adds are explicit: the compiler contracts nothing
// (-ffp-contract=off), so every instantiation rounds alike. The portable path multiplies, rounds and adds.
#pragma once
#include <cstdint>
#if RESENS_WIDTH > 4
#include <immintrin.h>
#endif

#define RESENS_INLINE static inline __attribute__((always_inline))
#define RESENS_INLINED __attribute__((always_inline))  // of a lambda
#define RESENS_UNROLL _Pragma("GCC unroll 32")
#define RESENS_ROLLED _Pragma("GCC unroll 1")
// A pointer that the compiler must keep in a register: left alone it computes every address from the pitch anew.
#define RESENS_OPAQUE(pointer) __asm__("" : "+r"(pointer))

namespace resens::cpu::RESENS_ISA {

constexpr int W = RESENS_WIDTH;

#if RESENS_WIDTH == 16
typedef __m512 V;
RESENS_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
RESENS_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
RESENS_INLINE V all(float x) { return _mm512_set1_ps(x); }
RESENS_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
RESENS_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
RESENS_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
RESENS_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }    // c + a * b
RESENS_INLINE V fnma(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a * b
// The second operand wins when either is NaN, so NaN passes through.
RESENS_INLINE V relu(V v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }
RESENS_INLINE V larger(V a, V b) {  // NaN if either is
  return _mm512_mask_mov_ps(_mm512_max_ps(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
}
// W bits: whether a lane is positive or NaN. And v where the bits, 8 to a byte, from number `at` on are set, else 0.
RESENS_INLINE int positive(V v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }
RESENS_INLINE V keep(V v, const uint8_t* bits, int64_t at) {
  uint16_t m;
  __builtin_memcpy(&m, bits + at / 8, 2);
  return _mm512_maskz_mov_ps(m, v);
}
RESENS_INLINE V round_bf16(V v) {
  const __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
  const __m512i bias = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
  const __m512i r = _mm512_and_si512(_mm512_add_epi32(u, bias), _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm512_mask_mov_ps(_mm512_castsi512_ps(r), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
}
#elif RESENS_WIDTH == 8
typedef __m256 V;
RESENS_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
RESENS_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
RESENS_INLINE V all(float x) { return _mm256_set1_ps(x); }
RESENS_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
RESENS_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
RESENS_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
RESENS_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
RESENS_INLINE V fnma(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
RESENS_INLINE V relu(V v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
RESENS_INLINE V larger(V a, V b) { return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
RESENS_INLINE int positive(V v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
RESENS_INLINE V keep(V v, const uint8_t* bits, int64_t at) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits[at / 8]), lane), lane)));
}
RESENS_INLINE V round_bf16(V v) {
  const __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i bias = _mm256_add_epi32(_mm256_set1_epi32(0x7fff), _mm256_and_si256(_mm256_srli_epi32(u, 16), one));
  const __m256i r = _mm256_and_si256(_mm256_add_epi32(u, bias), _mm256_set1_epi32(static_cast<int>(0xffff0000)));
  return _mm256_blendv_ps(_mm256_castsi256_ps(r), v, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
}
#else
typedef float V __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef float U __attribute__((vector_size(16), aligned(4), may_alias));
RESENS_INLINE V load(const float* p) { return *reinterpret_cast<const U*>(p); }
RESENS_INLINE void store(float* p, V v) { *reinterpret_cast<U*>(p) = v; }
RESENS_INLINE V all(float x) { return V{x, x, x, x}; }
RESENS_INLINE V add(V a, V b) { return a + b; }
RESENS_INLINE V sub(V a, V b) { return a - b; }
RESENS_INLINE V mul(V a, V b) { return a * b; }
RESENS_INLINE V fma(V a, V b, V c) { return c + a * b; }
RESENS_INLINE V fnma(V a, V b, V c) { return c - a * b; }
RESENS_INLINE V choose(I mask, V yes, V no) { return (V)((mask & (I)yes) | (~mask & (I)no)); }
RESENS_INLINE V relu(V v) { return (V)(~(v <= all(0.0f)) & (I)v); }
RESENS_INLINE V larger(V a, V b) { return choose((a > b) | (a != a), a, b); }
RESENS_INLINE int positive(V v) {
  const I p = ~(v <= all(0.0f)) & I{1, 2, 4, 8};
  return p[0] | p[1] | p[2] | p[3];
}
RESENS_INLINE V keep(V v, const uint8_t* bits, int64_t at) {
  const int m = bits[at / 8] >> (at & 4);
  return (V)(((I{m, m, m, m} & I{1, 2, 4, 8}) != 0) & (I)v);
}
RESENS_INLINE V round_bf16(V v) {
  const I u = (I)v, bias = ((u >> 16) & 1) + 0x7fff;  // the arithmetic shift's sign bits are masked away
  return choose(v == v, (V)((u + bias) & static_cast<int32_t>(0xffff0000)), v);
}
#endif

// What the products multiply. An operand knows how it is stored and how one step of a sum of products goes; kPairs
// input channels take one step. kSwap: the emulation of the bf16 instruction, which adds the odd channel of a pair
// first, each with a fused multiply-add.
struct Float32 {
  typedef float T;
  typedef V X;
  static constexpr int kPairs = 1;
  static constexpr bool kSwap = false;
  RESENS_INLINE V mac(V sum, X x, X w) { return fma(x, w, sum); }
  RESENS_INLINE X broadcast(const T* p) { return all(*p); }
  RESENS_INLINE X weights(const T* p) { return load(p); }
  RESENS_INLINE void put(T* p, V v) { store(p, v); }
  RESENS_INLINE void put_one(T* p, float x) { *p = x; }
};
struct RoundedFloat : Float32 {
  static constexpr bool kSwap = true;
  RESENS_INLINE void put(float* p, V v) { store(p, round_bf16(v)); }
  RESENS_INLINE void put_one(float* p, float x) {
    alignas(64) float lanes[W];
    store(lanes, round_bf16(all(x)));
    *p = lanes[0];
  }
};
#ifdef RESENS_NATIVE_BF16
struct BFloat16 {
  typedef uint16_t T;
  typedef __m512bh X;
  static constexpr int kPairs = 2;
  static constexpr bool kSwap = false;
  RESENS_INLINE V mac(V sum, X x, X w) { return _mm512_dpbf16_ps(sum, x, w); }
  RESENS_INLINE X broadcast(const T* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return (X)_mm512_set1_epi32(pair);
  }
  RESENS_INLINE X weights(const T* p) { return (X)_mm512_loadu_si512(p); }
  RESENS_INLINE void put(T* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v)); }
  RESENS_INLINE void put_one(T* p, float x) {
    alignas(32) uint16_t lanes[16];
    put(lanes, all(x));
    *p = lanes[0];
  }
};
#endif

}  // namespace resens::cpu::RESENS_ISA
