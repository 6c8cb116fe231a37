// Whose turn it is to add to a block of dq: where the sums must always be made in the same order, and where the first
// addition is a store.
#pragma once

#include "smem.cuh"

namespace fa {

// Whose turn it is with one warpgroup's part of a block of dq: `counter` holds how many blocks of keys have added to
// it, or without an order, whether the first one has; those that see its queries do so from the first to the last. To
// be used by one thread.
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
