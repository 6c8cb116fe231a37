// Online softmax of the rows of an accumulator (Milakov and Gimelshein, "Online normalizer calculation for softmax").
#pragma once

#include <cmath>

#include "fragment.cuh"
#include "ptx.cuh"

namespace fa {

constexpr float kLn2 = 0.69314718055994531f;

// Statistics of the thread's two rows. A row is spread over the four threads of a quad.
//
// Exponents are taken relative to a reference, which follows the row's maximum only when that has grown by more than
// kHeadroom: sums and outputs of a row share the reference, so any reference gives the exact result, and probabilities
// up to 2^kHeadroom fit all formats. Most blocks then need no correction of the output.
struct OnlineSoftmax {
  static constexpr float kHeadroom = 8.f;  // in the exponent, base 2

  float reference[kRowsPerThread] = {-INFINITY, -INFINITY};  // a score, unscaled; equal over the quad
  float row_sum[kRowsPerThread] = {0.f, 0.f};                // this thread's part
  float correction[kRowsPerThread];                          // what the last update makes of older outputs
  bool corrects;                                             // whether that is anything but 1 in this warp

  // scores (64 x block_n) become exp2(exp2_scale * (score - reference)).
  template <int kSize>
  FA_DEVICE void update(float (&scores)[kSize], float exp2_scale) {
    bool grown = false;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float maximum = row_maximum(scores, row);
      const float old_reference = reference[row];
      // False for a row without a visible key so far: -inf - -inf is NaN.
      const bool grows = (maximum - old_reference) * exp2_scale > kHeadroom;
      if (grows) reference[row] = maximum;
      grown |= grows;
      const float scaled_reference = reference[row] == -INFINITY ? 0.f : reference[row] * exp2_scale;
      correction[row] = grows ? exp2_approx(old_reference * exp2_scale - scaled_reference) : 1.f;
      float sum = 0.f;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (register_row(i) == row) {
          scores[i] = exp2_approx(fmaf(scores[i], exp2_scale, -scaled_reference));
          sum += scores[i];
        }
      }
      row_sum[row] = fmaf(row_sum[row], correction[row], sum);
    }
    corrects = __any_sync(~0u, grown);
  }

  // After the last block: the factors that normalise the output, and the rows' natural log-sum-exp. A row without
  // a visible key has sum 0: factor 0 and -inf. A NaN stays one.
  FA_DEVICE void finish(float exp2_scale, float (&normalizer)[kRowsPerThread], float (&lse)[kRowsPerThread]) {
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      float sum = row_sum[row];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      normalizer[row] = sum == 0.f ? 0.f : 1.f / sum;
      lse[row] = sum == 0.f ? -INFINITY : (reference[row] * exp2_scale + log2_approx(sum)) * kLn2;
    }
  }

 private:
  // Of the whole row: equal over the quad.
  template <int kSize>
  FA_DEVICE static float row_maximum(const float (&scores)[kSize], int row) {
    float maximum = -INFINITY;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (register_row(i) == row) maximum = fmaxf(maximum, scores[i]);
    }
    maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 1));
    return fmaxf(maximum, __shfl_xor_sync(~0u, maximum, 2));
  }
};

}  // namespace fa
