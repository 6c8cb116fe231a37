// After the main kernel: dq from the order of the accumulators into rows, scaled and rounded.
//
// One CTA for each block of query rows of one head and sequence, with as many threads as the main kernel has consumers.
#pragma once

#include "../core/fragment.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
class Postprocess {
 public:
  using Shape = BackwardShape<Traits>;
  static constexpr int kNumThreads = Shape::kNumConsumerWarpgroups * kWarpgroupThreads;

  FA_DEVICE explicit Postprocess(const BackwardParams& params)
      : params_(params),
        m_block_(blockIdx.x),
        head_(blockIdx.y),
        batch_(blockIdx.z),
        q_(query_sequence<Traits::kSeqLayout>(params, batch_)) {}

  FA_DEVICE void run() const {
    if (m_block_ * Traits::kBlockM >= q_.length) return;
    float dq[kSize];
    load(dq);
    const float scale[kRowsPerThread] = {params_.softmax_scale, params_.softmax_scale};
    scale_rows(dq, scale);
    store(dq);
  }

 private:
  static constexpr int kSize = Shape::kDqFloats / kNumThreads;

  FA_DEVICE void load(float (&dq)[kSize]) const {
    const int padded = params_.cu_seqlens_q ? padded_offset(q_.offset, batch_, Traits::kBlockM) : 0;
    const int64_t block = q_.batch * params_.rows_batch_stride + head_ * params_.rows_head_stride + padded +
                          m_block_ * Traits::kBlockM;
    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    const float4* from =
        reinterpret_cast<const float4*>(params_.dq_blocks + block * Traits::kHeadDim) +
        warpgroup * kSize / 4 * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 part = from[i / 4 * kWarpgroupThreads];
      dq[i] = part.x, dq[i + 1] = part.y, dq[i + 2] = part.z, dq[i + 3] = part.w;
    }
  }

  FA_DEVICE void store(const float (&dq)[kSize]) const {
    const int warpgroup = threadIdx.x / kWarpgroupThreads;
    const int row = m_block_ * Traits::kBlockM + fragment_row() + (Shape::kSplitsDqRows ? warpgroup * kWarpgroupRows : 0);
    const int first_column = threadIdx.x % 4 * 8 + (Shape::kSplitsDqRows ? 0 : warpgroup * Shape::kDqColumns);
    uint16_t* const sequence = static_cast<uint16_t*>(params_.dq) + q_.batch * params_.dq_batch_stride +
                               q_.offset * params_.dq_row_stride + head_ * params_.dq_head_stride + first_column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int position = row + 8 * r;
      uint16_t* const address = sequence + position * params_.dq_row_stride;
#pragma unroll
      for (int column = 0; column < Shape::kDqColumns; column += 32) {
        uint32_t pairs[4];
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const int i = column / 2 + 4 * group + 2 * r;
          pairs[group] = pack<Traits::kDtype>(dq[i], dq[i + 1]);
        }
        const uint4 columns = transpose_quad(pairs);
        const bool exists = position < q_.length && first_column + column < params_.head_dim;
        if (exists) *reinterpret_cast<uint4*>(address + column) = columns;
      }
    }
  }

  const BackwardParams& params_;
  int m_block_, head_, batch_;
  Sequence q_;
};

}  // namespace fa
