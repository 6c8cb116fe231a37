// How consumer warpgroups hand over their parts of dq.
#pragma once

#include <type_traits>

#include "../core/stage.cuh"
#include "dq_part.cuh"

namespace fa {

// By one lane of each warp: the warpgroup's adder hears that the warp has written.
FA_DEVICE void tell_adder(Ring<1>& ring) {
  __syncwarp();
  if (threadIdx.x % kWarpThreads == 0) Barrier::arrive(&ring.full[0]);
}

// DqPath::kStaged: to shared memory, slice by slice, from where the warpgroup's adder takes them (adder.cuh).
template <class Traits>
class StagedDq {
 public:
  FA_DEVICE StagedDq(const BackwardParams&, BackwardSmem<Traits>& smem, const KeyTile&, int warpgroup)
      : ring_(smem.control.dq[warpgroup]), buffer_(smem.exchange.dq[warpgroup]) {}

  // Registers from kFirst on of all that the thread has of the part.
  template <int kFirst, int kSize>
  FA_DEVICE void add(const float (&dq)[kSize], const DqBlock& block) {
    ring_.wait_empty(block.slice<Traits>(kFirst == 0 ? 0 : 1));
    float4* const to = reinterpret_cast<float4*>(buffer_) + threadIdx.x % kWarpgroupThreads;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      to[i / 4 * kWarpgroupThreads] = make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
    }
    cutlass::arch::fence_view_async_shared();
    tell_adder(ring_);
  }

  FA_DEVICE void end_step() {}

 private:
  Ring<1>& ring_;
  float* buffer_;
};

// DqPath::kDirect: straight from registers to memory; with an order of additions when the adder says so.
template <class Traits>
class DirectDq {
 public:
  FA_DEVICE DirectDq(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup)
      : part_(params, tile, warpgroup), ring_(smem.control.dq[warpgroup]) {}

  template <int kFirst, int kSize>
  FA_DEVICE void add(const float (&dq)[kSize], const DqBlock& block) {
    if constexpr (DqPart<Traits>::kOrdered && kFirst == 0) {
      Barrier::wait(&ring_.empty[0], RingState<1>{block.step}.phase());
    }
    float* const to = part_.address(block) + threadIdx.x % kWarpgroupThreads * 4;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      reduce_add(to + (kFirst + i) * kWarpgroupThreads, make_float4(dq[i], dq[i + 1], dq[i + 2], dq[i + 3]));
    }
  }

  FA_DEVICE void end_step() {
    if constexpr (DqPart<Traits>::kOrdered) tell_adder(ring_);
  }

 private:
  DqPart<Traits> part_;
  Ring<1>& ring_;
};

template <class Traits>
using DqOutput = std::conditional_t<Traits::kDqPath == DqPath::kStaged, StagedDq<Traits>, DirectDq<Traits>>;

}  // namespace fa
