// The end of a tile: normalise, store the log-sum-exp, and send the output through shared memory to TMA, or straight to
// memory where no shared memory is left for it.
#pragma once

#include <cute/arch/copy_sm90.hpp>

#include "../core/stage.cuh"
#include "mma.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
class Epilogue {
 public:
  FA_DEVICE Epilogue(const ForwardParams& params, ForwardSmem<Traits>& smem, int warpgroup)
      : params_(params), smem_(smem), warpgroup_(warpgroup) {}

  FA_DEVICE void store(TileMma<Traits>& mma, const WorkTile& tile) {
    scale_or_clear_rows(mma.out, mma.normalizer);
    const int first = first_position<Traits>(params_, tile, warpgroup_);
    const int end = min_of(tile.q.length, first + params_.packing.positions.value);
    if (tile.value_pass == 0) store_lse(mma.lse, tile, first, end);
    if constexpr (Traits::kOutputBuffer == OutputBuffer::kNone) {
      store_fragment(mma.out, tile, first, end);
    } else {
      stage_and_send(mma, tile, first);
    }
  }

  // Shared memory must outlive the copies that read it.
  FA_DEVICE void finish() {
    if (leads()) cute::tma_store_wait<0>();
  }

 private:
  using Shape = ForwardShape<Traits>;
  using Fragment = float[Traits::kHeadDimV / 2];
  static constexpr int kChunkColumns = Shape::kSwizzleBytesV / Shape::kElementBytes;
  static constexpr int kChunkBytes = kWarpgroupRows * Shape::kSwizzleBytesV;

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }
  // Of the thread's row `r`: an unused one's is the next warpgroup's first.
  FA_DEVICE int position(int first, int r) const { return first + params_.packing.position(fragment_row() + 8 * r); }
  FA_DEVICE int head(int r) const { return params_.packing.head(fragment_row() + 8 * r); }

  FA_DEVICE void stage_and_send(TileMma<Traits>& mma, const WorkTile& tile, int first) {
    wait_buffer_free();
    write_fragment(mma.out);
    // The copy engine reads what these threads wrote by ordinary stores.
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    if (leads() && first < tile.q.length) send(tile, first);
    if constexpr (!Shape::kOwnOutputBuffer) {
      if (leads()) cute::tma_store_wait<0>();
      mma.release_q_with_output();
    }
  }

  // Of positions [first, end), the warpgroup's.
  FA_DEVICE void store_lse(const float (&lse)[kRowsPerThread], const WorkTile& tile, int first, int end) const {
    float* rows =
        params_.lse + tile.batch * params_.lse_batch_stride + tile.head_q * params_.lse_head_stride + tile.q.offset;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const bool stores = fragment_column() == 0 && position(first, r) < end;
      if (stores) rows[head(r) * params_.lse_head_stride + position(first, r)] = lse[r];
    }
  }

  // out (64 x head_dim_v) to memory.
  FA_DEVICE void store_fragment(const Fragment& out, const WorkTile& tile, int first, int end) const {
    const int first_column = tile.value_pass * Traits::kHeadDimV;
    uint16_t* const sequence = static_cast<uint16_t*>(params_.out) + tile.q.batch * params_.out_batch_stride +
                               tile.q.offset * params_.out_row_stride + tile.head_q * params_.out_head_stride;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      uint16_t* const address =
          sequence + position(first, r) * params_.out_row_stride + head(r) * params_.out_head_stride + first_column;
      const int num_columns = position(first, r) < end ? params_.head_dim_v - first_column : 0;
      store_row<Traits::kDtype>(address, num_columns, out, r);
    }
  }

  // The last tile's copy must have read the buffer. Where it is q's, the wait for q was that wait.
  FA_DEVICE void wait_buffer_free() const {
    if constexpr (Shape::kOwnOutputBuffer) {
      if (leads()) cute::tma_store_wait<0>();
      sync_warpgroup(warpgroup_);
    }
  }

  // out (64 x head_dim_v) to shared memory.
  FA_DEVICE void write_fragment(const Fragment& out) {
    const uint32_t tile = cute::cast_smem_ptr_to_uint(smem_.output(warpgroup_));
#pragma unroll
    for (int column = 0; column < Traits::kHeadDimV; column += kMatricesColumns) {
      uint32_t words[kMatricesColumns / 4];
#pragma unroll
      for (int j = 0; j < kMatricesColumns / 4; ++j) {
        const int i = column / 2 + 2 * j;
        words[j] = pack<Traits::kDtype>(out[i], out[i + 1]);
      }
      stage_matrices<kWarpgroupRows, Shape::kSwizzleBytesV>(tile, /*first_row=*/0, column, words);
    }
  }

  FA_DEVICE void send(const WorkTile& tile, int first) {
#pragma unroll
    for (int chunk = 0; chunk < Traits::kHeadDimV / kChunkColumns; ++chunk) {
      const int column = tile.value_pass * Traits::kHeadDimV + chunk * kChunkColumns;
      if (column >= params_.head_dim_v) break;
      cute::SM90_TMA_STORE_5D::copy(&params_.o, smem_.output(warpgroup_) + chunk * kChunkBytes, column, tile.head_q,
                                    tile.q.map_row(params_.row_bound_q, first), tile.q.map_origin(), tile.q.batch);
    }
    cute::tma_store_arrive();
  }

  const ForwardParams& params_;
  ForwardSmem<Traits>& smem_;
  int warpgroup_;
};

}  // namespace fa
