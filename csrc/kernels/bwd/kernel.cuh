// The backward main kernel: one CTA per block of keys of one key head, with one producer thread, two consumer
// warpgroups and, for each of these, one thread that sees to its additions to dq.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "../core/schedule.h"
#include "adder.cuh"
#include "epilogue.cuh"
#include "load.cuh"
#include "mma.cuh"

namespace fa {

// Tiles of a head follow each other closely, so that they find its queries, and dq in fp32, in the L2 cache. The
// longest come first: under a causal mask the first keys are seen by all queries.
template <class Traits>
FA_DEVICE KeyTile key_tile(const BackwardParams& params, int index) {
  const HeadTile position = head_tile(index, ceil_div(params.seqlen_k, Traits::kBlockN), params.batch * params.heads_kv,
                                      {params.heads_per_section, params.least_heads_in_last_section});
  KeyTile tile;
  tile.n_block = position.place;
  tile.batch = position.head / params.heads_kv;
  tile.head_kv = position.head % params.heads_kv;
  tile.num_heads_q = params.heads_q / params.heads_kv;
  tile.first_head_q = tile.head_kv * tile.num_heads_q;
  tile.q = query_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.k = key_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.scratch_row = scratch_row<Traits>(params, tile.q, tile.batch);
  tile.blocks = visibility<Traits>(params, tile).template query_blocks<Traits::kBlockM, Traits::kBlockN>(tile.n_block);
  return tile;
}

template <class Traits>
FA_DEVICE void init_barriers(BackwardControl<Traits>& control) {
  constexpr int kConsumers = BackwardShape<Traits>::kNumConsumerWarpgroups;
  control.q.init(1, kConsumers);
  control.dout.init(1, kConsumers);
  for (Ring<1>& dq : control.dq) dq.init(kWarpgroupThreads / kWarpThreads, 1);
  control.other_ds.init(1, kConsumers);
  cutlass::arch::fence_barrier_init();
}

// The tile of a cluster's CTAs; with an order of additions the first one takes it for all.
template <class Traits>
FA_DEVICE void begin_tile(const BackwardParams& params, BackwardControl<Traits>& control) {
  constexpr int kClusterSize = BackwardShape<Traits>::kClusterSize;
  const bool first_thread = threadIdx.x == 0;
  int index = blockIdx.x / kClusterSize;
  if (first_thread) init_barriers(control);
  if constexpr (Traits::kAccumulation == Accumulation::kOrdered) {
    if constexpr (kClusterSize > 1) sync_cluster();  // until then the other CTA may not have its memory
    if (first_thread && tile_rank<Traits>() == 0) {
      index = take_tile(params.tile_counter, gridDim.x / kClusterSize);
      control.tile_index = index;
      if constexpr (kClusterSize > 1) store_in(1, cute::cast_smem_ptr_to_uint(&control.tile_index), index);
    }
  }
  if constexpr (kClusterSize > 1) sync_cluster();
  if (first_thread) {
    if constexpr (Traits::kAccumulation == Accumulation::kOrdered) index = control.tile_index;
    control.tile = key_tile<Traits>(params, index);
  }
  __syncthreads();
}

// By one thread of each of its warps: the first one loads, the next ones are the consumer warpgroups' adders.
template <class Traits>
FA_DEVICE void run_first_warpgroup(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile) {
  if (threadIdx.x % kWarpThreads != 0) return;
  const int warp = threadIdx.x / kWarpThreads;
  if (warp == 0) {
    BackwardProducer<Traits>(params, smem, tile).run();
  } else if constexpr (DqAdder<Traits>::kNeeded) {
    const int warpgroup = warp - 1;
    if (warpgroup < BackwardShape<Traits>::kNumConsumerWarpgroups) {
      DqAdder<Traits>(params, smem, tile, warpgroup).run();
    }
  }
}

template <class Traits>
FA_DEVICE void backward_kernel(const BackwardParams& params) {
  using Shape = BackwardShape<Traits>;
  BackwardSmem<Traits>& smem = *reinterpret_cast<BackwardSmem<Traits>*>(dynamic_shared_memory());
  static_assert(sizeof(BackwardSmem<Traits>) == Shape::kSmemBytes, "the plan and the launch must agree");

  begin_tile(params, smem.control);
  const KeyTile& tile = smem.control.tile;
  if (tile.n_block * Traits::kBlockN >= tile.k.length) return;

  // Known to be the same in a warp: consumers' addresses then need no registers of each thread.
  const int warpgroup = same_in_warp(threadIdx.x / kWarpgroupThreads);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    run_first_warpgroup<Traits>(params, smem, tile);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    // A copy, for what the main loop needs in every step: kColumns keeps it in registers. kKeys, whose registers are
    // scarcer, asks the control block again.
    const KeyTile own_tile = tile;
    KeyTileMma<Traits> mma(params, smem, own_tile, warpgroup - 1);
    mma.run();
    KeyGradientEpilogue<Traits>(params, smem, warpgroup - 1).store(mma);
    // Until then the other CTA may signal to this one.
    if constexpr (Shape::kClusterSize > 1) sync_cluster();
  }
}

}  // namespace fa
