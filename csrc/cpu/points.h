// Numbers of the Winograd transforms with the points 0, +-a, +-b, inf; a = sqrt(1/2), b = sqrt(2). See winograd.h.
#pragma once

namespace resens::cpu {

constexpr double kPointA = 0.70710678118654752440, kPointB = 1.41421356237309504880;
constexpr float kA = static_cast<float>(kPointA), kB = static_cast<float>(kPointB);

// The products of +-a come out times a2 and those of +-b times b: that leaves factors of one in A' and saves two of
// the twelve operations of an output line. The factors are in the filters.
constexpr double kScaleA = 0.5, kScaleB = kPointB;

// G: the transform of a filter line, [6][3].
// The transforms multiply by a and b as float32 has them, 1.7e-8 too small: up to twice in a product, once on average.
// The filters make up for the average, or a chain of convolutions without shortcuts would lose 6e-8 in each.
constexpr double kWeightA = kScaleA * kPointA / kA / (2 * 0.5 * (0.5 - 2.0)), kWeightB = kScaleB * kPointB / kB / (2 * 2.0 * (2.0 - 0.5));
constexpr double kFilter[6][3] = {{1, 0, 0},
                                  {kWeightA, kWeightA * kPointA, kWeightA * 0.5},
                                  {kWeightA, -kWeightA * kPointA, kWeightA * 0.5},
                                  {kWeightB, kWeightB * kPointB, kWeightB * 2.0},
                                  {kWeightB, -kWeightB * kPointB, kWeightB * 2.0},
                                  {0, 0, 1}};

// q with A' q = (1, 1, 1, 1), without and with the factors: even part u + v = 1/2, a2 u + b2 v = 1/2; odd part a u' + b v' = 1/2, a3 u' + b3 v' = 1/2.
constexpr double kEvenA = (0.5 * 2.0 - 0.5) / (2.0 - 0.5), kEvenB = 0.5 - kEvenA;
constexpr double kOddA = kEvenA / kPointA, kOddB = (0.5 - 0.5 * 0.5) / (2.0 - 0.5) / kPointB;
constexpr double kStartLine[6] = {0,
                                  kScaleA * (kEvenA + kOddA),
                                  kScaleA * (kEvenA - kOddA),
                                  kScaleB * (kEvenB + kOddB),
                                  kScaleB * (kEvenB - kOddB),
                                  0};

struct StartTable {
  float q[36];
  constexpr float operator[](int e) const { return q[e]; }
};
constexpr StartTable start_table() {
  StartTable t{};
  for (int i = 0; i < 36; ++i) t.q[i] = static_cast<float>(kStartLine[i / 6] * kStartLine[i % 6]);
  return t;
}
constexpr StartTable kStart = start_table();

}  // namespace resens::cpu
