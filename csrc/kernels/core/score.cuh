// The hook that every score passes between the QK product and the softmax.
#pragma once

#include "../params.h"
#include "enums.h"
#include "fragment.cuh"
#include "packing.h"
#include "platform.h"
#include "ptx.cuh"

namespace fa {

// Which pair a score belongs to, after packing and variable length are undone.
struct ScoreCoord {
  int batch;
  int head_q;
  int head_kv;
  int query;  // row of the sequence's queries
  int key;    // row of the sequence's keys
};

template <Score kScore>
struct ScorePolicy;

// The softmax folds the scale into its exponent.
template <>
struct ScorePolicy<Score::kScaled> {
  FA_DEVICE static float fwd(float score, const ScoreCoord&, const ForwardParams&) { return score; }
};

// softcap * tanh(softmax_scale * s / softcap); the outer factor is part of the softmax's exponent.
template <>
struct ScorePolicy<Score::kSoftcap> {
  FA_DEVICE static float fwd(float score, const ScoreCoord&, const ForwardParams& params) {
    return tanh_approx(score * params.score_scale);
  }
};

// Applies the hook to a block. `first`: what the thread's part of the fragment has at column 0, for the tile's first
// head; `row`: the thread's first row, as the tiles count them.
template <Score kScore, int kSize>
FA_DEVICE void apply_score(float (&scores)[kSize], const ScoreCoord& first, int row, const ForwardParams& params) {
  const Packing packing = {params.packed_heads_log2};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    ScoreCoord coord = first;
    coord.query = packing.position(row + 8 * register_row(i));
    coord.head_q += packing.head(row + 8 * register_row(i));
    coord.key += register_column(i);
    scores[i] = ScorePolicy<kScore>::fwd(scores[i], coord, params);
  }
}

}  // namespace fa
