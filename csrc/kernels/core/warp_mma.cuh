// Scores by one warp alone, for what the others need not do: with the products of single warps, whose operands it loads
// into registers itself. Slow beside wgmma.
#pragma once

#include <cute/arch/mma_sm80.hpp>

#include "stage.cuh"
#include "wgmma.cuh"

namespace fa {

template <Dtype kDtype>
using WarpMma = std::conditional_t<kDtype == Dtype::kBf16, cute::SM80_16x8x16_F32BF16BF16F32_TN,
                                   cute::SM80_16x8x16_F32F16F16F32_TN>;

// scores = q k^T for the warp's 16 of q's 64 rows, held as issue_qk() leaves them. By whole warps.
template <class Traits, int kSize>
FA_DEVICE void compute_warp_scores(float (&scores)[kSize], uint32_t q, uint32_t k) {
  constexpr int kSwizzleBytes = ForwardShape<Traits>::kSwizzleBytes;
  using Mma = WarpMma<Traits::kDtype>;
  // By way of a shuffle, so that addresses are made here: those of the epilogue's stores have parts in common with
  // them, which the compiler would make ahead of all blocks, and keep in registers.
  const unsigned thread = __shfl_sync(~0u, threadIdx.x, threadIdx.x % kWarpThreads);
  clear_fragment(scores);
#pragma unroll 1
  for (int depth = 0; depth < Traits::kHeadDim; depth += kMmaDepth) {
    uint32_t a[4];  // 16 queries x 16
    load_matrices(matrix_row<kWarpgroupRows, kSwizzleBytes>(q, warp_row(thread), depth, thread), a);
#pragma unroll
    for (int key = 0; key < Traits::kBlockN; key += 16) {
      uint32_t b[4];  // 16 keys x 16: the first 8 keys are words 0 and 2, the others 1 and 3
      load_matrices(matrix_row<Traits::kBlockN, kSwizzleBytes>(k, key, depth, thread), b);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* const d = scores + key / 2 + 4 * half;
        Mma::fma(d[0], d[1], d[2], d[3], a[0], a[1], a[2], a[3], b[half], b[half + 2], d[0], d[1], d[2], d[3]);
      }
    }
  }
  __syncwarp();  // all lanes have read q and k before one of them frees these
}

}  // namespace fa
