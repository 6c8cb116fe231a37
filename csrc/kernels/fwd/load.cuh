// The producer warp: chooses tiles, announces them, and feeds q, k and v to shared memory by TMA.
#pragma once

#include "../core/copy.cuh"
#include "../core/scheduler.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
FA_DEVICE Visibility<Traits::kMask> tile_visibility(const ForwardParams& params, const WorkTile& tile) {
  return {tile.q.length, tile.k.length, params.window_left, params.window_right, params.attention_chunk};
}

// Position in the sequence of the first row of a tile's warpgroup.
template <class Traits>
FA_DEVICE int first_position(const ForwardParams& params, const WorkTile& tile, int warpgroup) {
  return (tile.m_block * ForwardShape<Traits>::kNumConsumerWarpgroups + warpgroup) * params.packing.positions.value;
}

template <class Traits>
class Producer {
 public:
  FA_DEVICE Producer(const ForwardParams& params, ForwardSmem<Traits>& smem)
      : params_(params), smem_(smem), control_(smem.control) {}

  // All lanes follow the tiles, since the scheduler needs them; one issues the copies.
  FA_DEVICE void run() {
    if (leads()) prefetch_descriptors();
    Scheduler<Traits> scheduler(params_);
    for (;;) {
      const ScheduledTile scheduled = scheduler.next(params_);
      control_.tiles.wait_empty(tile_slot_);
      if (leads()) announce(scheduled);
      if (!scheduled.valid) break;
      // The stages of q and v follow from other counts: the producer has few registers.
      if (leads()) load_tile(control_.tile[tile_slot_.index()]);
      __syncwarp();
      tile_slot_.advance();
    }
    if (leads()) load_deferred_values(/*keys_ahead=*/0);
    scheduler.close(params_);
  }

 private:
  using Shape = ForwardShape<Traits>;

  // In the words of the scheduler, so that one number of the thread is kept.
  FA_DEVICE static bool leads() { return threadIdx.x % kWarpThreads == 0; }
  FA_DEVICE static int rank() { return Traits::kClusterSize == 1 ? 0 : cluster_rank(); }

