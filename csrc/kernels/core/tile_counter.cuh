// The counter from which the CTAs of a launch take numbers of tiles, each number once.
#pragma once

#include "../params.h"
#include "platform.h"

namespace fa {

FA_DEVICE int take_number(TileCounter* counter) { return atomicAdd(&counter->taken, 1); }

// To be called by each of `num_takers` threads once, after its last number. The last of them resets the counter for the
// next launch: the first fence puts everybody's last number before `finished`, the second one the reset behind it.
// `finished` itself is only ordered with the others' additions by being atomic, too.
FA_DEVICE void close_counter(TileCounter* counter, int num_takers) {
  __threadfence();
  if (atomicAdd(&counter->finished, 1) != num_takers - 1) return;
  __threadfence();
  counter->taken = 0;
  atomicExch(&counter->finished, 0);
}

}  // namespace fa
