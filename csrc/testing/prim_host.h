// The host side of csrc/cuda/prim.cuh: the same wrappers on the SIMT harness.
#pragma once
#include "simt.h"

#define RF_DEV inline

namespace resens::cuda {
typedef uint32_t SharedAddress;
struct Bf16 {
  static float widen(uint16_t h) { return simt::round_trip_bf16(h); }
  static uint16_t narrow(float f) { return simt::to_bf16(f); }
};
struct Fp16 {
  static float widen(uint16_t h) { return simt::round_trip_f16(h); }
  static uint16_t narrow(float f) { return simt::to_f16(f); }
};

inline int thread_id() { return simt::state().current; }
inline int cta_id() { return simt::state().cta; }
inline int cta_count() { return simt::state().ctas; }
inline void barrier() { simt::barrier(); }
inline SharedAddress shared_base() { return 0; }

inline void ldmatrix_x4(uint32_t (&a)[4], SharedAddress p) {
  simt::Warp& w = simt::warp();
  int l = simt::lane();
  w.u[l][0] = simt::check_read(p, 16, 16) ? p : 0;
  simt::collective([](simt::Warp& w) {
    simt::state().report.ldmatrix++;
    for (int l = 0; l < 32; l++)
      for (int m = 0; m < 4; m++) memcpy(&w.out[l][m], simt::state().shared + w.u[m * 8 + l / 4][0] + (l & 3) * 4, 4);
  });
  memcpy(a, w.out[l], 16);
}
inline void lds128(uint32_t (&a)[4], SharedAddress p) {
  if (simt::first_lane()) simt::state().report.lds128++;
  if (simt::check_read(p, 16, 16)) memcpy(a, simt::state().shared + p, 16);
  else memset(a, 0xFF, 16);
}
inline void sts32(SharedAddress p, uint32_t v) {
  if (simt::first_lane()) simt::state().report.sts32++;
  if (simt::check_write(p, 4, 4)) memcpy(simt::state().shared + p, &v, 4);
}
inline void sts128_zero(SharedAddress p) {
  if (simt::check_write(p, 16, 16)) memset(simt::state().shared + p, 0, 16);
}
inline void sts_float(SharedAddress p, float v) {
  if (simt::check_write(p, 4, 4)) memcpy(simt::state().shared + p, &v, 4);
}
inline float lds_float(SharedAddress p) {
  float v = NAN;
  if (simt::check_read(p, 4, 4)) memcpy(&v, simt::state().shared + p, 4);
  return v;
}
inline int lds_int(SharedAddress p) {
  int v = -1;
  if (simt::check_read(p, 4, 4)) memcpy(&v, simt::state().shared + p, 4);
  return v;
}

inline float relu(float v) { return v < 0.f ? 0.f : v; }  // max.NaN: a NaN stays one
template <class T> inline uint32_t pack2(float lo, float hi) { return T::narrow(lo) | static_cast<uint32_t>(T::narrow(hi)) << 16; }
template <class T> inline uint32_t pack2_relu(float lo, float hi) { return pack2<T>(lo <= 0.f ? 0.f : lo, hi <= 0.f ? 0.f : hi); }

template <class T> inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  simt::Warp& w = simt::warp();
  int l = simt::lane();
  memcpy(w.u[l], a, 16);
  w.u[l][4] = b0;
  w.u[l][5] = b1;
  memcpy(w.f[l], c, 16);
  simt::collective([](simt::Warp& w) {
    simt::state().report.mma++;
    float A[16][16], B[16][8], C[16][8];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = (l & 3) * 2;
      for (int e = 0; e < 2; e++) {
        for (int r = 0; r < 4; r++) A[g + (r & 1) * 8][t + (r >> 1) * 8 + e] = T::widen(static_cast<uint16_t>(w.u[l][r] >> (16 * e)));
        for (int r = 0; r < 2; r++) B[t + 8 * r + e][g] = T::widen(static_cast<uint16_t>(w.u[l][4 + r] >> (16 * e)));
        C[g][t + e] = w.f[l][e];
        C[g + 8][t + e] = w.f[l][2 + e];
      }
    }
    for (int i = 0; i < 16; i++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) C[i][n] += A[i][k] * B[k][n];
    for (int l = 0; l < 32; l++) {
      int g = l >> 2, t = (l & 3) * 2;
      for (int e = 0; e < 2; e++) { w.f[l][e] = C[g][t + e]; w.f[l][2 + e] = C[g + 8][t + e]; }
    }
  });
  memcpy(c, w.f[l], 16);
}

inline void cp_async16(SharedAddress to, const void* from) {
  if (simt::first_lane()) simt::state().report.cp_async++;
  if (!simt::check_global(from, 16, 16, false) || !simt::check_write(to, 16, 16, false)) return;
  simt::state().copies[simt::state().current].push_back({to, from});
  memset(simt::state().shared + to, 0xFF, 16);
}
inline void cp_async_commit() {
  simt::State& s = simt::state();
  s.groups[s.current].push_back(s.copies[s.current].size());
}
template <int N> inline void cp_async_wait() {  // all but the N newest groups land
  simt::State& s = simt::state();
  auto& groups = s.groups[s.current];
  auto& copies = s.copies[s.current];
  if (static_cast<int>(groups.size()) <= N) return;
  size_t landed = groups.size() - N, count = groups[landed - 1];
  for (size_t i = 0; i < count; i++) {
    simt::check_write(copies[i].to, 16, 16);
    memcpy(s.shared + copies[i].to, copies[i].from, 16);
  }
  copies.erase(copies.begin(), copies.begin() + count);
  groups.erase(groups.begin(), groups.begin() + landed);
  for (size_t& g : groups) g -= count;
}

inline float shuffle_xor(float v, int mask) {
  simt::Warp& w = simt::warp();
  int l = simt::lane();
  w.f[l][0] = v;
  simt::collective([](simt::Warp& w) {
    simt::state().report.shuffles++;
    for (int l = 0; l < 32; l++) w.f[l][1] = w.f[l][0];
  });
  float r = w.f[l ^ mask][1];
  simt::collective([](simt::Warp&) {});  // nobody may overwrite before all have read
  return r;
}

template <class T> inline T load_global(const T* p) {
  T v;
  memset(&v, 0xFF, sizeof v);
  if (simt::check_global(p, sizeof(T), sizeof(T), false)) v = *p;
  return v;
}
template <class T> inline T load_state(const T* p) { return load_global(p); }
template <class T> inline void store_state(T* p, T v) {
  if (simt::check_global(p, sizeof(T), sizeof(T), true)) *p = v;
}
inline void add_global(unsigned long long* p, unsigned long long v) {
  if (simt::check_global(p, 8, 8, true)) *p += v;
}
inline int take_next(int* p) { return simt::check_global(p, 4, 4, true) ? (*p)++ : 1 << 30; }
}  // namespace resens::cuda
