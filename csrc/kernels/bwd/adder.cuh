// The adder of a consumer warpgroup: has its parts of dq added to memory, or waits for its turns to add them, so that
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
  static constexpr bool kNeeded = kStaged || kOrdered;

  FA_DEVICE DqAdder(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup)
      : smem_(smem),
        tile_(tile),
        warpgroup_(warpgroup),
        part_(params, tile, warpgroup),
        ring_(smem.control.dq[warpgroup]) {}

  // By one thread.
  FA_DEVICE void run() {
    uint32_t step = 0;
    for (int head = 0; head < tile_.num_heads_q; ++head) {
      for_each_query_block<Traits>(tile_.blocks.begin, tile_.blocks.end, [&](int m_block) {
        const DqBlock block{tile_.first_head_q + head, m_block, step};
        if constexpr (kStaged) {
          add(block);
        } else {
          let_add(block);
        }
        ++step;
      });
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  // DqPath::kStaged.
  FA_DEVICE void add(const DqBlock& block) {
    const int predecessors = kOrdered ? part_.predecessors(block) : 0;
    add_slice<0, Shape::kDqSliceColumns>(block, predecessors);
    if constexpr (Shape::kNumDqSlices > 1)
      add_slice<1, Shape::kDqColumns - Shape::kDqSliceColumns>(block, predecessors);
    if constexpr (kOrdered) {
      // In memory, not only read from shared memory.
      wait_bulk_groups_done();
      fence_proxies();
      part_.turn(block).pass_on();
    }
  }

  template <int kSlice, int kColumns>
  FA_DEVICE void add_slice(const DqBlock& block, int predecessors) {
    constexpr int kFirstFloat = kSlice * Shape::kDqSliceColumns * kWarpgroupRows;
    const RingState<1> at = block.slice<Traits>(kSlice);
    ring_.wait_full(at);
    if constexpr (kOrdered && kSlice == 0) {
      part_.turn(block).wait(predecessors);
      fence_proxies();
    }
    float* const to = part_.address(block) + kFirstFloat;
    const float* const from = smem_.exchange.dq[warpgroup_];
    constexpr int kBytes = kColumns * kWarpgroupRows * 4;
    if (DqPart<Traits>::kFirstStores && predecessors == 0) {
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
    const int predecessors = part_.predecessors(block);  // first: registers are scarce
    part_.turn(block).wait(predecessors);
    ring_.release(at);
    ring_.wait_full(at);
    part_.turn(block).pass_on();
  }

  BackwardSmem<Traits>& smem_;
  const KeyTile& tile_;
  int warpgroup_;
  DqPart<Traits> part_;
  Ring<1>& ring_;
};

}  // namespace fa
