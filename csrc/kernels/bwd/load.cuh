// The producer: loads queries, output gradients and row statistics block by block; with the first block the tile's keys
// and values, each where it is needed first.
#pragma once

#include "../core/copy.cuh"
#include "key_chunks.cuh"
#include "query_order.cuh"

namespace fa {

template <class Traits>
class BackwardProducer {
 public:
  FA_DEVICE BackwardProducer(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile)
      : params_(params), smem_(smem), control_(smem.control), tile_(tile) {}

  // By one thread.
  FA_DEVICE void run() {
    for (int head = 0; head < tile_.num_heads_q; ++head) {
      for_each_query_block<Traits>(tile_.blocks.begin, tile_.blocks.end,
                                   [&](int m_block) { load_queries(tile_.first_head_q + head, m_block); });
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  // With the first block's queries.
  FA_DEVICE void load_keys(uint64_t* full) {
    using Chunks = KeyChunks<Traits>;
    const Chunks chunks(params_, tile_);
    const int rank = tile_rank<Traits>();
    load_chunks<Shape::kSwizzleBytes>(params_.k, full, smem_.k, chunks.k, 0, rank);
    if constexpr (Shape::kClusterSize > 1) {
      load_chunks<Shape::kSwizzleBytes>(params_.k, full, smem_.exchange.other_k, chunks.other_k,
                                        rank * Chunks::kOtherColumns, 1 - rank);
    }
  }

  // With the first block's output gradients.
  FA_DEVICE void load_values(uint64_t* full) {
    const KeyChunks<Traits> chunks(params_, tile_);
    load_chunks<Shape::kSwizzleBytesV>(params_.v, full, smem_.v, chunks.v, 0, tile_rank<Traits>());
  }

  // The first `num_chunks` from `first_column` on, of the keys of CTA `rank`. No other tile reads them: they may leave
  // the L2 cache first.
  template <int kSwizzleBytes>
  FA_DEVICE void load_chunks(const CUtensorMap& map, uint64_t* full, uint8_t* tile, int num_chunks, int first_column,
                             int rank) const {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    constexpr int kChunkBytes = Shape::kTileKeys * kSwizzleBytes;
    const int row = tile_.k.map_row(params_.row_bound_k, first_key<Traits>(tile_, rank));
    TransactionBarrier::expect_transaction(full, num_chunks * kChunkBytes);
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      load_box<1>(map, full, CacheHint::EVICT_FIRST, tile + chunk * kChunkBytes, first_column + chunk * kChunkColumns,
                  tile_.head_kv, row, tile_.k);
    }
  }

  FA_DEVICE void load_queries(int head_q, int m_block) {
    const int stage = stage_.index();
    const int row = tile_.q.map_row(params_.row_bound_q, m_block * Traits::kBlockM);
    const int64_t scratch_row =
        tile_.scratch_row + head_q * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
    control_.q.wait_empty(stage_);
    if (stage_.count == 0) load_keys(&control_.q.full[stage]);
    TransactionBarrier::arrive_and_expect_tx(&control_.q.full[stage], Shape::kQBytes + Shape::kStatisticsBytes);
    load_rows<Traits::kHeadDim, Shape::kSwizzleBytes>(params_.q, params_.head_dim, &control_.q.full[stage],
                                                      smem_.q[stage], head_q, row);
    load_statistics(params_.lse_log2 + scratch_row, &control_.q.full[stage], smem_.lse_log2[stage]);
    const RingState<Traits::kNumDoutStages> dout_at{stage_.count};
    uint64_t* const dout_full = &control_.dout.full[dout_at.index()];
    control_.dout.wait_empty(dout_at);
    if (stage_.count == 0) load_values(dout_full);
    TransactionBarrier::arrive_and_expect_tx(dout_full, Shape::kDoutBytes + Shape::kStatisticsBytes);
    load_rows<Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.dout, params_.head_dim_v, dout_full,
                                                        smem_.dout[dout_at.index()], head_q, row);
    load_statistics(params_.delta + scratch_row, dout_full, smem_.delta[dout_at.index()]);
    stage_.advance();
  }

  // A block of queries; each CTA of a cluster asks for its share of the chunks, for all CTAs. In the place of a chunk
  // past the last column comes the first one: it meets zeros only. Without a hint to the L2 cache, like dq, which is as
  // likely to be wanted again: what is asked to stay would take its place.
  template <int kColumns, int kSwizzleBytes>
  FA_DEVICE void load_rows(const CUtensorMap& map, int columns, uint64_t* full, uint8_t* tile, int head,
                           int row) const {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    constexpr int kShares = Shape::kClusterSize;
#pragma unroll(kShares == 1 ? 8 : 1)
    for (int chunk = tile_rank<Traits>(); chunk < kColumns / kChunkColumns; chunk += kShares) {
      const bool exists = !KeyChunks<Traits>::kMayBeMissing || chunk * kChunkColumns < columns;
      load_box<kShares>(map, full, CacheHint::EVICT_NORMAL, tile + chunk * Traits::kBlockM * kSwizzleBytes,
                        exists ? chunk * kChunkColumns : 0, head, row, tile_.q);
    }
  }

  FA_DEVICE static void load_statistics(const float* from, uint64_t* full, float* to) {
    cute::SM90_BULK_COPY_G2S::copy(from, full, to, Shape::kStatisticsBytes);
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  BackwardControl<Traits>& control_;
  const KeyTile& tile_;
  RingState<Traits::kNumStages> stage_;
};

}  // namespace fa
