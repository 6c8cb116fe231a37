// Before the main kernel: the row statistics that it reads, and the zeros that it adds dq to.
//
// One CTA for each block of query rows of one head and sequence.
#pragma once

#include "../core/fragment.cuh"
#include "smem.cuh"

namespace fa {

template <class Traits>
class Preprocess {
 public:
  static constexpr int kNumThreads = 256;

  FA_DEVICE explicit Preprocess(const BackwardParams& params)
      : params_(params),
        m_block_(blockIdx.x),
        head_(blockIdx.y),
        batch_(blockIdx.z),
        q_(query_sequence<Traits::kSeqLayout>(params, batch_)) {}

  FA_DEVICE void run() const {
    if (m_block_ * Traits::kBlockM >= q_.length) return;
    const int64_t block = scratch_row();
    clear_dq(block);
    for (int row = threadIdx.x / kRowThreads; row < Traits::kBlockM; row += kNumThreads / kRowThreads) {
      const int position = m_block_ * Traits::kBlockM + row;
      const bool exists = position < q_.length;
      const float dot = row_sum(exists ? partial_dot(position) : 0.f);
      if (threadIdx.x % kRowThreads != 0) continue;
      params_.delta[block + row] = exists ? dot - dlse(position) : 0.f;
      params_.lse_log2[block + row] = exists ? lse_log2(position) : INFINITY;
    }
  }

 private:
  static constexpr int kColumnsPerThread = 8;  // 16 bytes
  static constexpr int kRowThreads = Traits::kHeadDimV <= 64 ? 8 : Traits::kHeadDimV <= 128 ? 16 : 32;

  FA_DEVICE int64_t scratch_row() const {
    const int padded = params_.cu_seqlens_q ? padded_offset(q_.offset, batch_, Traits::kBlockM) : 0;
    return q_.batch * params_.rows_batch_stride + head_ * params_.rows_head_stride + padded +
           m_block_ * Traits::kBlockM;
  }

  FA_DEVICE void clear_dq(int64_t block) const {
    float4* dq = reinterpret_cast<float4*>(params_.dq_blocks + block * Traits::kHeadDim);
    for (int i = threadIdx.x; i < BackwardShape<Traits>::kDqFloats / 4; i += kNumThreads) dq[i] = {0.f, 0.f, 0.f, 0.f};
  }

  FA_DEVICE float partial_dot(int position) const {
    const int column = threadIdx.x % kRowThreads * kColumnsPerThread;
    if (column >= params_.head_dim_v) return 0.f;
    const int64_t row = q_.offset + position;
    const uint4 out = load_columns(params_.out, q_.batch * params_.out_batch_stride + row * params_.out_row_stride +
                                                    head_ * params_.out_head_stride + column);
    const uint4 dout =
        load_columns(params_.dout_rows, q_.batch * params_.dout_batch_stride + row * params_.dout_row_stride +
                                            head_ * params_.dout_head_stride + column);
    return dot_pair(out.x, dout.x) + dot_pair(out.y, dout.y) + dot_pair(out.z, dout.z) + dot_pair(out.w, dout.w);
  }

  FA_DEVICE static uint4 load_columns(const void* tensor, int64_t element) {
    return *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(tensor) + element);
  }

  FA_DEVICE static float dot_pair(uint32_t a, uint32_t b) {
    const float2 x = unpack<Traits::kDtype>(a), y = unpack<Traits::kDtype>(b);
    return fmaf(x.x, y.x, x.y * y.y);
  }

  FA_DEVICE static float row_sum(float value) {
#pragma unroll
    for (int distance = kRowThreads / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
    return value;
  }

  FA_DEVICE float dlse(int position) const {
    if (params_.dlse == nullptr) return 0.f;
    return params_.dlse[batch_ * params_.dlse_batch_stride + head_ * params_.dlse_head_stride + q_.offset + position];
  }

  // A row that sees no key has no weights either.
  FA_DEVICE float lse_log2(int position) const {
    constexpr float kLog2E = 1.4426950408889634f;
    const float lse =
        params_.lse[batch_ * params_.lse_batch_stride + head_ * params_.lse_head_stride + q_.offset + position];
    return lse == -INFINITY ? INFINITY : lse * kLog2E;
  }

  const BackwardParams& params_;
  int m_block_, head_, batch_;
  Sequence q_;
};

}  // namespace fa
