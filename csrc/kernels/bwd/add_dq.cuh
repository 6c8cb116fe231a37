// A warpgroup's part of a block of dq, added to memory in the order of the accumulators (postprocess.cuh brings it back
// into rows): thread t's registers i to i + 3 are floats 512 (i / 4) + 4 t and so on of the part.
#pragma once

#include <type_traits>

#include "../core/stage.cuh"
#include "turn.cuh"

namespace fa {

// Where a warpgroup's part lies in memory, and when it is its turn.
template <class Traits>
class DqPart {
 public:
  static constexpr bool kOrdered = Traits::kAccumulation == Accumulation::kOrdered;

  FA_DEVICE DqPart(const BackwardParams& params, BackwardControl<Traits>& control, const KeyTile& tile, int warpgroup)
      : params_(params), control_(control), tile_(tile), warpgroup_(warpgroup) {}

  FA_DEVICE static bool leads() { return threadIdx.x % kWarpgroupThreads == 0; }
  FA_DEVICE int warpgroup() const { return warpgroup_; }

  FA_DEVICE float* address(int head_q, int m_block) const {
    return params_.dq_blocks + row(head_q, m_block) * Traits::kHeadDim + index() * Shape::kDqPartFloats;
  }

  // By the leading thread, with Accumulation::kOrdered only.
  FA_DEVICE void wait_turn(int head_q, int m_block) {
    const BlockRange keys =
        visibility<Traits>(params_, tile_).template blocks<Traits::kBlockM, Traits::kBlockN>(m_block, Packing{0});
    const int64_t part = row(head_q, m_block) / Traits::kBlockM * Shape::kNumDqParts + index();
    turn().wait(params_.dq_turns + part, tile_.n_block - keys.begin);
  }

  FA_DEVICE DqTurn turn() { return DqTurn(control_.turn[warpgroup_]); }

 private:
  using Shape = BackwardShape<Traits>;

  // Among all parts of a block.
  FA_DEVICE int index() const { return tile_rank<Traits>() * Shape::kNumConsumerWarpgroups + warpgroup_; }

  FA_DEVICE int64_t row(int head_q, int m_block) const {
    return tile_.scratch_row + head_q * params_.rows_head_stride + int64_t{m_block} * Traits::kBlockM;
  }

  const BackwardParams& params_;
  BackwardControl<Traits>& control_;
  const KeyTile& tile_;
  int warpgroup_;
};

// DqPath::kStaged: by way of shared memory. The copy engine adds, beside whatever comes next.
template <class Traits>
class StagedDqAdder {
 public:
  FA_DEVICE StagedDqAdder(const DqPart<Traits>& part, WarpgroupExchange<Traits>& exchange)
      : part_(part), buffer_(exchange.dq[part.warpgroup()]) {}

  // Registers from kFirst on of all that the thread has of the part, slice by slice from register 0 on.
  template <int kFirst, int kSize>
  FA_DEVICE void add(const float (&dq)[kSize], int head_q, int m_block) {
    if constexpr (kFirst == 0) {
      end_tile();
    } else if (part_.leads()) {
      cute::tma_store_wait<0>();
    }
    sync_warpgroup(part_.warpgroup());
    float4* to = reinterpret_cast<float4*>(buffer_) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      to[i / 4 * kWarpgroupThreads] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    cutlass::arch::fence_view_async_shared();
    sync_warpgroup(part_.warpgroup());
    if (!part_.leads()) return;
    if constexpr (DqPart<Traits>::kOrdered && kFirst == 0) part_.wait_turn(head_q, m_block);
    bulk_reduce_add(part_.address(head_q, m_block) + kFirst * kWarpgroupThreads, cute::cast_smem_ptr_to_uint(buffer_),
                    kSize * kWarpgroupThreads * 4);
    cute::tma_store_arrive();
  }

  FA_DEVICE void end_step() {}

  // Until the copy engine has read the buffer; with an order of additions until it has added, for the next in line.
  FA_DEVICE void end_tile() {
    if (!part_.leads()) return;
    if constexpr (DqPart<Traits>::kOrdered) {
      part_.turn().pass_on_after_copies();
    } else {
      cute::tma_store_wait<0>();
    }
  }

 private:
  DqPart<Traits> part_;
  float* buffer_;
};

// DqPath::kDirect: straight from registers.
template <class Traits>
class DirectDqAdder {
 public:
  FA_DEVICE DirectDqAdder(const DqPart<Traits>& part, WarpgroupExchange<Traits>&) : part_(part) {}

  template <int kFirst, int kSize>
  FA_DEVICE void add(const float (&dq)[kSize], int head_q, int m_block) {
    if constexpr (DqPart<Traits>::kOrdered && kFirst == 0) {
      if (part_.leads()) part_.wait_turn(head_q, m_block);
      sync_warpgroup(part_.warpgroup());
    }
    float* const to = part_.address(head_q, m_block) + threadIdx.x % kWarpgroupThreads * 4;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      reduce_add(to + (kFirst + i) * kWarpgroupThreads, make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]));
    }
  }

  // With an order of additions: until all threads' are done in memory, for the next in line.
  FA_DEVICE void end_step() {
    if constexpr (DqPart<Traits>::kOrdered) {
      __threadfence();
      sync_warpgroup(part_.warpgroup());
      if (part_.leads()) part_.turn().pass_on();
    }
  }

  FA_DEVICE void end_tile() {}

 private:
  DqPart<Traits> part_;
};

template <class Traits>
using DqAdder = std::conditional_t<Traits::kDqPath == DqPath::kStaged, StagedDqAdder<Traits>, DirectDqAdder<Traits>>;

}  // namespace fa
