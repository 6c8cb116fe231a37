// The shared-memory plan of the forward kernel; README.md beside csrc/kernels draws it.
#pragma once

#include "../core/block_range.h"
#include "../core/pipeline.cuh"
#include "../core/seqlen.h"
#include "../core/traits.cuh"

namespace fa {

// One unit of work: a block of query rows of one head, and one pass over the value columns.
struct WorkTile {
  int m_block;  // kNoMoreWork: the CTA is done
  int batch;
  int head_q;  // the first of those packed together
  int head_kv;
  int value_pass;
  Sequence q;
  Sequence k;
  // Blocks of keys that the tile visits, and those of them that a warpgroup's 64 rows need. At least one each, which
  // may be masked as a whole.
  KeyRange visited;
  BlockRange needed[kMaxConsumerWarpgroups];

  static constexpr int kNoMoreWork = -1;

  FA_DEVICE bool exists() const { return m_block != kNoMoreWork; }
};

template <class Traits>
struct ForwardControl {
  Ring<Traits::kNumQStages> q[ForwardShape<Traits>::kNumConsumerWarpgroups];  // each warpgroup's 64 rows
  SharedRing<Traits::kNumStages, Traits::kClusterSize> k;
  SharedRing<Traits::kNumStages, Traits::kClusterSize> v;
  Ring<kTileSlots> tiles;
  WorkTile tile[kTileSlots];
};

// Tiles need 1024-byte alignment: the swizzle pattern is a function of the address. All their sizes are multiples of
// 1024, so that the first member's alignment carries through.
template <class Traits>
struct alignas(1024) ForwardSmem {
  using Shape = ForwardShape<Traits>;

  uint8_t q[Traits::kNumQStages][Shape::kNumConsumerWarpgroups][Shape::kQBytes / Shape::kNumConsumerWarpgroups];
  uint8_t k[Traits::kNumStages][Shape::kKBytes];
  uint8_t v[Traits::kNumStages][Shape::kVBytes];
  uint8_t o[Shape::kOwnOutputBuffer ? Shape::kNumConsumerWarpgroups : 0]
           [Shape::kOBytes / Shape::kNumConsumerWarpgroups];
  union {
    ForwardControl<Traits> control;
    uint8_t control_bytes[kControlBytes];
  };

  // Where warpgroup `warpgroup` stages its output rows.
  FA_DEVICE uint8_t* output(int warpgroup) {
    if constexpr (Shape::kOwnOutputBuffer) return o[warpgroup];
    return q[0][warpgroup];
  }

  static_assert(sizeof(ForwardControl<Traits>) <= kControlBytes, "raise kControlBytes and its Python twin");
  static_assert(Shape::kKBytes % 1024 == 0 && Shape::kVBytes % 1024 == 0, "stages must keep the swizzle's alignment");
};

}  // namespace fa
