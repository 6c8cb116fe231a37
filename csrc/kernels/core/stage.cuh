// Fragments to shared memory, in the layout that TMA and wgmma read.
#pragma once

#include "fragment.cuh"

namespace fa {

// The first of the 16 rows of a thread's warp among the 64 of its warpgroup.
FA_DEVICE int warp_row(unsigned thread = threadIdx.x) { return thread % kWarpgroupThreads / kWarpThreads * 16; }

// Where the lane's row of four 8x8 matrices, two down and two across, lies in a tile of kRows rows of 16-bit columns:
// lane l has row l % 8 of matrix l / 8. `first_row`, `column`: of the 16 x 16 that the matrices cover.
template <int kRows, int kSwizzleBytes>
FA_DEVICE uint32_t matrix_row(uint32_t tile, int first_row, int column, unsigned thread = threadIdx.x) {
  constexpr int kChunkColumns = kSwizzleBytes / 2;
  const int lane = thread % kWarpThreads;
  const int row = first_row + lane % 16;
  // The swizzle exchanges 16-byte units within a row by the row's number modulo 8 (128 bytes), or by half of it modulo
  // 4 (64 bytes).
  const int unit_mask = kSwizzleBytes == 128 ? row % 8 : row / 2 % 4;
  const int unit = column % kChunkColumns / 8 + lane / 16;
  return tile + column / kChunkColumns * kRows * kSwizzleBytes + row * kSwizzleBytes + ((unit ^ unit_mask) << 4);
}

// Columns that four matrices cover.
constexpr int kMatricesColumns = 16;

// Columns [column, column + 16) of a packed 64 x N fragment, four words, into rows [first_row, first_row + 64) of a
// tile.
template <int kRows, int kSwizzleBytes>
FA_DEVICE void stage_matrices(uint32_t tile, int first_row, int column, const uint32_t* words) {
  store_matrices(matrix_row<kRows, kSwizzleBytes>(tile, first_row + warp_row(), column), words[0], words[1], words[2],
                 words[3]);
}

// A packed 64 x N fragment into rows [first_row, first_row + 64) of a tile.
template <int kRows, int kSwizzleBytes, int kSize>
FA_DEVICE void stage_fragment(uint32_t tile, int first_row, const uint32_t (&packed)[kSize]) {
#pragma unroll
  for (int column = 0; column < kSize * 4; column += kMatricesColumns) {
    stage_matrices<kRows, kSwizzleBytes>(tile, first_row, column, packed + column / 4);
  }
}

// Zeros into rows [first_row, kRows) of a tile of kBytes, by the threads of a warpgroup.
template <int kRows, int kSwizzleBytes, int kBytes>
FA_DEVICE void clear_rows_from(int first_row, uint8_t (&tile)[kBytes]) {
  constexpr int kChunkBytes = kRows * kSwizzleBytes;
  for (int chunk = 0; chunk < kBytes; chunk += kChunkBytes) {
    uint4* const units = reinterpret_cast<uint4*>(tile + chunk);
    const int first_unit = first_row * kSwizzleBytes / 16 + threadIdx.x % kWarpgroupThreads;
    for (int i = first_unit; i < kChunkBytes / 16; i += kWarpgroupThreads) units[i] = {};
  }
}

// The other way round.
template <int kRows, int kSwizzleBytes, int kSize>
FA_DEVICE void load_fragment(uint32_t (&packed)[kSize], uint32_t tile, int first_row) {
#pragma unroll
  for (int column = 0; column < kSize * 4; column += kMatricesColumns) {
    load_matrices(matrix_row<kRows, kSwizzleBytes>(tile, first_row + warp_row(), column), packed + column / 4);
  }
}

}  // namespace fa
