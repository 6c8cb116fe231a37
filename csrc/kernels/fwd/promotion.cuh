// The second level of the output's accumulation.
//
// The tensor cores truncate what they accumulate, always towards zero: each addition takes up to 2^-23 off the output,
// which is 1 % after some millions of keys. So a tile that has seen kPromotionKeys keys adds its output to a copy in
// memory, where sums are rounded, and begins again from zero. Shorter sequences never come here.
#pragma once

#include "../core/fragment.cuh"
#include "../core/ptx.cuh"
#include "../core/traits.cuh"
#include "../params.h"

namespace fa {

// One thread's part of the copy: its fragment of the output and the references of its rows. A thread reads nothing but
// what it wrote, so nobody waits for anybody. Neighbours in a warp are neighbours in memory.
template <class Traits>
class PromotedOutput {
 public:
  using Fragment = float[Traits::kHeadDimV / 2];
  using References = float[kRowsPerThread];

  FA_DEVICE explicit PromotedOutput(const ForwardParams& params) : params_(params) {}

  // Key blocks between two additions.
  FA_DEVICE int blocks() const {
    constexpr int kBlocks = kPromotionKeys / Traits::kBlockN;
    return params_.promoted_out == nullptr ? kUnlimitedBlocks : kBlocks;
  }

  // Moves `out`, relative to `references` (unscaled scores), to memory.
  FA_DEVICE void promote(Fragment& out, const References& references) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) *at(i) = out[i];
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) *at(kSize + row) = references[row];
    clear_fragment(out);
  }

  // Brings back what was promoted last.
  FA_DEVICE void add_promoted(Fragment& out, const References& references) const {
    float correction[kRowsPerThread];
#pragma unroll
    for (int row = 0; row < kRowsPerThread; ++row) {
      const float older = *at(kSize + row);
      // Equal also where both are -inf: no visible key so far.
      correction[row] = older == references[row] ? 1.f : exp2_approx((older - references[row]) * params_.exp2_scale);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = fmaf(*at(i), correction[register_row(i)], out[i]);
  }

 private:
  static constexpr int kSize = Traits::kHeadDimV / 2;
  static constexpr int kUnlimitedBlocks = 1 << 30;
  static constexpr int kThreads = ForwardShape<Traits>::kNumConsumerWarpgroups * kWarpgroupThreads;
  static_assert(ForwardShape<Traits>::kPromotedFloats == (kSize + kRowsPerThread) * kThreads);

  FA_DEVICE float* at(int i) const {
    const int thread = int(threadIdx.x) - kWarpgroupThreads;  // the producer's warpgroup comes first
    return params_.promoted_out + int64_t(blockIdx.x) * ForwardShape<Traits>::kPromotedFloats + i * kThreads + thread;
  }

  const ForwardParams& params_;
};

}  // namespace fa
