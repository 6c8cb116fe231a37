// From S^T to probabilities, and with dP^T to the gradients of the scores: what happens to a block between its
// products.
#pragma once

#include "../core/fragment.cuh"
#include "../core/stage.cuh"
#include "query_order.cuh"

namespace fa {

// Of one warpgroup's 64 keys, the rows, against a block of queries. The weight of a pair in dS is its probability,
// times the softcap's slope.
template <class Traits>
class ScoreGradients {
 public:
  using Scores = float[Traits::kBlockM / 2];
  using Packed = uint32_t[Traits::kBlockM / 4];

  static constexpr bool kSoftcap = Traits::kScore == Score::kSoftcap;

  // `first_key`: the warpgroup's first among the tile's.
  FA_DEVICE ScoreGradients(const BackwardParams& params, const KeyTile& tile, int first_key)
      : params_(params), tile_(tile), first_key_(first_key) {}

  // P^T = exp2(S^T - lse). Leaves the weights of dS in `scores`. `lse_log2`: of the block's queries.
  template <BlockKind kKind>
  FA_DEVICE void to_probabilities(int m_block, const float* lse_log2, Scores& scores, Packed& p) const {
    const float* lse = lse_log2 + fragment_column();
    KeyRange queries[kRowsPerThread];
    if constexpr (kKind == BlockKind::kEdge) seeing_queries(m_block, queries);
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; i += 2) {
      // Pair by pair: slopes of all scores together would need more registers than there are.
      float probability[2], slope[2] = {1.f, 1.f};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float score = scores[i + j];
        if constexpr (kSoftcap) {
          score = tanh_approx(score * params_.score_scale);
          slope[j] = 1.f - score * score;
        }
        float exponent = fmaf(score, params_.exp2_scale, -lse[register_column(i + j)]);
        if (kKind == BlockKind::kEdge && !sees(queries, i + j)) exponent = -INFINITY;
        probability[j] = exp2_approx(exponent);
        scores[i + j] = kSoftcap ? probability[j] * slope[j] : probability[j];
      }
      p[i / 2] = pack<Traits::kDtype>(probability[0], probability[1]);
    }
  }

  // dS^T = weights * (dP^T - delta), rounded. `weights`: in full precision, or rounded. `delta`: of the block's
  // queries.
  template <class Weights>
  FA_DEVICE static void to_score_gradients(const Weights& weights, const float* delta, const Scores& dscores,
                                           Packed& ds) {
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 2; i += 2) ds[i / 2] = gradient_pair(weights, delta, dscores, i);
  }

  // The same into rows [first_row, first_row + 64) of a tile of kTileKeys rows, without registers for all of dS^T.
  template <class Weights>
  FA_DEVICE static void write_score_gradients(const Weights& weights, const float* delta, const Scores& dscores,
                                              uint8_t* tile, int first_row) {
    using Shape = BackwardShape<Traits>;
    const uint32_t address = cute::cast_smem_ptr_to_uint(tile);
#pragma unroll
    for (int column = 0; column < Traits::kBlockM; column += kMatricesColumns) {
      uint32_t ds[kMatricesColumns / 4];
#pragma unroll
      for (int j = 0; j < kMatricesColumns / 4; ++j) {
        ds[j] = gradient_pair(weights, delta, dscores, column / 2 + 2 * j);
      }
      stage_matrices<Shape::kTileKeys, Shape::kSwizzleBytesDs>(address, first_row, column, ds);
    }
  }

 private:
  // Of registers `i` and `i` + 1.
  template <class Weights>
  FA_DEVICE static uint32_t gradient_pair(const Weights& weights, const float* delta, const Scores& dscores, int i) {
    const float2 weight = weight_pair(weights, i);
    const float* const of_query = delta + fragment_column() + register_column(i);
    return pack<Traits::kDtype>(weight.x * (dscores[i] - of_query[0]), weight.y * (dscores[i + 1] - of_query[1]));
  }
  FA_DEVICE static float2 weight_pair(const Scores& weights, int i) { return make_float2(weights[i], weights[i + 1]); }
  FA_DEVICE static float2 weight_pair(const Packed& weights, int i) { return unpack<Traits::kDtype>(weights[i / 2]); }

  // The queries that see the thread's two keys, relative to its first column, so that tests compare with constants.
  FA_DEVICE void seeing_queries(int m_block, KeyRange (&queries)[kRowsPerThread]) const {
    const int first_query = m_block * Traits::kBlockM + fragment_column();
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int key = tile_.n_block * Traits::kBlockN + first_key_ + fragment_row() + 8 * r;
      const KeyRange rows = visibility<Traits>(params_, tile_).rows(key);
      queries[r] = {key < tile_.k.length ? rows.begin - first_query : Traits::kBlockM, rows.end - first_query};
    }
  }

  // Whether the pair of register `i` see each other. A query that does not exist may seem to: it has no weight anyway.
  FA_DEVICE static bool sees(const KeyRange (&queries)[kRowsPerThread], int i) {
    const KeyRange seeing = queries[register_row(i)];
    return register_column(i) >= seeing.begin && (Traits::kMask != Mask::kLocal || register_column(i) < seeing.end);
  }

  const BackwardParams& params_;
  const KeyTile& tile_;
  int first_key_;
};

}  // namespace fa
