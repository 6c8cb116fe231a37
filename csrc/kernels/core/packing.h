// Packed GQA: query heads that share a key head lie side by side in one tile, so that their keys are loaded once and a
// few query positions fill a tile. Row r of a tile is position r / n of head r % n, n being a power of two.
#pragma once

#include "platform.h"

namespace fa {

struct Packing {
  int log2_heads;  // 0: one head a tile

  FA_HOST_DEVICE int heads() const { return 1 << log2_heads; }
  // Of `positions` positions of all heads.
  FA_HOST_DEVICE int rows(int positions) const { return positions << log2_heads; }
  FA_HOST_DEVICE int position(int row) const { return row >> log2_heads; }
  FA_HOST_DEVICE int head(int row) const { return row & (heads() - 1); }
};

}  // namespace fa
