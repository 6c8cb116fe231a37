// The adder: takes one consumer warpgroup's parts of dq from shared memory and has the copy engine add them to memory,
// so that the warpgroup waits for neither that nor its turn.
#pragma once

#include "../core/copy.cuh"
#include "dq_part.cuh"
#include "query_order.cuh"

namespace fa {

// With DqPath::kStaged.
template <class Traits>
class DqAdder {
 public:
  FA_DEVICE DqAdder(const BackwardParams& params, BackwardSmem<Traits>& smem, const KeyTile& tile, int warpgroup)
      : tile_(tile),
        part_(params, tile, warpgroup),
        ring_(smem.control.dq[warpgroup]),
        buffer_(cute::cast_smem_ptr_to_uint(smem.exchange.dq[warpgroup])) {}

  // By one thread.
  FA_DEVICE void run() {
    uint32_t step = 0;
    for (int head = 0; head < tile_.num_heads_q; ++head) {
      for_each_query_block<Traits>(tile_.blocks.begin, tile_.blocks.end, [&](int m_block) {
        add({tile_.first_head_q + head, m_block, step});
        ++step;
      });
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  FA_DEVICE void add(const DqBlock& block) {
    int32_t* counter = nullptr;
    DqTurn turn(counter);
    add_slice<0, Shape::kDqSliceColumns>(block, turn);
    if constexpr (Shape::kNumDqSlices > 1) {
      add_slice<1, Shape::kDqColumns - Shape::kDqSliceColumns>(block, turn);
    }
    if constexpr (DqPart<Traits>::kOrdered) turn.pass_on_after_copies();
  }

  template <int kSlice, int kColumns>
  FA_DEVICE void add_slice(const DqBlock& block, DqTurn& turn) {
    constexpr int kFirstFloat = kSlice * Shape::kDqSliceColumns * kWarpgroupRows;
    const RingState<1> at = block.slice<Traits>(kSlice);
    ring_.wait_full(at);
    if constexpr (DqPart<Traits>::kOrdered && kSlice == 0) part_.wait_turn(turn, block);
    bulk_reduce_add(part_.address(block) + kFirstFloat, buffer_, kColumns * kWarpgroupRows * 4);
    cute::tma_store_arrive();
    cute::tma_store_wait<0>();
    ring_.release(at);
  }

  const KeyTile& tile_;
  DqPart<Traits> part_;
  Ring<1>& ring_;
  uint32_t buffer_;
};

}  // namespace fa
