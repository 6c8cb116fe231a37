// Packed GQA: query heads that share a key head lie side by side in one tile, so that their keys are loaded once and a
// few query positions fill a tile.
//
// A warpgroup has the rows of as many whole positions as fit in its 64: of n heads its row r is head r % n of position
// r / n, counted from its first. Rows left over, where n does not divide 64, are unused: no copy fills them, and what
// becomes of them is never stored.
#pragma once

#include "divisor.h"
#include "platform.h"

namespace fa {

constexpr int kWarpgroupRows = 64;  // M of wgmma.m64nNk16

struct Packing {
  Divisor heads;      // side by side; a divisor of the heads that share a key head, kWarpgroupRows at most
  Divisor positions;  // of a warpgroup

  static Packing of(int heads) { return {Divisor::of(heads), Divisor::of(kWarpgroupRows / heads)}; }

  // Of a warpgroup.
  FA_HOST_DEVICE int used_rows() const { return positions.value * heads.value; }
  // Of a warpgroup's row. An unused one's position is the next warpgroup's first.
  FA_HOST_DEVICE int position(int row) const { return heads.divide(row); }
  FA_HOST_DEVICE int head(int row) const { return row - position(row) * heads.value; }
  // That a sequence of so many positions takes.
  FA_HOST_DEVICE int warpgroups(int length) const { return positions.divide_up(length); }
};

}  // namespace fa
