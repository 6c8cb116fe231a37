// The backward main kernel: one CTA per block of keys of one key head, with one producer thread and two consumer
// warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "epilogue.cuh"
#include "load.cuh"
#include "mma.cuh"

namespace fa {

// The longest tiles come first: under a causal mask the first keys are seen by all queries.
template <class Traits>
FA_DEVICE KeyTile key_tile(const BackwardParams& params, int index) {
  const int num_heads = params.batch * params.heads_kv;
  KeyTile tile;
  tile.n_block = index / num_heads;
  tile.batch = index % num_heads / params.heads_kv;
  tile.head_kv = index % num_heads % params.heads_kv;
  tile.q = query_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.k = key_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.scratch_row = scratch_row<Traits>(params, tile.q, tile.batch);
  tile.blocks = visibility<Traits>(params, tile).template query_blocks<Traits::kBlockM, Traits::kBlockN>(tile.n_block);
  return tile;
}

template <class Traits>
FA_DEVICE int tile_index(const BackwardParams& params, BackwardSmem<Traits>& smem) {
  if constexpr (Traits::kAccumulation == Accumulation::kUnordered) return blockIdx.x;
  if (threadIdx.x == 0) smem.control.tile = take_tile(params.tile_counter);
  __syncthreads();
  return smem.control.tile;
}

template <class Traits>
FA_DEVICE void backward_kernel(const BackwardParams& params) {
  using Shape = BackwardShape<Traits>;
  BackwardSmem<Traits>& smem = *reinterpret_cast<BackwardSmem<Traits>*>(dynamic_shared_memory());
  static_assert(sizeof(BackwardSmem<Traits>) == Shape::kSmemBytes, "the plan and the launch must agree");

  const KeyTile tile = key_tile<Traits>(params, tile_index<Traits>(params, smem));
  if (tile.n_block * Traits::kBlockN >= tile.k.length) return;
  clear_missing_columns<Traits>(params, smem);
  if (threadIdx.x == 0) {
    Barrier::init(&smem.control.k_full, 1);
    Barrier::init(&smem.control.v_full, 1);
    smem.control.q.init(1, Shape::kNumConsumerWarpgroups);
    smem.control.dout.init(1, Shape::kNumConsumerWarpgroups);
    for (int32_t*& turn : smem.control.turn) turn = nullptr;
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / kWarpgroupThreads;
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Shape::kProducerRegisters>();
    if (threadIdx.x == 0) BackwardProducer<Traits>(params, smem, tile).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Shape::kConsumerRegisters>();
    KeyTileMma<Traits> mma(params, smem, tile, warpgroup - 1);
    mma.run();
    KeyGradientEpilogue<Traits>(params, smem, tile, warpgroup - 1).store(mma);
  }
}

}  // namespace fa
