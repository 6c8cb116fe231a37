// What follows from a backward configuration, and the shared-memory plan of its main kernel.
#pragma once

#include "../core/block_range.h"
#include "../core/pipeline.cuh"
#include "../core/seqlen.h"
#include "../core/traits.cuh"
#include "params.h"

namespace fa {

// Twins of the derived values are in hopper/flash_attn_3/backward_config.py.
template <class Traits>
struct BackwardShape {
  static constexpr int kElementBytes = 2;
  static constexpr int kNumConsumerWarpgroups = Traits::kBlockN / kWarpgroupRows;
  static constexpr int kNumThreads = kWarpgroupThreads * (kNumConsumerWarpgroups + 1);
  static constexpr int kProducerRegisters = register_split(kNumConsumerWarpgroups).producer;
  static constexpr int kConsumerRegisters = register_split(kNumConsumerWarpgroups).consumer;
  static_assert(fits_register_file(kNumConsumerWarpgroups));

  // A block of dq, (block_m x head_dim) fp32, is made by all warpgroups: they share its rows, or where it has but one
  // warpgroup's, its columns.
  static constexpr bool kSplitsDqRows = Traits::kBlockM > kWarpgroupRows;
  static constexpr int kDqColumns = kSplitsDqRows ? Traits::kHeadDim : Traits::kHeadDim / kNumConsumerWarpgroups;
  static_assert(!kSplitsDqRows || Traits::kBlockM == kNumConsumerWarpgroups * kWarpgroupRows);
  static constexpr int kDqFloats = Traits::kBlockM * Traits::kHeadDim;
  static constexpr int kDqBytes = kDqFloats * 4;

  // Of q and k: a warpgroup's columns of k, for dq, must be whole chunks.
  static constexpr int kSwizzleBytes = swizzle_bytes(kDqColumns);
  static constexpr int kSwizzleBytesV = swizzle_bytes(Traits::kHeadDimV);
  static constexpr int kSwizzleBytesDs = swizzle_bytes(Traits::kBlockM);

  static constexpr int kQBytes = Traits::kBlockM * Traits::kHeadDim * kElementBytes;      // one stage
  static constexpr int kDoutBytes = Traits::kBlockM * Traits::kHeadDimV * kElementBytes;  // one stage
  static constexpr int kKBytes = Traits::kBlockN * Traits::kHeadDim * kElementBytes;
  static constexpr int kVBytes = Traits::kBlockN * Traits::kHeadDimV * kElementBytes;
  static constexpr int kDsBytes = Traits::kBlockN * Traits::kBlockM * kElementBytes;  // one stage
  static constexpr int kStatisticsBytes = Traits::kBlockM * 4;                        // one stage of one kind

  static constexpr int kSmemBytes = kKBytes + kVBytes + Traits::kNumStages * (kQBytes + kDoutBytes) + 2 * kDsBytes +
                                    kDqBytes + Traits::kNumStages * 2 * kStatisticsBytes + kControlBytes;
};

// A block of keys of one head and sequence, and the query blocks that see it.
struct KeyTile {
  int n_block;
  int batch;
  int head_kv;
  Sequence q;
  Sequence k;
  BlockRange blocks;    // of queries
  int64_t scratch_row;  // where the sequence's rows begin in the scratch, but for the head
};

template <class Traits>
struct BackwardControl {
  uint64_t k_full, v_full;
  Ring<Traits::kNumStages> q;     // with lse_log2
  Ring<Traits::kNumStages> dout;  // with delta
  // With Accumulation::kOrdered:
  int tile;                                                      // the CTA's
  int32_t* turn[BackwardShape<Traits>::kNumConsumerWarpgroups];  // bwd/turn.cuh
};

template <class Traits>
struct alignas(1024) BackwardSmem {
  using Shape = BackwardShape<Traits>;

  uint8_t k[Shape::kKBytes];  // at the end of the tile dk, on its way to memory
  uint8_t v[Shape::kVBytes];  // dv
  uint8_t q[Traits::kNumStages][Shape::kQBytes];
  uint8_t dout[Traits::kNumStages][Shape::kDoutBytes];
  uint8_t ds[2][Shape::kDsBytes];  // block_n rows of keys x block_m queries
  float dq[Shape::kNumConsumerWarpgroups][Shape::kDqFloats / Shape::kNumConsumerWarpgroups];
  float lse_log2[Traits::kNumStages][Traits::kBlockM];
  float delta[Traits::kNumStages][Traits::kBlockM];
  union {
    BackwardControl<Traits> control;
    uint8_t control_bytes[kControlBytes];
  };

  static_assert(sizeof(BackwardControl<Traits>) <= kControlBytes, "raise kControlBytes and its Python twin");
};

// Where a sequence's rows of head 0 begin in the scratch.
template <class Traits>
FA_DEVICE int64_t scratch_row(const BackwardParams& params, const Sequence& q, int batch) {
  if (params.cu_seqlens_q) return padded_offset(q.offset, batch, Traits::kBlockM);
  return batch * params.rows_batch_stride;
}

template <class Traits>
FA_DEVICE Visibility<Traits::kMask> visibility(const BackwardParams& params, const KeyTile& tile) {
  return {tile.q.length, tile.k.length, params.window_left, params.window_right, params.attention_chunk};
}

}  // namespace fa
