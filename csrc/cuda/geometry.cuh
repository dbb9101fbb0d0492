// Which pixel and channel each register of the residual stream holds, per stage.
//
// A warp owns `kRows` m-tiles of 16 pixels times `kTiles` n-tiles of 8 channels; an m-tile is 16 pixels of a row, or at 8x8 the same row of two images (two
// images per CTA) or two rows four apart (one image). Operand buffers are [image][C / 8][y + halo][x + halo][8]: a shifted row of 8 pixels is 8 consecutive
// 16-byte pieces, so ldmatrix is free of bank conflicts at every shift, and an m-tile's A fragment of row y serves the three vertical taps.
#pragma once
#include "prim.cuh"
#include "tape.h"

namespace resens::cuda {

template <int STAGE, int IMAGES, int WIDTH> struct Geometry {
  static constexpr int kStage = STAGE, kImages = IMAGES, kWidth = WIDTH, kChannels = channels_of(WIDTH, STAGE), kSide = side_of(STAGE), kSteps = kChannels / 16;
  static constexpr int kRows = STAGE == 0 ? 8 * IMAGES : STAGE == 1 ? 4 : 2 * IMAGES;
  static constexpr int kTiles = WIDTH == 32 ? 4 : STAGE == 1 ? 2 * IMAGES : 2;
  static constexpr bool kRolling = STAGE == 0 && WIDTH == 16;        // the first convolution keeps all its weights in registers and walks down the rows
  static constexpr int kSubRows = STAGE > 0 ? kRows : kRolling ? 1 : 2;  // its output rows at a time: at 32x32 the stream leaves few registers for accumulators
  static constexpr int kGroups = groups_per_chunk(IMAGES, WIDTH, STAGE), kGroupBytes = group_bytes(WIDTH, STAGE), kChunks = 3 * kSteps / kGroups;
  static constexpr int kPitch = (kSide + 2) * 16, kPlane = (kSide + 2) * kPitch, kImageStride = (kChannels / 8) * kPlane;
  static constexpr int kHalf = kSide >= 16 ? 8 * 16 : IMAGES == 2 ? kImageStride : (kSide / 2) * kPitch;  // to the second 8 pixels of an m-tile
  static constexpr int kWarpsN = kChannels / 8 / kTiles;
  static constexpr int kStripRows = kSide >= 16 || IMAGES == 2 ? kSide : kSide / 2;
  static constexpr int kStripsPerRow = kSide >= 16 ? kSide / 16 : 1;
  static constexpr int kStrips = kSide >= 16 ? kStripsPerRow * IMAGES : 1;
  static constexpr int kUnroll = kGroups > 2 && kRows * kTiles >= 16 ? 1 : kGroups;
  static constexpr int kRegisters = kRows * kTiles * 4;              // of the stream, per thread
  static_assert((kStrips * kStripRows / kRows) * kWarpsN * 32 == kThreads, "every warp has its share");
  static_assert(kRows % kSubRows == 0 && kTiles % 2 == 0, "");
  static_assert(kSubRows == kRows || kChunks == 1, "sub-blocks need the whole convolution in one chunk");
  static_assert(kRegisters * kThreads == IMAGES * kChannels * kSide * kSide, "the stream is held once");

  int lane, warp_n, row, image, column;
  SharedAddress a_offset, store_offset;  // of this lane: ldmatrix address of (row - 1, column - 1); accumulator element 0 in an operand buffer

  RF_DEV explicit Geometry(int thread) {
    lane = thread & 31;
    int warp = thread >> 5, m = warp / kWarpsN, strip = m / (kStripRows / kRows);
    warp_n = warp % kWarpsN;
    row = (m % (kStripRows / kRows)) * kRows;
    image = kSide >= 16 ? strip / kStripsPerRow : 0;
    column = (strip % kStripsPerRow) * 16;
    int base = image * kImageStride + row * kPitch + column * 16;
    a_offset = base + (lane & 7) * 16 + ((lane >> 3) & 1) * kHalf + (lane >> 4) * kPlane;
    store_offset = base + kPitch + 16 + (lane >> 2) * 16 + (lane & 3) * 4 + warp_n * kTiles * kPlane;
  }
  // Pixel of accumulator row o, half h.
  RF_DEV void pixel(int o, int h, int& im, int& y, int& x) const {
    im = image; y = row + o; x = column + (lane >> 2);
    if (kSide >= 16) x += 8 * h;
    else if (kImages == 2) im += h;
    else y += h * (kSide / 2);
  }
  RF_DEV int channel(int tile) const { return (warp_n * kTiles + tile) * 8 + (lane & 3) * 2; }  // and the next one
  RF_BOTH static constexpr int element(int o, int tile) { return (o * kTiles + tile) * 4; }             // of the stream's register array: 2 h + channel parity follows
};

// Zero the frame around every plane: at every change of layout, since the buffers are shared by the stages. Threads stride over frame pixels.
template <class G> RF_DEV void zero_halo(SharedAddress buffer, int thread) {
  constexpr int kFrame = 2 * (G::kSide + 2) + 2 * G::kSide;
  for (int i = thread; i < kFrame * G::kImages * (G::kChannels / 8); i += kThreads) {
    int plane = i / kFrame, j = i % kFrame, y, x;
    if (j < 2 * (G::kSide + 2)) {
      y = j >= G::kSide + 2 ? G::kSide + 1 : 0;
      x = j % (G::kSide + 2);
    } else {
      j -= 2 * (G::kSide + 2);
      y = 1 + (j >> 1);
      x = j & 1 ? G::kSide + 1 : 0;
    }
    sts128_zero(buffer + plane * G::kPlane + y * G::kPitch + x * 16);
  }
}
}  // namespace resens::cuda
