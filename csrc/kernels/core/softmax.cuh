// Online softmax of the rows of an accumulator (Milakov and Gimelshein, "Online normalizer calculation for softmax").
#pragma once

#include <cmath>

#include "exp2.h"
#include "fragment.cuh"
#include "ptx.cuh"

namespace fa {

constexpr float kLn2 = 0.69314718055994531f;

// Statistics of the thread's two rows. A row is spread over the four threads of a quad.
//
// Exponents are taken relative to a reference, near the row's maximum so far. Sums and outputs of a row share it, so
// any reference gives the exact result. kEager: it is the maximum. kLazy: it follows the maximum only when that has
// grown by more than kHeadroom; most blocks then need no correction of the output, at the price of a branch.
// kOnOverflow: as kLazy, but blocks may be tried without their maximum, in try_update().
template <Rescale kRescale>
struct OnlineSoftmax {
  static constexpr float kHeadroom = 8.f;    // in the base-2 exponent: probabilities up to 2^8 fit all formats
  static constexpr float kMaxSum = 32768.f;  // of a block's exponentials of a thread: they fit all formats

  float reference[kRowsPerThread] = {-INFINITY, -INFINITY};  // a score, unscaled; equal over the quad
  float row_sum[kRowsPerThread] = {0.f, 0.f};                // this thread's part
  float correction[kRowsPerThread];                          // what the last update makes of older outputs
  bool corrects;                                             // whether that may be anything but 1 in this warp

  // scores (64 x block_n) become exp2(exp2_scale * (score - reference)); of 16 in a row, kPolynomialOf16 by the
  // polynomial, which masked scores must not meet.
  template <int kPolynomialOf16, int kSize>
  FA_DEVICE void update(float (&scores)[kSize], float exp2_scale) {
    corrects = kRescale == Rescale::kEager;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float old_reference = reference[row];
      const bool moved = move_reference(row, row_maximum(scores, row), exp2_scale);
      corrects |= moved;
      // A row without a visible key so far: -inf - -inf would be NaN, exp2(-inf - 0) is 0.
      const float finite_reference = reference[row] == -INFINITY ? 0.f : reference[row];
      const float scaled_reference = finite_reference * exp2_scale;
      // The difference first: it is exactly 0 where nothing moved. Rounded products would leave a factor beside 1, and
      // over millions of keys its power.
      correction[row] = moved ? exp2_approx((old_reference - finite_reference) * exp2_scale) : 1.f;
      const float sum = exponentiate<kPolynomialOf16>(scores, row, exp2_scale, scaled_reference);
      row_sum[row] = fmaf(row_sum[row], correction[row], sum);
    }
    if constexpr (kRescale != Rescale::kEager) corrects = __any_sync(~0u, corrects);
  }

  // The same for the references as they are, whatever the scores; none may be masked. Returns, equal over the warp,
  // whether that was right. If not, scores and sums are lost: with both as they were before, update() is called for.
  template <int kPolynomialOf16, int kSize>
  FA_DEVICE bool try_update(float (&scores)[kSize], float exp2_scale) {
    float sum_of_rows = 0.f;
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float sum = exponentiate<kPolynomialOf16>(scores, row, exp2_scale, reference[row] * exp2_scale);
      row_sum[row] += sum;
      sum_of_rows += sum;
    }
    // False for NaN, and for a row without a visible key so far: its reference, -inf, makes the exponents +inf.
    return __all_sync(~0u, sum_of_rows < kMaxSum);
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
  // Row `row` of the scores becomes exp2(exp2_scale * score - scaled_reference). Returns their sum.
  template <int kPolynomialOf16, int kSize>
  FA_DEVICE static float exponentiate(float (&scores)[kSize], int row, float exp2_scale, float scaled_reference) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (register_row(i) == row) {
        const float exponent = fmaf(scores[i], exp2_scale, -scaled_reference);
        const int column = i / 4 * 2 + i % 2;  // of the row's, as far as they are this thread's
        const bool polynomial = column * kPolynomialOf16 % 16 < kPolynomialOf16;
        scores[i] = polynomial ? exp2_polynomial(exponent) : exp2_approx(exponent);
        sum += scores[i];
      }
    }
    return sum;
  }

  // Returns whether it may have moved.
  FA_DEVICE bool move_reference(int row, float maximum, float exp2_scale) {
    if constexpr (kRescale == Rescale::kEager) {
      reference[row] = fmaxf(reference[row], maximum);
      return true;
    }
    // False for a row without a visible key so far: -inf - -inf is NaN.
    const bool moves = (maximum - reference[row]) * exp2_scale > kHeadroom;
    if (moves) reference[row] = maximum;
    return moves;
  }

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
