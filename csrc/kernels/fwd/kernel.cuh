// The forward kernel: a persistent grid of CTAs, each with one producer warp and one to four consumer warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "epilogue.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
FA_DEVICE void init_barriers(ForwardControl<Traits>& control) {
  using Shape = ForwardShape<Traits>;
  constexpr int kWarpgroups = Shape::kNumConsumerWarpgroups;
  constexpr int kConsumerWarps = kWarpgroups * kWarpgroupThreads / kWarpThreads;
  for (Ring<Traits::kNumQStages>& q : control.q) q.init(1, Shape::kOverlapsTiles ? Shape::kReleasesPerWarpgroup : 1);
  control.k.init(1, kWarpgroups * Shape::kReleasesPerWarpgroup);
  control.v.init(1, kWarpgroups);
  control.tiles.init(1, kConsumerWarps);
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
FA_DEVICE void consume(const ForwardParams& params, ForwardSmem<Traits>& smem, int warpgroup) {
  ForwardControl<Traits>& control = smem.control;
  TileMma<Traits> mma(params, smem, warpgroup);
  Epilogue<Traits> epilogue(params, smem, warpgroup);
  control.tiles.wait_full({0});
  mma.begin(control.tile[0]);
  bool started = false;
  for (;;) {
    const RingState<kTileSlots> slot{mma.num_tiles()}, next{slot.count + 1};
    const WorkTile& tile = control.tile[slot.index()];
    if (!tile.exists()) break;
    if (!started) mma.start(tile);
    mma.run(tile);
    control.tiles.wait_full(next);
    started = mma.finish(tile, control.tile[next.index()]);
    epilogue.store(mma, tile);
    __syncwarp();
    if (threadIdx.x % kWarpThreads == 0) control.tiles.release(slot);
  }
  mma.end();
  epilogue.finish();
}

// All threads that may touch the same shared memory.
template <class Traits>
FA_DEVICE void sync_all() {
  if constexpr (Traits::kClusterSize > 1) {
    sync_cluster();
  } else {
    __syncthreads();
  }
}

template <class Traits>
FA_DEVICE void forward_kernel(const ForwardParams& params) {
  using Shape = ForwardShape<Traits>;
  ForwardSmem<Traits>& smem = *reinterpret_cast<ForwardSmem<Traits>*>(dynamic_shared_memory());
  static_assert(sizeof(ForwardSmem<Traits>) == Shape::kSmemBytes, "the plan and the launch must agree");

  if (threadIdx.x == 0) init_barriers<Traits>(smem.control);
  sync_all<Traits>();

  const int warpgroup = same_in_warp(threadIdx.x / kWarpgroupThreads);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    if (threadIdx.x < kWarpThreads) Producer<Traits>(params, smem).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    consume<Traits>(params, smem, warpgroup - 1);
  }
  // Until then other CTAs may copy to this one's shared memory, and arrive at its barriers.
  if constexpr (Traits::kClusterSize > 1) sync_cluster();
}

}  // namespace fa
