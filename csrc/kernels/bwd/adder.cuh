// The adder of a consumer warpgroup: has its parts of dq added to memory, and waits for its turns to add them, so that
// the warpgroup waits for neither the copy engine nor memory.
#pragma once

#include "../core/copy.cuh"
#include "dq_part.cuh"
#include "query_order.cuh"

namespace fa {

template <class Traits>
class DqAdder {
 public:
  static constexpr bool kStaged = Traits::kDqPath == DqPath::kStaged;
  static constexpr bool kOrdered = DqPart<Traits>::kOrdered;
  // Otherwise the warpgroups add by themselves, whenever they like.
  static constexpr bool kNeeded = DqPart<Traits>::kTakesTurns;

  FA_DEVICE DqAdder(const BackwardParams& params, BackwardSmem<Traits>& smem, int warpgroup)
      : params_(params), smem_(smem), warpgroup_(warpgroup), ring_(smem.control.dq[warpgroup]) {}

  // By one thread.
  FA_DEVICE void run() {
    uint32_t step = 0;
    for (; await_tile(); end_tile()) {
      for (int head = 0; head < tile().num_heads_q; ++head) {
        for_each_query_block(tile().blocks.begin, tile().blocks.end, [&](int m_block) {
          const DqBlock block{tile().first_head_q + head, m_block, step};
          if constexpr (kStaged) {
            add(block);
          } else {
            let_add(block);
          }
          ++step;
        });
      }
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  // Read again where they are needed: registers are scarce.
  FA_DEVICE RingState<kKeyTileSlots> tiles() const { return {smem_.control.num_added[warpgroup_]}; }
  FA_DEVICE const KeyTile& tile() const { return smem_.control.tile[tiles().index()]; }
  FA_DEVICE DqPart<Traits> part() const { return {params_, tile(), warpgroup_}; }

  // Whether there is one.
  FA_DEVICE bool await_tile() {
    smem_.control.tiles.wait_full(tiles());
    return tile().exists();
  }

  FA_DEVICE void end_tile() {
    smem_.control.tiles.release(tiles());
    ++smem_.control.num_added[warpgroup_];
  }

  // DqPath::kStaged. The turn comes while the warpgroup still computes.
  FA_DEVICE void add(const DqBlock& block) {
    const int predecessors = part().predecessors(block);
    if (predecessors > 0) {
      part().turn(block).wait(kOrdered ? predecessors : 1);
      fence_proxies();
    }
    add_slice<0, Shape::kDqSliceColumns>(block, predecessors);
    if constexpr (Shape::kNumDqSlices > 1)
      add_slice<1, Shape::kDqColumns - Shape::kDqSliceColumns>(block, predecessors);
    if (kOrdered || predecessors == 0) {
      // In memory, not only read from shared memory.
      wait_bulk_groups_done();
      fence_proxies();
      part().turn(block).pass_on();
    }
  }

  template <int kSlice, int kColumns>
  FA_DEVICE void add_slice(const DqBlock& block, int predecessors) {
    constexpr int kFirstFloat = kSlice * Shape::kDqSliceColumns * kWarpgroupRows;
    const RingState<1> at = block.slice<Traits>(kSlice);
    ring_.wait_full(at);
    float* const to = part().address(block) + kFirstFloat;
    const float* const from = smem_.exchange.dq[warpgroup_];
    constexpr int kBytes = kColumns * kWarpgroupRows * 4;
    if (predecessors == 0) {
      cute::SM90_BULK_COPY_S2G::copy(from, to, kBytes);
    } else {
      bulk_reduce_add(to, cute::cast_smem_ptr_to_uint(from), kBytes);
    }
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
    ring_.release(at);
  }

  // DqPath::kDirect with an order of additions: the warpgroup waits for `empty`, and tells when it has added.
  FA_DEVICE void let_add(const DqBlock& block) {
    const RingState<1> at{block.step};
    const int predecessors = part().predecessors(block);  // first: registers are scarce
    part().turn(block).wait(predecessors);
    ring_.release(at);
    ring_.wait_full(at);
    part().turn(block).pass_on();
  }

  const BackwardParams& params_;
  BackwardSmem<Traits>& smem_;
  int warpgroup_;
  Ring<1>& ring_;
};

}  // namespace fa
