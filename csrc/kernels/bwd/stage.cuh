// Fragments to shared memory, in the layout that TMA and wgmma read.
#pragma once

#include "../core/fragment.cuh"

namespace fa {

// A packed 64 x N fragment into rows [first_row, first_row + 64) of a tile of kRows rows of 16-bit columns, 16 columns
// at a time: four 8x8 matrices, two down and two across. Lane l gives the address of row l % 8 of matrix l / 8.
template <int kRows, int kSwizzleBytes, int kSize>
FA_DEVICE void stage_fragment(uint32_t tile, int first_row, const uint32_t (&packed)[kSize]) {
  constexpr int kChunkColumns = kSwizzleBytes / 2;
  const int lane = threadIdx.x % kWarpThreads;
  const int row = first_row + threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + lane % 16;
  const int unit_mask = kSwizzleBytes == 128 ? row % 8 : row / 2 % 4;
#pragma unroll
  for (int column = 0; column < kSize * 4; column += 16) {
    const int unit = column % kChunkColumns / 8 + lane / 16;
    const uint32_t address =
        tile + column / kChunkColumns * kRows * kSwizzleBytes + row * kSwizzleBytes + ((unit ^ unit_mask) << 4);
    const uint32_t* words = packed + column / 4;
    store_matrices(address, words[0], words[1], words[2], words[3]);
  }
}

}  // namespace fa
