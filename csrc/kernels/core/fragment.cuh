// Where the elements of a wgmma accumulator lie. A warpgroup's 64 x N fp32 tile gives each thread N / 2 registers:
// register 4g + 2r + c is row 16 * warp + lane / 4 + 8r, column 8g + 2 * (lane % 4) + c. Two packed neighbours
// (c = 0, 1) are, in the same order, the 16-bit A operand of the next product.
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>

#include "platform.h"
#include "ptx.cuh"
#include "traits.cuh"

namespace fa {

constexpr int kRowsPerThread = 2;

// The thread's first row inside its warpgroup's 64; the second is 8 below.
FA_DEVICE int fragment_row() { return threadIdx.x % kWarpgroupThreads / kWarpThreads * 16 + threadIdx.x % 32 / 4; }
// The thread's first column inside each group of 8.
FA_DEVICE int fragment_column() { return threadIdx.x % 4 * 2; }
// Row (0 or 1) and column, without fragment_column(), of register `i`; compile-time constants in unrolled loops.
FA_DEVICE constexpr int register_row(int i) { return i / 2 % 2; }
FA_DEVICE constexpr int register_column(int i) { return i / 4 * 8 + i % 2; }

// Keeps the compiler from moving accesses to wgmma operands across asynchronous products.
template <class Register, int kSize>
FA_DEVICE void fence_fragment(Register (&fragment)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(fragment[i]);
}

// Where the fragment's registers are not needed before: what they held so far is lost.
template <int kSize>
FA_DEVICE void begin_fragment(float (&fragment)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) begin_register(fragment[i]);
}

template <int kSize>
FA_DEVICE void clear_fragment(float (&fragment)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) fragment[i] = 0.f;
}

template <int kSize>
FA_DEVICE void scale_rows(float (&fragment)[kSize], const float (&factor)[kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) fragment[i] *= factor[register_row(i)];
}

// Thread t of a quad brings word t of four rows of four words, and leaves with row t.
FA_DEVICE uint4 transpose_quad(const uint32_t (&column)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  // Neighbours exchange, so that each holds two words of rows 0 and 2, or of rows 1 and 3.
  const uint32_t low = __shfl_xor_sync(~0u, odd ? column[0] : column[1], 1);
  const uint32_t high = __shfl_xor_sync(~0u, odd ? column[2] : column[3], 1);
  const uint2 first = odd ? make_uint2(low, column[1]) : make_uint2(column[0], low);
  const uint2 second = odd ? make_uint2(high, column[3]) : make_uint2(column[2], high);
  // Halves of the quad exchange the row that is not theirs.
  const uint2 kept = upper ? second : first, given = upper ? first : second;
  const uint2 taken = make_uint2(__shfl_xor_sync(~0u, given.x, 2), __shfl_xor_sync(~0u, given.y, 2));
  return upper ? make_uint4(taken.x, taken.y, kept.x, kept.y) : make_uint4(kept.x, kept.y, taken.x, taken.y);
}

// As scale_rows, but a factor of 0 clears a row, whatever it holds.
template <int kSize>
FA_DEVICE void scale_or_clear_rows(float (&fragment)[kSize], const float (&factor)[kRowsPerThread]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float scale = factor[register_row(i)];
    fragment[i] = scale == 0.f ? 0.f : fragment[i] * scale;
  }
}

// Into the first words of `packed`.
template <Dtype kDtype, int kPacked, int kSize>
FA_DEVICE void pack_fragment(uint32_t (&packed)[kPacked], const float (&fragment)[kSize]) {
  static_assert(kSize / 2 <= kPacked);
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) packed[i] = pack<kDtype>(fragment[2 * i], fragment[2 * i + 1]);
}

// Row `r` of the thread's two, rounded, to memory, 32 columns at a time: a quad holds eight pairs of it, and each of
// its threads stores 8 columns. `row`: where the fragment's first column goes, aligned to 16 bytes; of its columns the
// first `num_columns` exist, a multiple of 8. By whole warps.
template <Dtype kDtype, int kSize>
FA_DEVICE void store_row(uint16_t* row, int num_columns, const float (&fragment)[kSize], int r) {
  const int first_column = threadIdx.x % 4 * 8;
#pragma unroll
  for (int column = 0; column < 2 * kSize; column += 32) {
    uint32_t pairs[4];
#pragma unroll
    for (int group = 0; group < 4; ++group) {
      const int i = column / 2 + 4 * group + 2 * r;
      pairs[group] = pack<kDtype>(fragment[i], fragment[i + 1]);
    }
    const uint4 columns = transpose_quad(pairs);
    if (first_column + column < num_columns) *reinterpret_cast<uint4*>(row + first_column + column) = columns;
  }
}

}  // namespace fa
