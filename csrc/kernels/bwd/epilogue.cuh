// The end of a tile: dk and dv to memory.
#pragma once

#include "mma.cuh"

namespace fa {

template <class Traits>
class KeyGradientEpilogue {
 public:
  FA_DEVICE KeyGradientEpilogue(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile,
                                int warpgroup)
      : params_(params), smem_(smem), tile_(tile), warpgroup_(warpgroup) {}

  FA_DEVICE void store(KeyTileMma<Traits>& mma) {
    const float scale[kRowsPerThread] = {params_.softmax_scale, params_.softmax_scale};
    scale_rows(mma.dk, scale);
    // dv goes where only this warpgroup read v. Of k, all warpgroups read all rows, for dq.
    stage<Shape::kSwizzleBytesV>(smem_.v, mma.dv);
    cutlass::arch::NamedBarrier::sync(Shape::kNumConsumerWarpgroups * kWarpgroupThreads, uint32_t(kTurnBarrier));
    stage<Shape::kSwizzleBytes>(smem_.k, mma.dk);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    const int first_key = tile_.n_block * Traits::kBlockN + warpgroup_ * kWarpgroupRows;
    if (threadIdx.x % kWarpgroupThreads == 0 && first_key < tile_.k.length) {
      send<Traits::kHeadDimV, Shape::kSwizzleBytesV>(params_.dv, params_.head_dim_v, smem_.v, first_key);
      send<Traits::kHeadDim, Shape::kSwizzleBytes>(params_.dk, params_.head_dim, smem_.k, first_key);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  template <int kSwizzleBytes, int kSize>
  FA_DEVICE void stage(uint8_t* tile, const float (&gradient)[kSize]) {
    uint32_t packed[kSize / 2];
    pack_fragment<Traits::kDtype>(packed, gradient);
    stage_fragment<Traits::kBlockN, kSwizzleBytes>(cute::cast_smem_ptr_to_uint(tile), warpgroup_ * kWarpgroupRows,
                                                   packed);
  }

  template <int kColumns, int kSwizzleBytes>
  FA_DEVICE void send(const CUtensorMap& map, int columns, const uint8_t* tile, int first_key) const {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    const uint8_t* rows = tile + warpgroup_ * kWarpgroupRows * kSwizzleBytes;
#pragma unroll
    for (int chunk = 0; chunk < kColumns / kChunkColumns; ++chunk) {
      if (chunk * kChunkColumns >= columns) break;
      cute::SM90_TMA_STORE_5D::copy(&map, rows + chunk * Traits::kBlockN * kSwizzleBytes, chunk * kChunkColumns,
                                    tile_.head_kv, tile_.k.map_row(params_.row_bound_k, first_key),
                                    tile_.k.map_origin(), tile_.k.batch);
    }
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  const KeyTile& tile_;
  int warpgroup_;
};

}  // namespace fa
