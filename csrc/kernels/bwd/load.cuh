// The producer: loads queries, output gradients and row statistics block by block; with the first block the tile's keys
// and values, each where it is needed first.
#pragma once

#include "../core/copy.cuh"
#include "key_chunks.cuh"
#include "query_order.cuh"
#include "tiles.cuh"

namespace fa {

template <class Traits>
class BackwardProducer {
 public:
  FA_DEVICE BackwardProducer(const BackwardParams& params, BackwardSmem<Traits>& smem)
      : params_(params), smem_(smem), control_(smem.control), numbers_(params, smem.control) {}

  // By one thread.
  FA_DEVICE void run() {
    for (; announce_tile(); ++control_.num_announced) {
      bool first = true;
      for (int head = 0; head < key_tile().num_heads_q; ++head) {
        for_each_query_block(key_tile().blocks.begin, key_tile().blocks.end, [&](int m_block) {
          load_block(key_tile().first_head_q + head, m_block, first);
          first = false;
        });
      }
    }
    numbers_.close();
  }

 private:
  using Shape = BackwardShape<Traits>;

  // Read again where it is needed: registers are scarce.
  FA_DEVICE RingState<kKeyTileSlots> tiles() const { return {control_.num_announced}; }
  FA_DEVICE KeyTile& key_tile() const { return control_.tile[tiles().index()]; }

  // The next one with keys. Whether there is one.
  FA_DEVICE bool announce_tile() {
    control_.tiles.wait_empty(tiles());
    while (true) {
      const int number = numbers_.take();
      if (number >= params_.num_tiles) {
        key_tile().n_block = -1;
        break;
      }
      describe_tile<Traits>(params_, number, control_);
      if (key_tile().n_block * Traits::kBlockN < key_tile().k.length) break;
    }
    Barrier::arrive(&control_.tiles.full[tiles().index()]);
    return key_tile().exists();
  }

  // With the first block's queries.
  FA_DEVICE void load_keys(uint64_t* full) {
    using Chunks = KeyChunks<Traits>;
    const Chunks chunks(params_, key_tile());
    const int rank = tile_rank<Traits>();
    load_chunks<Shape::kSwizzleBytes>(params_.k, full, smem_.k, chunks.k, 0, rank);
    if constexpr (Shape::kClusterSize > 1) {
      load_chunks<Shape::kSwizzleBytes>(params_.k, full, smem_.exchange.other_k, chunks.other_k,
                                        rank * Chunks::kOtherColumns, 1 - rank);
    }
  }

  // With the first block's output gradients.
  FA_DEVICE void load_values(uint64_t* full) {
    const KeyChunks<Traits> chunks(params_, key_tile());
    load_chunks<Shape::kSwizzleBytesV>(params_.v, full, smem_.v, chunks.v, 0, tile_rank<Traits>());
  }

  // The first `num_chunks` from `first_column` on, of the keys of CTA `rank`. No other tile reads them: they may leave
  // the L2 cache first.
  template <int kSwizzleBytes>
  FA_DEVICE void load_chunks(const CUtensorMap& map, uint64_t* full, uint8_t* tile, int num_chunks, int first_column,
                             int rank) const {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    constexpr int kChunkBytes = Shape::kTileKeys * kSwizzleBytes;
    const int row = key_tile().k.map_row(params_.row_bound_k, first_key<Traits>(key_tile(), rank));
    TransactionBarrier::expect_transaction(full, num_chunks * kChunkBytes);
    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      load_box<1>(map, full, CacheHint::EVICT_FIRST, tile + chunk * kChunkBytes, first_column + chunk * kChunkColumns,
                  key_tile().head_kv, row, key_tile().k);
    }
  }

  // Queries and output gradients of a tile's first block are on their way while the tile before ends; its keys must
  // wait.
  FA_DEVICE void load_block(int head_q, int m_block, bool first) {
    const int row = key_tile().q.map_row(params_.row_bound_q, m_block * Traits::kBlockM);
    const int stage = stage_.index();
    uint64_t* const q_full = &control_.q.full[stage];
    control_.q.wait_empty(stage_);
    TransactionBarrier::expect_transaction(q_full, Shape::kQBytes + Shape::kStatisticsBytes);
    load_rows<Traits::kHeadDim, Shape::kSwizzleBytes>(params_.q, params_.head_dim, q_full, smem_.q[stage], head_q, row);
    load_statistics(params_.lse_log2 + scratch_row(head_q, m_block), q_full, smem_.lse_log2[stage]);
    if (!first) Barrier::arrive(q_full);

    const RingState<Traits::kNumDoutStages> dout_at{stage_.count};
    uint64_t* const dout_full = &control_.dout.full[dout_at.index()];
    control_.dout.wait_empty(dout_at);
    TransactionBarrier::expect_transaction(dout_full, Shape::kDoutBytes + Shape::kStatisticsBytes);
    load_rows<Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.dout, params_.head_dim_v, dout_full,
                                                        smem_.dout[dout_at.index()], head_q, row);
    load_statistics(params_.delta + scratch_row(head_q, m_block), dout_full, smem_.delta[dout_at.index()]);
    if (first) {
      Barrier::wait(&control_.kv_empty, tiles().count % 2 ^ 1);
      load_keys(q_full);
      Barrier::arrive(q_full);
      load_values(dout_full);
    }
    Barrier::arrive(dout_full);
    stage_.advance();
  }

  FA_DEVICE int64_t scratch_row(int head_q, int m_block) const {
    return key_tile().scratch_row + head_q * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
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
                        exists ? chunk * kChunkColumns : 0, head, row, key_tile().q);
    }
  }

  FA_DEVICE static void load_statistics(const float* from, uint64_t* full, float* to) {
    cute::SM90_BULK_COPY_G2S::copy(from, full, to, Shape::kStatisticsBytes);
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  BackwardControl<Traits>& control_;
  TileNumbers<Traits> numbers_;
  RingState<Traits::kNumStages> stage_;
};

}  // namespace fa
