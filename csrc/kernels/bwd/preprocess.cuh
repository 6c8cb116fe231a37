// Before the main kernel: the row statistics that it reads, the zeros that it adds dq to (where its first addition is
// not a store), and the gradients of rows that take part in nothing.
//
// One CTA for each block of query rows of one head and sequence, and with variable lengths kUnusedRowCtas more for each
// sequence.
#pragma once

#include "../core/fragment.cuh"
#include "dq_part.cuh"
#include "query_block.cuh"
#include "unused_rows.cuh"

namespace fa {

template <class Traits>
class Preprocess {
 public:
  static constexpr int kNumThreads = 256;

  FA_DEVICE explicit Preprocess(const BackwardParams& params) : params_(params) {}

  FA_DEVICE void run() {
    const int num_blocks = params_.num_query_blocks;
    if (Traits::kSeqLayout == SeqLayout::kVarlen && int(blockIdx.x) >= num_blocks) {
      return UnusedRows<Traits>(params_, blockIdx.x - num_blocks).clear();
    }
    // The last ones first: the main kernel finds in the L2 cache what it begins with.
    block_ = query_block<Traits>(params_, num_blocks - 1 - int(blockIdx.x));
    if (block_.m_block * Traits::kBlockM >= block_.q.length) return;
    if (!DqPart<Traits>::kFirstStores || sees_no_key()) clear_dq();
    if constexpr (DqPart<Traits>::kTakesTurns) clear_turns();
    // The same number of passes for all threads: rows are summed by neighbours together.
    for (int row = threadIdx.x / kRowThreads; row < Traits::kBlockM; row += kNumThreads / kRowThreads) {
      write_statistics(block_.scratch_row + row, block_.m_block * Traits::kBlockM + row);
    }
  }

 private:
  using Shape = BackwardShape<Traits>;
  static constexpr int kColumnsPerThread = 8;  // 16 bytes
  // A power of two, of which some may have no columns.
  static constexpr int kRowThreads = Traits::kHeadDimV <= 64 ? 8 : Traits::kHeadDimV <= 128 ? 16 : 32;
  static_assert(kRowThreads * kColumnsPerThread >= Traits::kHeadDimV);
  static_assert(kWarpThreads % kRowThreads == 0 && Traits::kBlockM % (kNumThreads / kRowThreads) == 0);

  FA_DEVICE void clear_dq() const {
    float4* dq = reinterpret_cast<float4*>(params_.dq_blocks + block_.scratch_row * Traits::kHeadDim);
    for (int i = threadIdx.x; i < Shape::kDqFloats / 4; i += kNumThreads) dq[i] = {0.f, 0.f, 0.f, 0.f};
  }

  FA_DEVICE void clear_turns() const {
    int32_t* turns = params_.dq_turns + block_.scratch_row / Traits::kBlockM * Shape::kNumDqParts;
    if (threadIdx.x < Shape::kNumDqParts) turns[threadIdx.x] = 0;
  }

  // None of the block's rows.
  FA_DEVICE bool sees_no_key() const {
    const Sequence k = key_sequence<Traits::kSeqLayout>(params_, block_.batch);
    return visibility<Traits>(params_, block_.q, k)
        .template blocks<Traits::kBlockN>(block_.m_block, Traits::kBlockM)
        .empty();
  }

  // Of rows that do not exist, too: the main kernel reads whole blocks.
  FA_DEVICE void write_statistics(int64_t scratch_row, int position) const {
    const bool exists = position < block_.q.length;
    const float dot = row_sum(exists ? partial_dot(position) : 0.f);
    if (threadIdx.x % kRowThreads != 0) return;
    const float lse =
        exists ? params_.lse[statistic(params_.lse_batch_stride, params_.lse_head_stride, position)] : -INFINITY;
    // The results of a row that sees no key are constants, whatever dlse is, and it has no weights. Its dout must be
    // finite all the same: the products multiply it by these.
    const bool sees_keys = lse != -INFINITY;
    constexpr float kLog2E = 1.4426950408889634f;
    params_.delta[scratch_row] = sees_keys ? dot - dlse(position) : 0.f;
    params_.lse_log2[scratch_row] = sees_keys ? lse * kLog2E : INFINITY;
  }

  FA_DEVICE float partial_dot(int position) const {
    const int column = threadIdx.x % kRowThreads * kColumnsPerThread;
    if (column >= params_.head_dim_v) return 0.f;
    const uint4 out = load_columns(block_.row(params_.out, position) + column);
    const uint4 dout = load_columns(block_.row(params_.dout_rows, position) + column);
    return dot_pair(out.x, dout.x) + dot_pair(out.y, dout.y) + dot_pair(out.z, dout.z) + dot_pair(out.w, dout.w);
  }

  FA_DEVICE static uint4 load_columns(const uint16_t* address) { return *reinterpret_cast<const uint4*>(address); }

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
    return params_.dlse[statistic(params_.dlse_batch_stride, params_.dlse_head_stride, position)];
  }

  // Where lse and its gradient hold a row's.
  FA_DEVICE int64_t statistic(int64_t batch_stride, int64_t head_stride, int position) const {
    return block_.q.batch * batch_stride + block_.head * head_stride + block_.q.offset + position;
  }

  const BackwardParams& params_;
  QueryBlock block_;
};

}  // namespace fa
