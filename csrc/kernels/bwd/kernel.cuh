// The backward main kernel: a persistent CTA with one producer thread, two consumer warpgroups and, for each of these,
// one thread that sees to its additions to dq. A tile is a block of keys of one key head.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "adder.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "mma.cuh"

namespace fa {

template <class Traits>
FA_DEVICE void init_barriers(BackwardControl<Traits>& control) {
  constexpr int kConsumers = BackwardShape<Traits>::kNumConsumerWarpgroups;
  constexpr int kAdders = DqAdder<Traits>::kNeeded ? kConsumers : 0;
  control.tiles.init(1, kConsumers + kAdders);
  Barrier::init(&control.kv_empty, kConsumers);
  control.q.init(1, kConsumers);
  control.dout.init(1, kConsumers);
  for (Ring<1>& dq : control.dq) dq.init(kWarpgroupThreads / kWarpThreads, 1);
  control.other_ds.init(1, kConsumers);
  control.numbers.init(1, 1);
  control.num_announced = control.num_numbers = 0;
  for (uint32_t& count : control.num_added) count = 0;
  cutlass::arch::fence_barrier_init();
}

// By one thread of each of its warps: the first one loads, the next ones are the consumer warpgroups' adders.
template <class Traits>
FA_DEVICE void run_first_warpgroup(const BackwardParams& params, BackwardSmem<Traits>& smem) {
  if (threadIdx.x % kWarpThreads != 0) return;
  const int warp = threadIdx.x / kWarpThreads;
  if (warp == 0) {
    BackwardProducer<Traits>(params, smem).run();
  } else if constexpr (DqAdder<Traits>::kNeeded) {
    const int warpgroup = warp - 1;
    if (warpgroup < BackwardShape<Traits>::kNumConsumerWarpgroups) {
      DqAdder<Traits>(params, smem, warpgroup).run();
    }
  }
}

template <class Traits>
FA_DEVICE void run_consumer(const BackwardParams& params, BackwardSmem<Traits>& smem) {
  BackwardControl<Traits>& control = smem.control;
  RingState<Traits::kNumStages> stage;
  for (RingState<kKeyTileSlots> at;; at.advance()) {
    control.tiles.wait_full(at);
    const KeyTile& tile = control.tile[at.index()];
    if (same_in_warp(tile.exists()) == 0) return;
    const int warpgroup = same_in_warp(threadIdx.x / kWarpgroupThreads) - 1;
    const typename KeyTileMma<Traits>::OwnTile own_tile = tile;
    KeyTileMma<Traits> mma(params, smem, own_tile, warpgroup, stage);
    mma.run();
    stage = mma.stage();
    KeyGradientEpilogue<Traits>(params, smem, tile, warpgroup).store(mma);
    if (threadIdx.x % kWarpgroupThreads == 0) {
      Barrier::arrive(&control.kv_empty);
      control.tiles.release(at);
    }
  }
}

template <class Traits>
FA_DEVICE void backward_kernel(const BackwardParams& params) {
  using Shape = BackwardShape<Traits>;
  BackwardSmem<Traits>& smem = *reinterpret_cast<BackwardSmem<Traits>*>(dynamic_shared_memory());
  static_assert(sizeof(BackwardSmem<Traits>) == Shape::kSmemBytes, "the plan and the launch must agree");

  if (threadIdx.x == 0) init_barriers(smem.control);
  if constexpr (Shape::kClusterSize > 1) {
    sync_cluster();
  } else {
    __syncthreads();
  }
  // Known to be the same in a warp: consumers' addresses then need no registers of each thread.
  const int warpgroup = same_in_warp(threadIdx.x / kWarpgroupThreads);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    run_first_warpgroup<Traits>(params, smem);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    run_consumer<Traits>(params, smem);
    // Until then the other CTA may signal to this one.
    if constexpr (Shape::kClusterSize > 1) sync_cluster();
  }
}

}  // namespace fa
