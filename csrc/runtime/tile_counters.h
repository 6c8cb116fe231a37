// The counters from which kernels hand out their tiles: device memory, zero before and after every launch.
#pragma once

#include <cuda.h>

#include "kernels/params.h"

namespace fa {

// A counter that no other launch in flight uses, for a launch on `stream`. The device's context must be
// current. The first call on a device allocates; so does a capture once in a while.
//
// Eager launches take turns through a ring that is longer than the number of launches a device can have
// pending. A captured launch keeps its counter for good, since its graph may be replayed at any time; two
// replays of one graph at the same time would share it (they would also write the same outputs).
TileCounter* next_tile_counter(int ordinal, CUstream stream);

}  // namespace fa
