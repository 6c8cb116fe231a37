// The end of a tile: dk and dv to memory.
#pragma once

#include "key_part.cuh"
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
    if (params_.group_parts > 1) return store_part(mma);
    // Other warpgroups' products may have read what this one's gradients take the place of.
    meet_consumers<Traits>();
    stage<Shape::kSwizzleBytesV>(smem_.v, mma.dv);
    stage<Shape::kSwizzleBytes>(smem_.k, mma.dk);
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(warpgroup_);
    if (threadIdx.x % kWarpgroupThreads == 0 && first_key() < tile_.k.length) {
      send<Shape::kDvColumns, Shape::kSwizzleBytesV>(params_.dv, params_.head_dim_v, smem_.v);
      send<Shape::kDkColumns, Shape::kSwizzleBytes>(params_.dk, params_.head_dim, smem_.k);
      cute::tma_store_arrive();
      cute::tma_store_wait<0>();
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  // The kernel after this one adds up the parts.
  FA_DEVICE void store_part(const KeyTileMma<Traits>& mma) const {
    const int warpgroup = tile_rank<Traits>() * Shape::kNumConsumerWarpgroups + warpgroup_;
    KeyPart<Traits>(params_, tile_.key_part, warpgroup).store(mma.dk, mma.dv);
    sync_warpgroup(warpgroup_);  // all of whose products have read the keys
  }

  // What the warpgroup has of the tile: some of its rows, or some of its columns.
  FA_DEVICE int first_row() const { return Shape::kSplitsColumns ? 0 : warpgroup_ * kWarpgroupRows; }
  FA_DEVICE int first_column(int columns) const { return Shape::kSplitsColumns ? warpgroup_ * columns : 0; }
  FA_DEVICE int first_key() const { return fa::first_key<Traits>(tile_, tile_rank<Traits>()) + first_row(); }

  template <int kSwizzleBytes, int kSize>
  FA_DEVICE void stage(uint8_t* tile, const float (&gradient)[kSize]) {
    uint32_t packed[kSize / 2];
    pack_fragment<Traits::kDtype>(packed, gradient);
    const int columns_begin = first_column(2 * kSize) * Shape::kTileKeys * Shape::kElementBytes;
    stage_fragment<Shape::kTileKeys, kSwizzleBytes>(cute::cast_smem_ptr_to_uint(tile) + columns_begin, first_row(),
                                                    packed);
  }

  // `columns`: of all that the tensor has.
  template <int kColumns, int kSwizzleBytes>
  FA_DEVICE void send(const CUtensorMap& map, int columns, const uint8_t* tile) const {
    constexpr int kChunkColumns = kSwizzleBytes / Shape::kElementBytes;
    const Sequence& k = tile_.k;
    const int begin = first_column(kColumns);
    const uint8_t* from = tile + begin * Shape::kTileKeys * Shape::kElementBytes + first_row() * kSwizzleBytes;
#pragma unroll
    for (int chunk = 0; chunk < kColumns / kChunkColumns; ++chunk) {
      const int column = begin + chunk * kChunkColumns;
      if (column >= columns) break;
      cute::SM90_TMA_STORE_5D::copy(&map, from + chunk * Shape::kTileKeys * kSwizzleBytes, column, tile_.head_kv,
                                    k.map_row(params_.row_bound_k, first_key()), k.map_origin(), k.batch);
    }
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  const KeyTile& tile_;
  int warpgroup_;
};

}  // namespace fa
