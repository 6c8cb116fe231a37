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

// Applies the hook to a block. `first`: what the thread's part of the fragment has at column 0, for the warpgroup's
// first row.
template <Score kScore, int kSize>
FA_DEVICE void apply_score(float (&scores)[kSize], const ScoreCoord& first, const ForwardParams& params) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    ScoreCoord coord = first;
    const int row = fragment_row() + 8 * register_row(i);
    coord.query += params.packing.position(row);
    coord.head_q += params.packing.head(row);
    coord.key += register_column(i);
    scores[i] = ScorePolicy<kScore>::fwd(scores[i], coord, params);
  }
}

}  // namespace fa
