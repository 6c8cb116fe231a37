// The producer: loads a tile's keys and values once, then queries, output gradients and row statistics block by block.
#pragma once

#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "smem.cuh"

namespace fa {

// Of a tile of kColumns columns, the chunks that hold one of `columns`.
template <int kColumns, int kSwizzleBytes>
FA_DEVICE int existing_chunks(int columns) {
  constexpr int kChunkColumns = kSwizzleBytes / 2;
  return min_of(kColumns / kChunkColumns, ceil_div(columns, kChunkColumns));
}

template <int kRows, int kColumns, int kSwizzleBytes>
FA_DEVICE void clear_missing_chunks(uint8_t* tile, int columns) {
  constexpr int kStoreBytes = 16;
  const int first = existing_chunks<kColumns, kSwizzleBytes>(columns) * kRows * kSwizzleBytes;
  for (int at = first + threadIdx.x * kStoreBytes; at < kRows * kColumns * 2; at += blockDim.x * kStoreBytes) {
    *reinterpret_cast<uint4*>(tile + at) = {0, 0, 0, 0};
  }
}

// Zeros where no copy will write. The products run over these columns, too, and NaN times zero is no zero. By all
// threads, before the barrier behind which the roles begin.
template <class Traits>
FA_DEVICE void clear_missing_columns(const BackwardParams& params, BackwardSmem<Traits>& smem) {
  using Shape = BackwardShape<Traits>;
  constexpr int kSwizzle = Shape::kSwizzleBytes, kSwizzleV = Shape::kSwizzleBytesV;
  clear_missing_chunks<Traits::kBlockN, Traits::kHeadDim, kSwizzle>(smem.k, params.head_dim);
  clear_missing_chunks<Traits::kBlockN, Traits::kHeadDimV, kSwizzleV>(smem.v, params.head_dim_v);
  for (int stage = 0; stage < Traits::kNumStages; ++stage) {
    clear_missing_chunks<Traits::kBlockM, Traits::kHeadDim, kSwizzle>(smem.q[stage], params.head_dim);
    clear_missing_chunks<Traits::kBlockM, Traits::kHeadDimV, kSwizzleV>(smem.dout[stage], params.head_dim_v);
  }
  cutlass::arch::fence_view_async_shared();
}

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
    load<Traits::kBlockN, Traits::kHeadDim, Shape::kSwizzleBytes>(
        params_.k, &control_.k_full, /*more_bytes=*/0, smem_.k, params_.head_dim, tile_.head_kv, row, tile_.k);
    load<Traits::kBlockN, Traits::kHeadDimV, Shape::kSwizzleBytesV>(
        params_.v, &control_.v_full, /*more_bytes=*/0, smem_.v, params_.head_dim_v, tile_.head_kv, row, tile_.k);
  }

  FA_DEVICE void load_queries(int head_q, int m_block) {
    const int stage = stage_.index();
    const int row = tile_.q.map_row(params_.row_bound_q, m_block * Traits::kBlockM);
    const int64_t scratch_row =
        tile_.scratch_row + head_q * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
    control_.q.wait_empty(stage_);
    load<Traits::kBlockM, Traits::kHeadDim, Shape::kSwizzleBytes>(params_.q, &control_.q.full[stage],
                                                                  Shape::kStatisticsBytes, smem_.q[stage],
                                                                  params_.head_dim, head_q, row, tile_.q);
    load_statistics(params_.lse_log2 + scratch_row, &control_.q.full[stage], smem_.lse_log2[stage]);
    control_.dout.wait_empty(stage_);
    load<Traits::kBlockM, Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.dout, &control_.dout.full[stage],
                                                                    Shape::kStatisticsBytes, smem_.dout[stage],
                                                                    params_.head_dim_v, head_q, row, tile_.q);
    load_statistics(params_.delta + scratch_row, &control_.dout.full[stage], smem_.delta[stage]);
    stage_.advance();
  }

  // A tile's column chunks, and `more_bytes` announced that complete the same barrier. Chunks without a column are not
  // asked for (see params.h): clear_missing_columns() has filled them.
  template <int kRows, int kColumns, int kSwizzleBytes>
  FA_DEVICE static void load(const CUtensorMap& map, uint64_t* full, int more_bytes, uint8_t* tile, int columns,
                             int head, int row, const Sequence& sequence) {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    const int num_chunks = existing_chunks<kColumns, kSwizzleBytes>(columns);
    TransactionBarrier::arrive_and_expect_tx(full, num_chunks * kRows * kSwizzleBytes + more_bytes);
#pragma unroll
    for (int chunk = 0; chunk < kColumns / kChunkColumns; ++chunk) {
      if (chunk >= num_chunks) break;
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
