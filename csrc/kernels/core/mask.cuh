// Masking of a block of scores at the edge of what its rows may see.
#pragma once

#include <cmath>

#include "block_range.h"
#include "fragment.cuh"
#include "packing.h"

namespace fa {

// scores (64 x block_n): those of keys that the thread's rows do not see become -inf. `first_position`: the
// warpgroup's; `first_key`: the block's.
template <Mask kMask, int kSize>
FA_DEVICE void mask_scores(float (&scores)[kSize], const Visibility<kMask>& visibility, const Packing& packing,
                           int first_position, int first_key) {
  KeyRange columns[kRowsPerThread];  // relative to the thread's first column, so that tests compare with constants
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const KeyRange keys = visibility.keys(first_position + packing.position(fragment_row() + 8 * r));
    columns[r] = {keys.begin - first_key - fragment_column(), keys.end - first_key - fragment_column()};
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const KeyRange visible = columns[register_row(i)];
    const bool before = kMask == Mask::kLocal && register_column(i) < visible.begin;
    if (before || register_column(i) >= visible.end) scores[i] = -INFINITY;
  }
}

}  // namespace fa
