// The five products of a step. All are issued only: the caller commits and waits.
#pragma once

#include "../core/wgmma.cuh"
#include "smem.cuh"

namespace fa {

// result^T (64 x block_m) = keys' rows of the warpgroup (64 x kDepth) * queries' rows (block_m x kDepth)^T.
template <class Traits, int kDepth, int kSwizzleBytes, int kSize>
FA_DEVICE void issue_transposed_scores(float (&result)[kSize], uint32_t key_tile, uint32_t query_tile) {
  const KMajorTile<kSwizzleBytes> a(key_tile), b(query_tile);
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += kMmaDepth) {
    detail::mma_ss<typename Traits::ScoresMma>(
        a.at(k_major_offset<BackwardShape<Traits>::kTileKeys, kSwizzleBytes>(depth)),
        b.at(k_major_offset<Traits::kBlockM, kSwizzleBytes>(depth)), result,
        depth == 0 ? ScaleOut::Zero : ScaleOut::One, std::make_index_sequence<kSize>{});
  }
}

// gradient (64 keys x columns) += weights^T (64 x block_m, registers) * queries' rows (block_m x columns).
template <class Traits, class Mma, int kSwizzleBytes, int kSize, int kSizeA>
FA_DEVICE void issue_key_gradient(float (&gradient)[kSize], const uint32_t (&weights)[kSizeA], uint32_t query_tile) {
  const MnMajorTile<Traits::kBlockM, kSwizzleBytes> b(query_tile);
#pragma unroll
  for (int depth = 0; depth < Traits::kBlockM; depth += kMmaDepth) {
    detail::mma_rs<Mma>(weights + depth / 4, b.at(depth * kSwizzleBytes), gradient, std::make_index_sequence<kSize>{});
  }
}

// The same, the weights in shared memory: a tile of kTileKeys rows of which `weights_tile` is the first of 64.
template <class Traits, class Mma, int kSwizzleBytes, int kSize>
FA_DEVICE void issue_key_gradient(float (&gradient)[kSize], uint32_t weights_tile, uint32_t query_tile) {
  constexpr int kSwizzleBytesA = BackwardShape<Traits>::kSwizzleBytesDs;
  const KMajorTile<kSwizzleBytesA> a(weights_tile);
  const MnMajorTile<Traits::kBlockM, kSwizzleBytes> b(query_tile);
#pragma unroll
  for (int depth = 0; depth < Traits::kBlockM; depth += kMmaDepth) {
    detail::mma_ss<Mma>(a.at(k_major_offset<BackwardShape<Traits>::kTileKeys, kSwizzleBytesA>(depth)),
                        b.at(depth * kSwizzleBytes), gradient, ScaleOut::One, std::make_index_sequence<kSize>{});
  }
}

// dq (64 x columns) = ds^T's 64 columns (kTileKeys x 64)^T * keys (kTileKeys x columns), or with `kScale` one more of
// these. `ds_columns`, `key_columns`: addresses.
template <class Traits, class Mma, ScaleOut kScale = ScaleOut::Zero, int kSize>
FA_DEVICE void issue_dq(float (&dq)[kSize], uint32_t ds_columns, uint32_t key_columns) {
  using Shape = BackwardShape<Traits>;
  const MnMajorTile<Shape::kTileKeys, Shape::kSwizzleBytesDs> a(ds_columns);
  const MnMajorTile<Shape::kTileKeys, Shape::kSwizzleBytes> b(key_columns);
#pragma unroll
  for (int depth = 0; depth < Shape::kTileKeys; depth += kMmaDepth) {
    detail::mma_ss<Mma>(a.at(depth * Shape::kSwizzleBytesDs), b.at(depth * Shape::kSwizzleBytes), dq,
                        depth == 0 ? kScale : ScaleOut::One, std::make_index_sequence<kSize>{});
  }
}

}  // namespace fa
