// Warpgroup matrix products over tiles in shared memory.
//
// A tile of R rows lies in column chunks of W bytes (W = 128 or 64, also the swizzle): chunk c, row r begins at
// c * R * W + r * W. Q and K are read with their columns as the product's depth (K-major); V with its rows as the
// depth (MN-major).
#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

#include "fragment.cuh"
#include "traits.cuh"

namespace fa {

using cute::SM90::GMMA::ScaleOut;

// Matrix descriptor (PTX ISA, "Matrix descriptor format") of a tile in shared memory. All lengths are in units of 16
// bytes; the swizzle mode is in the top two bits. An operand further into the tile has the same descriptor with a
// larger address: one addition, as the 14-bit field cannot overflow into its neighbour.
template <int kSwizzleBytes, int kLeadingBytes>
struct TileDescriptor {
  static constexpr uint32_t kSwizzleMode = kSwizzleBytes == 128 ? 1 : 2;
  static constexpr uint32_t kStrideBytes = 8 * kSwizzleBytes;  // from 8 rows to the next 8
  static constexpr uint32_t kHigh = kSwizzleMode << 30 | kStrideBytes >> 4;

  uint32_t low;

  FA_DEVICE explicit TileDescriptor(uint32_t address)
      : low(uint32_t(kLeadingBytes >> 4) << 16 | (address & 0x3FFFF) >> 4) {}

  FA_DEVICE uint64_t at(int offset_bytes) const { return uint64_t(kHigh) << 32 | (low + uint32_t(offset_bytes >> 4)); }
};

// Columns are the depth: the leading offset is not used when swizzled.
template <int kSwizzleBytes>
using KMajorTile = TileDescriptor<kSwizzleBytes, 16>;

// Rows are the depth: the leading offset leads from one column chunk to the next.
template <int kRows, int kSwizzleBytes>
using MnMajorTile = TileDescriptor<kSwizzleBytes, kRows * kSwizzleBytes>;

// Where columns [depth, depth + 16) of a K-major tile begin.
template <int kRows, int kSwizzleBytes>
FA_DEVICE constexpr int k_major_offset(int depth) {
  constexpr int kChunkColumns = kSwizzleBytes / 2;
  return depth / kChunkColumns * kRows * kSwizzleBytes + depth % kChunkColumns * 2;
}

namespace detail {

template <class Mma, int kSize, size_t... kIndex>
FA_DEVICE void mma_ss(uint64_t a, uint64_t b, float (&d)[kSize], ScaleOut scale, std::index_sequence<kIndex...>) {
  Mma::fma(a, b, d[kIndex]..., scale);
}

template <class Mma, int kSize, size_t... kIndex>
FA_DEVICE void mma_rs(const uint32_t* a, uint64_t b, float (&d)[kSize], std::index_sequence<kIndex...>) {
  Mma::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., ScaleOut::One);
}

}  // namespace detail

// scores (64 x keys) = q (64 x head_dim) * k (the first `keys` of block_n x head_dim)^T. Issues only: the caller
// commits and waits.
template <class Traits, class Mma, int kSize>
FA_DEVICE void issue_qk(float (&scores)[kSize], uint32_t q, uint32_t k) {
  constexpr int kSwizzleBytes = ForwardShape<Traits>::kSwizzleBytes;
  const KMajorTile<kSwizzleBytes> q_tile(q), k_tile(k);
#pragma unroll
  for (int depth = 0; depth < Traits::kHeadDim; depth += kMmaDepth) {
    detail::mma_ss<Mma>(q_tile.at(k_major_offset<kWarpgroupRows, kSwizzleBytes>(depth)),
                        k_tile.at(k_major_offset<Traits::kBlockN, kSwizzleBytes>(depth)), scores,
                        depth == 0 ? ScaleOut::Zero : ScaleOut::One, std::make_index_sequence<kSize>{});
  }
}

// out (64 x head_dim_v) += p (64 x kKeys, registers) * v (the first kKeys of block_n x head_dim_v). Issues only.
template <class Traits, int kKeys, int kSizeO, int kSizeP>
FA_DEVICE void issue_pv(float (&out)[kSizeO], const uint32_t (&p)[kSizeP], uint32_t v) {
  constexpr int kSwizzleBytes = ForwardShape<Traits>::kSwizzleBytesV;
  const MnMajorTile<Traits::kBlockN, kSwizzleBytes> v_tile(v);
#pragma unroll
  for (int depth = 0; depth < kKeys; depth += kMmaDepth) {
    detail::mma_rs<typename Traits::PvMma>(p + depth / 4, v_tile.at(depth * kSwizzleBytes), out,
                                           std::make_index_sequence<kSizeO>{});
  }
}

}  // namespace fa
