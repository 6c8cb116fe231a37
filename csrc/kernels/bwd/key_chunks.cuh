// Which column chunks of a tile's keys and values exist. A copy without an element in bounds must not be issued, so
// that chunks past the last column, or of a CTA all of whose keys are past the end, are cleared rather than loaded:
// whatever queries hold there must not count.
#pragma once

#include "barriers.cuh"

namespace fa {

template <class Traits>
struct KeyChunks {
  using Shape = BackwardShape<Traits>;
  static constexpr int kColumns = Shape::kSwizzleBytes / Shape::kElementBytes;    // of one chunk of k
  static constexpr int kColumnsV = Shape::kSwizzleBytesV / Shape::kElementBytes;  // of v
  static constexpr int kBytes = Shape::kTileKeys * Shape::kSwizzleBytes;
  static constexpr int kBytesV = Shape::kTileKeys * Shape::kSwizzleBytesV;
  // The last chunk of a tile may be missing only where it is narrow.
  static constexpr bool kMayBeMissing =
      Shape::kClusterSize > 1 || Shape::kSwizzleBytes == 64 || Shape::kSwizzleBytesV == 64;

  int k, v;     // chunks that exist
  int other_k;  // the same of the other CTA's keys, from this one's first column of dq on

  FA_DEVICE KeyChunks(const BackwardParams& params, const KeyTile& tile) {
    const int rank = tile_rank<Traits>();
    const bool exist = first_key<Traits>(tile, rank) < tile.k.length;
    k = exist ? ceil_div(params.head_dim, kColumns) : 0;
    v = exist ? ceil_div(params.head_dim_v, kColumnsV) : 0;
    const bool others_exist = first_key<Traits>(tile, 1 - rank) < tile.k.length;
    const int first_column = rank * kOtherColumns;
    other_k = others_exist ? ceil_div(min_of(params.head_dim - first_column, kOtherColumns), kColumns) : 0;
  }

  // Columns of dq that this CTA makes, first those of rank 0.
  static constexpr int kOtherColumns = Traits::kHeadDim / Shape::kClusterSize;
};

// By all consumers, before they read keys.
template <class Traits>
FA_DEVICE void clear_missing_chunks(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile) {
  using Shape = BackwardShape<Traits>;
  using Chunks = KeyChunks<Traits>;
  const Chunks chunks(params, tile);
  const auto clear = [](uint8_t* begin, const uint8_t* end) {
    constexpr int kThreads = Shape::kNumConsumerWarpgroups * kWarpgroupThreads;
    uint4* at = reinterpret_cast<uint4*>(begin) + threadIdx.x - kWarpgroupThreads;
    for (; at < reinterpret_cast<const uint4*>(end); at += kThreads) *at = {0, 0, 0, 0};
  };
  meet_consumers<Traits>();  // all of whose gradients of the tile before have left these places
  clear(smem.k + chunks.k * Chunks::kBytes, smem.k + Shape::kKBytes);
  clear(smem.v + chunks.v * Chunks::kBytesV, smem.v + Shape::kVBytes);
  if constexpr (Shape::kClusterSize > 1) {
    clear(smem.exchange.other_k + chunks.other_k * Chunks::kBytes, smem.exchange.other_k + Shape::kOtherKBytes);
  }
  cutlass::arch::fence_view_async_shared();
  meet_consumers<Traits>();
}

}  // namespace fa
