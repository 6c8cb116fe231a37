// Named barriers of the backward pass's consumers, beside those of one warpgroup alone.
#pragma once

#include "smem.cuh"

namespace fa {

constexpr int kBackwardConsumerWarpgroups = 2;

// All but the first are between two warpgroups: what one has done, the other waits for. CUTLASS leaves numbers 0 to 7.
enum BackwardBarrierId {
  kMeetingBarrier = kTurnBarrier,
  kScoresIssuedBarrier,
  kProbabilitiesBarrier,
  kScoreGradientsBarrier,
  kBuffersFreeBarrier = kWarpgroupBarrier + kBackwardConsumerWarpgroups,
};
static_assert(kScoreGradientsBarrier < kWarpgroupBarrier && kBuffersFreeBarrier < 8);

// Tells another warpgroup, which waits, without waiting for it.
FA_DEVICE void signal_warpgroup(BackwardBarrierId barrier) {
  cutlass::arch::NamedBarrier::arrive(2 * kWarpgroupThreads, uint32_t(barrier));
}
FA_DEVICE void await_warpgroup(BackwardBarrierId barrier) {
  cutlass::arch::NamedBarrier::sync(2 * kWarpgroupThreads, uint32_t(barrier));
}

// Waits for all consumers.
template <class Traits>
FA_DEVICE void meet_consumers() {
  static_assert(BackwardShape<Traits>::kNumConsumerWarpgroups == kBackwardConsumerWarpgroups);
  await_warpgroup(kMeetingBarrier);
}

}  // namespace fa
