// Whose turn it is to add to a block of dq, where the sums must always be made in the same order.
#pragma once

#include "smem.cuh"

namespace fa {

// One of a launch's `num_tiles` tiles in the order in which CTAs start: a CTA that waits for the tiles before its own
// waits for CTAs that run or have ended, however many fit on the GPU at once. Nothing is promised of the order of
// blockIdx.
FA_DEVICE int take_tile(TileCounter* counter, int num_tiles) {
  const int tile = atomicAdd(&counter->taken, 1);
  if (tile + 1 == num_tiles) counter->taken = 0;  // nobody takes another one
  return tile;
}

// Whose turn it is with one warpgroup's part of a block of dq: `counter` holds how many blocks of keys have added to
// it; those that see its queries do so from the first to the last. To be used by one thread.
class DqTurn {
 public:
  FA_DEVICE explicit DqTurn(int32_t* counter) : counter_(counter) {}

  // Until all `predecessors` blocks of keys before have added.
  FA_DEVICE void wait(int predecessors) const {
    constexpr int kPollNanoseconds = 20;
    while (load_acquire(counter_) != predecessors) __nanosleep(kPollNanoseconds);
  }

  // After the addition, by threads that this one has synchronised with.
  FA_DEVICE void pass_on() const { increment_release(counter_); }

 private:
  int32_t* counter_;
};

}  // namespace fa
