// The producer: loads a tile's keys and values once, then queries, output gradients and row statistics block by block.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "smem.cuh"

namespace fa {

template <class Traits>
class BackwardProducer {
 public:
  FA_DEVICE BackwardProducer(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile)
      : params_(params), smem_(smem), control_(smem.control), tile_(tile) {}

  // By one thread.
  FA_DEVICE void run() {
    load_keys();
    const int group = params_.heads_q / params_.heads_kv;
    for (int head = 0; head < group; ++head) {
#pragma unroll 1
      for (int m_block = tile_.blocks.begin; m_block < tile_.blocks.end; ++m_block) {
        load_queries(tile_.head_kv * group + head, m_block);
      }
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  FA_DEVICE void load_keys() {
    const int row = tile_.k.map_row(params_.row_bound_k, tile_.n_block * Traits::kBlockN);
    TransactionBarrier::arrive_and_expect_tx(&control_.k_full, Shape::kKBytes);
    load<Traits::kBlockN, Traits::kHeadDim, Shape::kSwizzleBytes>(params_.k, &control_.k_full, smem_.k, tile_.head_kv,
                                                                  row, tile_.k);
    TransactionBarrier::arrive_and_expect_tx(&control_.v_full, Shape::kVBytes);
    load<Traits::kBlockN, Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.v, &control_.v_full, smem_.v, tile_.head_kv,
                                                                    row, tile_.k);
  }

  FA_DEVICE void load_queries(int head_q, int m_block) {
    const int stage = stage_.index();
    const int row = tile_.q.map_row(params_.row_bound_q, m_block * Traits::kBlockM);
    const int64_t scratch_row =
        tile_.scratch_row + head_q * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
    control_.q.wait_empty(stage_);
    TransactionBarrier::arrive_and_expect_tx(&control_.q.full[stage], Shape::kQBytes + Shape::kStatisticsBytes);
    load<Traits::kBlockM, Traits::kHeadDim, Shape::kSwizzleBytes>(params_.q, &control_.q.full[stage], smem_.q[stage],
                                                                  head_q, row, tile_.q);
    load_statistics(params_.lse_log2 + scratch_row, &control_.q.full[stage], smem_.lse_log2[stage]);
    control_.dout.wait_empty(stage_);
    TransactionBarrier::arrive_and_expect_tx(&control_.dout.full[stage], Shape::kDoutBytes + Shape::kStatisticsBytes);
    load<Traits::kBlockM, Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.dout, &control_.dout.full[stage],
                                                                    smem_.dout[stage], head_q, row, tile_.q);
    load_statistics(params_.delta + scratch_row, &control_.dout.full[stage], smem_.delta[stage]);
    stage_.advance();
  }

  template <int kRows, int kColumns, int kSwizzleBytes>
  FA_DEVICE static void load(const CUtensorMap& map, uint64_t* full, uint8_t* tile, int head, int row,
                             const Sequence& sequence) {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
#pragma unroll
    for (int chunk = 0; chunk < kColumns / kChunkColumns; ++chunk) {
      cute::SM90_TMA_LOAD_5D::copy(&map, full, static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST),
                                   tile + chunk * kRows * kSwizzleBytes, chunk * kChunkColumns, head, row,
                                   sequence.map_origin(), sequence.batch);
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
