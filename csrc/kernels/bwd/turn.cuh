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

// One warpgroup's part of the blocks of dq that a tile adds to. The counter of a part holds how many blocks of keys
// have added to it; those that see its queries do so from the first to the last. To be used by one thread.
class DqTurn {
 public:
  // `counter`: null. Consumers have it in shared memory, since their registers are scarce.
  FA_DEVICE explicit DqTurn(int32_t*& counter) : counter_(counter) {}

  // Until all blocks of keys before have added to the part that `counter` belongs to. `predecessors`: how many they
  // are.
  FA_DEVICE void wait(int32_t* counter, int predecessors) {
    while (load_acquire(counter) != predecessors) __nanosleep(kPollNanoseconds);
    fence_proxies();
    counter_ = counter;
  }

  // After the addition is done in memory; may be left out where there was none.
  FA_DEVICE void pass_on() {
    if (counter_ == nullptr) return;
    increment_release(counter_);
    counter_ = nullptr;
  }

  // The same for an addition by the copy engine, after it was issued and committed. Waits until it is done in memory
  // rather than until the copy engine has read shared memory.
  FA_DEVICE void pass_on_after_copies() {
    if (counter_ == nullptr) return;
    wait_bulk_groups_done();
    fence_proxies();
    pass_on();
  }

 private:
  static constexpr int kPollNanoseconds = 20;

  int32_t*& counter_;  // of the addition that is under way, or null
};

}  // namespace fa
