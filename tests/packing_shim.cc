// How the kernels pack heads, for the CPU tests.
#include "core/packing.h"

extern "C" int divide(int dividend, int value) { return fa::Divisor::of(value).divide(dividend); }

extern "C" int divide_up(int dividend, int value) { return fa::Divisor::of(value).divide_up(dividend); }

// Of `heads` heads: the number of used rows, a sequence's warpgroups, and the position and head of each of 64 rows.
extern "C" void packing(int heads, int length, int* used_rows, int* warpgroups, int* positions, int* row_heads) {
  const fa::Packing packing = fa::Packing::of(heads);
  *used_rows = packing.used_rows();
  *warpgroups = packing.warpgroups(length);
  for (int row = 0; row < fa::kWarpgroupRows; ++row) {
    positions[row] = packing.position(row);
    row_heads[row] = packing.head(row);
  }
}
