// Hand-over between roles: mbarriers for shared-memory buffers, named barriers for the warpgroups' turns.
// README.md beside csrc/kernels has one row per barrier.
#pragma once

#include <cutlass/arch/barrier.h>

#include "platform.h"
#include "traits.cuh"

namespace fa {

// `value`, which is the same in the whole warp, so that the compiler knows it: it then keeps what follows from it in
// uniform registers, of which there are enough, and computes it anew rather than far ahead.
FA_DEVICE uint32_t same_in_warp(uint32_t value) { return __shfl_sync(~0u, value, 0); }

// An mbarrier that bulk copies complete by bytes.
using TransactionBarrier = cutlass::arch::ClusterTransactionBarrier;
using Barrier = cutlass::arch::ClusterBarrier;

// Position in a ring of kSize buffers. One counter, since registers are scarce.
template <int kSize>
struct RingState {
  uint32_t count = 0;

  FA_DEVICE uint32_t index() const { return count % kSize; }
  // Parity of the barrier phase that fills the current buffer.
  FA_DEVICE uint32_t phase() const { return count / kSize & 1; }
  FA_DEVICE void advance() { ++count; }
};

// A ring of buffers that a producer fills by TMA and consumers free.
template <int kSize>
struct Ring {
  uint64_t full[kSize];
  uint64_t empty[kSize];

  FA_DEVICE void init(int full_arrivals, int empty_arrivals) {
    for (int i = 0; i < kSize; ++i) {
      Barrier::init(&full[i], full_arrivals);
      Barrier::init(&empty[i], empty_arrivals);
    }
  }
  FA_DEVICE void wait_full(RingState<kSize> at) { Barrier::wait(&full[at.index()], at.phase()); }
  // A fresh barrier counts as if the phase before the first had completed: the first wait passes.
  FA_DEVICE void wait_empty(RingState<kSize> at) { Barrier::wait(&empty[at.index()], at.phase() ^ 1); }
  FA_DEVICE void release(RingState<kSize> at) { Barrier::arrive(&empty[at.index()]); }
};

// A ring that copies fill in all CTAs of a cluster at once: each producer needs everybody's buffer, so that consumers
// free theirs in all CTAs. The arrivals that `empty` expects are those of the whole cluster.
template <int kSize, int kClusterSize>
struct SharedRing : Ring<kSize> {
  FA_DEVICE void init(int full_arrivals, int empty_arrivals) {
    Ring<kSize>::init(full_arrivals, empty_arrivals * kClusterSize);
  }
  FA_DEVICE void release(RingState<kSize> at) {
    if constexpr (kClusterSize == 1) {
      Ring<kSize>::release(at);
    } else {
      for (uint32_t rank = 0; rank < kClusterSize; ++rank) Barrier::arrive(&this->empty[at.index()], rank, /*pred=*/1);
    }
  }
};

// Named barriers: one per warpgroup for its turn, one per warpgroup for itself. There are eight; CUTLASS keeps as many.
enum NamedBarrierId { kTurnBarrier = 0, kWarpgroupBarrier = kTurnBarrier + kMaxConsumerWarpgroups };
static_assert(kWarpgroupBarrier + kMaxConsumerWarpgroups <= 8);

FA_DEVICE void sync_warpgroup(int warpgroup) {
  cutlass::arch::NamedBarrier::sync(kWarpgroupThreads, uint32_t(kWarpgroupBarrier + warpgroup));
}

// The warpgroups issue their products in turn, so that one's softmax runs beside another's products. A turn's
// barrier counts the warpgroup that waits and the one before it, which arrives when it has issued its own.
template <int kNumWarpgroups>
struct PingPongTurn {
  int warpgroup;

  // Somebody must give the first turn; the first warpgroup gives it to itself.
  FA_DEVICE void begin() const {
    if (warpgroup == 0) arrive(0);
  }
  FA_DEVICE void wait() const {
    cutlass::arch::NamedBarrier::sync(2 * kWarpgroupThreads, uint32_t(kTurnBarrier + warpgroup));
  }
  FA_DEVICE void pass_on() const { arrive(warpgroup + 1 == kNumWarpgroups ? 0 : warpgroup + 1); }
  // The last turn passed on must be taken, or the barrier ends unbalanced.
  FA_DEVICE void end() const {
    if (warpgroup == 0) wait();
  }

 private:
  FA_DEVICE static void arrive(int next) {
    cutlass::arch::NamedBarrier::arrive(2 * kWarpgroupThreads, uint32_t(kTurnBarrier + next));
  }
};

// Warpgroups that do not wait for each other.
struct NoTurn {
  int warpgroup;

  FA_DEVICE void begin() const {}
  FA_DEVICE void wait() const {}
  FA_DEVICE void pass_on() const {}
  FA_DEVICE void end() const {}
};

template <class Traits>
using Turn = std::conditional_t<Traits::kSchedule == Schedule::kIntraWarpgroup, NoTurn,
                                PingPongTurn<ForwardShape<Traits>::kNumConsumerWarpgroups>>;

}  // namespace fa
