// Which tiles of keys a CTA works on, one after the other. Its producer takes them and announces them to all others.
#pragma once

#include "../core/schedule.h"
#include "../core/tile_counter.cuh"
#include "dq_part.cuh"
#include "key_part.cuh"

namespace fa {

// Describes tile `index` in the slot to be announced next.
//
// Tiles of a head follow each other closely, so that they find its queries, and dq in fp32, in the L2 cache. The
// longest come first: under a causal mask the first keys are seen by all queries. Packed keys' blocks are numbered over
// all sequences, so that few numbers stand for nothing, whatever the longest sequence might be. In steps with little in
// registers, since the producer has few.
template <class Traits>
FA_DEVICE void describe_tile(const BackwardParams& params, int index, BackwardControl<Traits>& control) {
  const HeadTile position = head_tile(index, params.num_n_blocks, params.num_tiles / params.num_n_blocks,
                                      {params.heads_per_section, params.least_heads_in_last_section});
  KeyTile& tile = control.tile[control.num_announced % kKeyTileSlots];
  tile.key_part = position.head * params.num_n_blocks + position.place;
  const int head = position.head / params.group_parts;
  tile.num_heads_q = params.heads_q / params.heads_kv / params.group_parts;
  tile.first_head_q = (position.head - head * params.group_parts) * tile.num_heads_q;
  const KeyBlock block = key_block<Traits>(params, head, position.place);
  tile.n_block = block.n_block;
  tile.batch = block.batch;
  tile.head_kv = block.head_kv;
  tile.first_head_q += tile.head_kv * (params.heads_q / params.heads_kv);
  const volatile int& batch = tile.batch;  // read again each time: kept, it would cost a register too many
  tile.q = query_sequence<Traits::kSeqLayout>(params, batch);
  tile.k = key_sequence<Traits::kSeqLayout>(params, batch);
  tile.scratch_row = scratch_row<Traits>(params, tile.q, batch);
  tile.blocks = visibility<Traits>(params, tile).template query_blocks<Traits::kBlockM, Traits::kBlockN>(tile.n_block);
}

// Numbers of tiles, in the order in which CTAs ask for them: each waits at most for tiles of lower numbers, which
// others have taken that run. Nothing is promised of the order of blockIdx, or of how many CTAs run at once.
template <class Traits>
class TileNumbers {
 public:
  FA_DEVICE TileNumbers(const BackwardParams& params, BackwardControl<Traits>& control)
      : params_(params), control_(control) {}

  // The next one; from params.num_tiles on there is none. The same for both CTAs of a cluster, of which the first one
  // asks.
  FA_DEVICE int take() {
    if constexpr (kClusterSize == 1) {
      return take_number(params_.tile_counter);
    } else {
      return tile_rank<Traits>() == 0 ? take_for_both() : receive();
    }
  }

  // To be called once, after the last take().
  FA_DEVICE void close() const {
    if (kClusterSize == 1 || tile_rank<Traits>() == 0) {
      close_counter(params_.tile_counter, int(gridDim.x) / kClusterSize);
    }
  }

 private:
  static constexpr int kClusterSize = BackwardShape<Traits>::kClusterSize;

  FA_DEVICE int take_for_both() {
    const int number = take_number(params_.tile_counter);
    control_.numbers.wait_empty({control_.num_numbers++});
    control_.sent_number[0] = number;
    cutlass::arch::fence_view_async_shared();
    bulk_copy_to(1, cute::cast_smem_ptr_to_uint(control_.received_number),
                 cute::cast_smem_ptr_to_uint(control_.sent_number), sizeof(control_.sent_number),
                 cute::cast_smem_ptr_to_uint(&control_.numbers.full[0]));
    return number;
  }

  FA_DEVICE int receive() {
    TransactionBarrier::arrive_and_expect_tx(&control_.numbers.full[0], sizeof(control_.received_number));
    control_.numbers.wait_full({control_.num_numbers++});
    const int number = control_.received_number[0];
    Barrier::arrive(&control_.numbers.empty[0], 0, /*pred=*/1);
    return number;
  }

  const BackwardParams& params_;
  BackwardControl<Traits>& control_;
};

}  // namespace fa