  FA_DEVICE void prefetch_descriptors() const {
    for (const CUtensorMap* map : {&params_.q, &params_.k, &params_.v, &params_.o}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
  }

  // Written field by field to where the consumers read it, and read back from there: the producer has few registers.
  FA_DEVICE void describe(const ScheduledTile& scheduled, WorkTile& tile) const {
    // With one pass, as nearly always, nothing is divided.
    const int passes = params_.num_value_passes;
    const int group = passes == 1 ? scheduled.position.head : scheduled.position.head / passes;
    const int head_q = group * params_.packing.heads.value;
    tile.m_block = scheduled.position.m_block * Traits::kClusterSize + rank();
    tile.batch = scheduled.batch;
    tile.head_q = head_q;
    tile.head_kv = params_.heads_per_kv.divide(head_q);
    tile.value_pass = scheduled.position.head - group * passes;
    tile.q = query_sequence<Traits::kSeqLayout>(params_, scheduled.batch);
    tile.k = key_sequence<Traits::kSeqLayout>(params_, scheduled.batch);
    const int positions = Shape::kNumConsumerWarpgroups * params_.packing.positions.value;
    const BlockRange blocks =
        tile_visibility<Traits>(params_, tile).template blocks<Traits::kBlockN>(tile.m_block, positions).at_least_one();
    tile.visited = {blocks.begin, blocks.end};
  }

  // Those that a warpgroup's rows need. One without a visible key, or without a row, visits the block that comes last.
  FA_DEVICE BlockRange warpgroup_blocks(const WorkTile& tile, int warpgroup) const {
    const int m_block = tile.m_block * Shape::kNumConsumerWarpgroups + warpgroup;
    const int positions = params_.packing.positions.value;
    const BlockRange blocks =
        tile_visibility<Traits>(params_, tile).template blocks<Traits::kBlockN>(m_block, positions);
    const bool has_rows = m_block * positions < tile.q.length;
    const int last = tile.visited.begin;
    return has_rows && !blocks.empty() ? blocks : BlockRange{last, last, last, last + 1};
  }

  FA_DEVICE void announce(const ScheduledTile& scheduled) {
    WorkTile& tile = control_.tile[tile_slot_.index()];
    if (scheduled.valid) {
      describe(scheduled, tile);
      // Not unrolled: the producer has no register to spare.
#pragma unroll 1
      for (int warpgroup = 0; warpgroup < Shape::kNumConsumerWarpgroups; ++warpgroup) {
        tile.needed[warpgroup] = warpgroup_blocks(tile, warpgroup);
      }
    } else {
      tile.m_block = WorkTile::kNoMoreWork;
    }
    Barrier::arrive(&control_.tiles.full[tile_slot_.index()]);
  }

  // Keys run one block ahead of values, as the consumers issue QK of the next block before PV of the last: where tiles
  // overlap, the values of a tile's last block follow the next tile's first keys. The first keys go before q: q's
  // buffer may still hold the output of the last tile on its way to memory.
  FA_DEVICE void load_tile(const WorkTile& tile) {
    const KeyRange range = tile.visited;
    load_k(tile, range.end - 1);
    // With one q buffer, q waits for the last tile's last QK, and its last values need not.
    if constexpr (Traits::kNumQStages == 1) load_deferred_values(/*keys_ahead=*/1);
    load_q(tile);
    if constexpr (Traits::kNumQStages > 1) load_deferred_values(/*keys_ahead=*/1);
#pragma unroll 1
    for (int n_block = range.end - 2; n_block >= range.begin; --n_block) {
      load_k(tile, n_block);
      load_v(tile, n_block + 1, /*keys_ahead=*/1);
    }
    if constexpr (!Shape::kOverlapsTiles) load_v(tile, range.begin, /*keys_ahead=*/0);
  }

  // The last tile's last values, if there was one. Its consumers still need them, so that its slot still holds it.
  FA_DEVICE void load_deferred_values(int keys_ahead) {
    if (!Shape::kOverlapsTiles || tile_slot_.count == 0) return;
    const WorkTile& tile = control_.tile[(tile_slot_.count - 1) % kTileSlots];
    load_v(tile, tile.visited.begin, keys_ahead);
  }

  FA_DEVICE void load_q(const WorkTile& tile) {
    const RingState<Traits::kNumQStages> stage{tile_slot_.count};  // one q a tile
#pragma unroll 1
    for (int warpgroup = 0; warpgroup < Shape::kNumConsumerWarpgroups; ++warpgroup) {
      Ring<Traits::kNumQStages>& ring = control_.q[warpgroup];
      ring.wait_empty(stage);
      load<kWarpgroupRows, Traits::kHeadDim, Shape::kSwizzleBytes, /*kShares=*/1>(
          params_.q, &ring.full[stage.index()], CacheHint::EVICT_FIRST, smem_.q[stage.index()][warpgroup], 0,
          Traits::kHeadDim, tile.head_q, first_position<Traits>(params_, tile, warpgroup), params_.row_bound_q, tile.q,
          params_.packing.used_rows(), /*share=*/0);
    }
  }

  FA_DEVICE void load_k(const WorkTile& tile, int n_block) {
    control_.k.wait_empty(k_stage_);
    load<Traits::kBlockN, Traits::kHeadDim, Shape::kSwizzleBytes, Traits::kClusterSize>(
        params_.k, &control_.k.full[k_stage_.index()], CacheHint::EVICT_LAST, smem_.k[k_stage_.index()], 0,
        Traits::kHeadDim, tile.head_kv, n_block * Traits::kBlockN, params_.row_bound_k, tile.k, Traits::kBlockN,
        rank());
    k_stage_.advance();
  }

  // `keys_ahead`: blocks of keys that were loaded after these values' own. The chunks are shared out the other way
  // round than for k, so that an odd one makes no difference between CTAs.
  FA_DEVICE void load_v(const WorkTile& tile, int n_block, int keys_ahead) {
    const RingState<Traits::kNumStages> stage{k_stage_.count - 1 - keys_ahead};
    control_.v.wait_empty(stage);
    load<Traits::kBlockN, Traits::kHeadDimV, Shape::kSwizzleBytesV, Traits::kClusterSize>(
        params_.v, &control_.v.full[stage.index()], CacheHint::EVICT_LAST, smem_.v[stage.index()],
        tile.value_pass * Traits::kHeadDimV, params_.head_dim_v, tile.head_kv, n_block * Traits::kBlockN,
        params_.row_bound_k, tile.k, Traits::kBlockN, Traits::kClusterSize - 1 - rank());
  }

  // One tile of kRows x kColumns, column chunk by column chunk, from position `row` of the sequence and from `column`
  // of its `columns` columns. A chunk's box holds the first `box_rows` rows. Where no row is left, or no column of a
  // chunk, nothing is asked for (see params.h). What no box reaches keeps what it holds: those rows' and columns'
  // results are never stored, and those keys are masked.
  //
  // With kShares > 1 each CTA of the cluster asks for its share of the chunks, for all CTAs, and awaits all of them.
  template <int kRows, int kColumns, int kSwizzleBytes, int kShares>
  FA_DEVICE static void load(const CUtensorMap& map, uint64_t* full, CacheHint hint, uint8_t* tile, int column,
                             int columns, int head, int row, int row_bound, const Sequence& sequence, int box_rows,
                             int share) {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    if (row >= sequence.length) {
      Barrier::arrive(full);
      return;
    }
    const int num_chunks = min_of(kColumns / kChunkColumns, ceil_div(columns - column, kChunkColumns));
    TransactionBarrier::arrive_and_expect_tx(full, num_chunks * box_rows * kSwizzleBytes);
    // Narrow chunks in a loop: the producer has no register to spare.
#pragma unroll(kShares == 1 && kSwizzleBytes == 128 ? 8 : 1)
    for (int chunk = share; chunk < kColumns / kChunkColumns; chunk += kShares) {
      if (chunk >= num_chunks) break;
      load_box<kShares>(map, full, hint, tile + chunk * kRows * kSwizzleBytes, column + chunk * kChunkColumns, head,
                        sequence.map_row(row_bound, row), sequence);
    }
  }

  const ForwardParams& params_;
  ForwardSmem<Traits>& smem_;
  ForwardControl<Traits>& control_;
  RingState<kTileSlots> tile_slot_;
  RingState<Traits::kNumStages> k_stage_;
};

}  // namespace fa
