// The backward main kernel: one CTA per block of keys of one key head, with one producer thread and two consumer
// warpgroups.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "epilogue.cuh"
#include "load.cuh"
#include "mma.cuh"

namespace fa {

template <class Traits>
FA_DEVICE KeyTile key_tile(const BackwardParams& params) {
  KeyTile tile;
  // The longest tiles first: under a causal mask the first keys are seen by all queries.
  tile.n_block = blockIdx.y;
  tile.batch = blockIdx.x / params.heads_kv;
  tile.head_kv = blockIdx.x % params.heads_kv;
  tile.q = query_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.k = key_sequence<Traits::kSeqLayout>(params, tile.batch);
  tile.padded_row = params.cu_seqlens_q ? padded_offset(tile.q.offset, tile.batch, Traits::kBlockM) : 0;
  tile.blocks = key_tile_visibility<Traits>(params, tile)
                    .template query_blocks<Traits::kBlockM, Traits::kBlockN>(tile.n_block);
  return tile;
}

template <class Traits>
FA_DEVICE void backward_kernel(const BackwardParams& params) {
  using Shape = BackwardShape<Traits>;
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  BackwardSmem<Traits>& smem = *reinterpret_cast<BackwardSmem<Traits>*>(shared_memory);
  static_assert(sizeof(BackwardSmem<Traits>) == Shape::kSmemBytes, "the plan and the launch must agree");

  const KeyTile tile = key_tile<Traits>(params);
  if (tile.n_block * Traits::kBlockN >= tile.k.length) return;
  if (threadIdx.x == 0) {
    Barrier::init(&smem.control.k_full, 1);
    Barrier::init(&smem.control.v_full, 1);
    smem.control.q.init(1, Shape::kNumConsumerWarpgroups);
    smem.control.dout.init(1, Shape::kNumConsumerWarpgroups);
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
