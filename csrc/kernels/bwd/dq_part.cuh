// A warpgroup's part of a block of dq in memory, in the order of the accumulators (postprocess.cuh brings it back into
// rows): thread t's registers i to i + 3 are floats 512 (i / 4) + 4 t and so on of the part.
#pragma once

#include "turn.cuh"

namespace fa {

// One block of queries of one head.
struct DqBlock {
  int head_q;
  int m_block;
  uint32_t step;  // at which the tile works on it, from 0 on

  // Which use of a warpgroup's buffer its `index`-th slice is.
  template <class Traits>
  FA_DEVICE RingState<1> slice(int index) const {
    return {step * BackwardShape<Traits>::kNumDqSlices + index};
  }
};

// Where a warpgroup's part lies in memory, and whose turn it is with it.
template <class Traits>
class DqPart {
 public:
  static constexpr bool kOrdered = Traits::kAccumulation == Accumulation::kOrdered;
  // The first block of keys stores, so that there need be no zeros before, and all others wait for that.
  static constexpr bool kFirstStores = Traits::kDqPath == DqPath::kStaged;
  static constexpr bool kTakesTurns = kOrdered || kFirstStores;

  FA_DEVICE DqPart(const BackwardParams& params, const KeyTile& tile, int warpgroup)
      : params_(params), tile_(tile), warpgroup_(warpgroup) {}

  FA_DEVICE float* address(const DqBlock& block) const {
    return params_.dq_blocks + row(block) * Traits::kHeadDim + index() * Shape::kDqPartFloats;
  }

  // With kTakesTurns only.
  FA_DEVICE DqTurn turn(const DqBlock& block) const {
    const int64_t part = row(block) / Traits::kBlockM * Shape::kNumDqParts + index();
    return DqTurn(params_.dq_turns + part);
  }

  // Blocks of keys that add to the part before this one.
  FA_DEVICE int predecessors(const DqBlock& block) const {
    const BlockRange keys =
        visibility<Traits>(params_, tile_).template blocks<Traits::kBlockN>(block.m_block, Traits::kBlockM);
    return tile_.n_block - keys.begin;
  }

 private:
  using Shape = BackwardShape<Traits>;

  // Among all parts of a block.
  FA_DEVICE int index() const { return tile_rank<Traits>() * Shape::kNumConsumerWarpgroups + warpgroup_; }

  FA_DEVICE int64_t row(const DqBlock& block) const {
    return tile_.scratch_row + block.head_q * params_.rows_head_stride + int64_t{block.m_block} * Traits::kBlockM;
  }

  const BackwardParams& params_;
  const KeyTile& tile_;
  int warpgroup_;
};

}  // namespace fa
