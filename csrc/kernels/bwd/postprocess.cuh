// After the main kernel: dq from the order of the accumulators into rows, scaled and rounded; and dk and dv where they
// are sums of several tiles'.
//
// One CTA for each block of query rows of one head and sequence, with a warpgroup for each part of it (dq_part.cuh),
// and behind them those of key_sum.cuh. The last ones come first: of those, the main kernel's sums are still in the L2
// cache.
#pragma once

#include "../core/fragment.cuh"
#include "key_sum.cuh"
#include "query_block.cuh"

namespace fa {

template <class Traits>
class Postprocess {
 public:
  using Shape = BackwardShape<Traits>;
  static constexpr int kNumThreads = Shape::kNumDqParts * kWarpgroupThreads;

  FA_DEVICE explicit Postprocess(const BackwardParams& params) : params_(params) {}

  FA_DEVICE void run() {
    const int index = gridDim.x - 1 - blockIdx.x;
    if (index >= params_.num_query_blocks) {
      return KeyGradientSum<Traits>(params_, index - params_.num_query_blocks).run();
    }
    block_ = query_block<Traits>(params_, index);
    if (block_.m_block * Traits::kBlockM >= block_.q.length) return;
    float dq[kSize];
    load(dq);
    const float scale[kRowsPerThread] = {params_.softmax_scale, params_.softmax_scale};
    scale_rows(dq, scale);
    store(dq);
  }

 private:
  static constexpr int kSize = Shape::kDqFloats / kNumThreads;

  FA_DEVICE void load(float (&dq)[kSize]) const {
    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    const float4* from = reinterpret_cast<const float4*>(params_.dq_blocks + block_.scratch_row * Traits::kHeadDim) +
                         warpgroup * (kSize / 4) * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 part = from[i / 4 * kWarpgroupThreads];
      dq[i] = part.x, dq[i + 1] = part.y, dq[i + 2] = part.z, dq[i + 3] = part.w;
    }
  }

  FA_DEVICE void store(const float (&dq)[kSize]) const {
    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    const int first_row =
        block_.m_block * Traits::kBlockM + fragment_row() + (Shape::kSplitsDqRows ? warpgroup * kWarpgroupRows : 0);
    const int first_column = Shape::kSplitsDqRows ? 0 : warpgroup * Shape::kDqColumns;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int position = first_row + 8 * r;
      const int num_columns = position < block_.q.length ? params_.head_dim - first_column : 0;
      store_row<Traits::kDtype>(block_.written_row(params_.dq_rows, position) + first_column, num_columns, dq, r);
    }
  }

  const BackwardParams& params_;
  QueryBlock block_;
};

}  // namespace fa
