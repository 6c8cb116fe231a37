// What follows from a backward configuration, and the shared-memory plan of its main kernel.
#pragma once

#include "../core/block_range.h"
#include "../core/pipeline.cuh"
#include "../core/ptx.cuh"
#include "../core/seqlen.h"
#include "../core/traits.cuh"
#include "params.h"

namespace fa {

// Wider products would leave no registers for the rest, wider slices no shared memory.
constexpr int kMaxDqSliceColumns = 64;

// The swizzle pattern is a function of the address.
constexpr int kSmemAlignment = 1024;

// Twins of the derived values are in hopper/flash_attn_3/backward_config.py.
template <class Traits>
struct BackwardShape {
  static constexpr int kElementBytes = 2;
  // Consumer warpgroups have 64 keys each with all columns of dk and dv, or share 64 keys and have half of the columns
  // each (bwd/mma_keys.cuh, bwd/mma_columns.cuh).
  static constexpr bool kSplitsColumns = Traits::kSplit == WarpgroupSplit::kColumns;
  static constexpr int kNumConsumerWarpgroups = kSplitsColumns ? 2 : Traits::kBlockN / kWarpgroupRows;
  // CTAs that work on one tile's keys, each on kTileKeys of them and on its part of dq's columns for all of them.
  static constexpr int kClusterSize = kSplitsColumns ? Traits::kBlockN / kWarpgroupRows : 1;
  static constexpr int kTileKeys = Traits::kBlockN / kClusterSize;
  static_assert(kClusterSize <= 2);
  static constexpr int kNumThreads = kWarpgroupThreads * (kNumConsumerWarpgroups + 1);
  static constexpr int kProducerRegisters = register_split(kNumConsumerWarpgroups).producer;
  static constexpr int kConsumerRegisters = register_split(kNumConsumerWarpgroups).consumer;
  static_assert(fits_register_file(kNumConsumerWarpgroups));
  static_assert(!kSplitsColumns || (kTileKeys == kWarpgroupRows && Traits::kBlockM == kWarpgroupRows));

  // Columns of a warpgroup's accumulators.
  static constexpr int kDkColumns = kSplitsColumns ? Traits::kHeadDim / 2 : Traits::kHeadDim;
  static constexpr int kDvColumns = kSplitsColumns ? Traits::kHeadDimV / 2 : Traits::kHeadDimV;

  // Whether the accumulators leave a warpgroup registers for S^T, dP^T and dS^T at once.
  static constexpr bool kScoresTogether = kDkColumns + kDvColumns <= 256;

  // A block of dq, (block_m x head_dim) fp32, is made by all warpgroups: they share its rows, or where it has but one
  // warpgroup's, its columns.
  static constexpr bool kSplitsDqRows = Traits::kBlockM > kWarpgroupRows;
  static constexpr int kNumDqParts = kNumConsumerWarpgroups * kClusterSize;
  static constexpr int kDqColumns = kSplitsDqRows ? Traits::kHeadDim : Traits::kHeadDim / kNumDqParts;
  static_assert(!kSplitsDqRows || Traits::kBlockM == kNumDqParts * kWarpgroupRows);
  static constexpr int kDqPartFloats = kWarpgroupRows * kDqColumns;
  static constexpr int kDqFloats = Traits::kBlockM * Traits::kHeadDim;
  static_assert(kDqFloats == kNumDqParts * kDqPartFloats);
  // Columns of a part that are made at once.
  static constexpr int kDqSliceColumns = kSplitsColumns ? kDqColumns : min_of(kDqColumns, kMaxDqSliceColumns);
  static constexpr int kNumDqSlices = ceil_div(kDqColumns, kDqSliceColumns);
  // What goes through shared memory, of all warpgroups.
  static constexpr int kDqStagedBytes =
      Traits::kDqPath == DqPath::kDirect ? 0 : kNumConsumerWarpgroups * kWarpgroupRows * kDqSliceColumns * 4;

  // Of q and k: a warpgroup's columns of k, for dq, must be whole chunks; of all, a warpgroup's columns of dk and dv.
  static constexpr int kSwizzleBytes = swizzle_bytes(kDqColumns);
  static constexpr int kSwizzleBytesV = swizzle_bytes(kDvColumns);
  static constexpr int kSwizzleBytesDs = swizzle_bytes(Traits::kBlockM);

  static constexpr int kQBytes = Traits::kBlockM * Traits::kHeadDim * kElementBytes;      // one stage
  static constexpr int kDoutBytes = Traits::kBlockM * Traits::kHeadDimV * kElementBytes;  // one stage
  static constexpr int kKBytes = kTileKeys * Traits::kHeadDim * kElementBytes;
  static constexpr int kVBytes = kTileKeys * Traits::kHeadDimV * kElementBytes;
  static constexpr int kDsBytes = kTileKeys * Traits::kBlockM * kElementBytes;  // also of P
  static constexpr int kStatisticsBytes = Traits::kBlockM * 4;                  // one stage of one kind
  // The columns of the other CTA's keys that this one makes dq of.
  static constexpr int kOtherKBytes = kClusterSize == 1 ? 0 : kKBytes / kClusterSize;
  // P, or a second dS; and dS of each CTA, twice where there are two.
  static constexpr int kExchangeBytes = (1 + kClusterSize * kClusterSize) * kDsBytes;

  static constexpr int kStatisticsStages = Traits::kNumStages + Traits::kNumDoutStages;
  static constexpr int kSmemBytes =
      kKBytes + kVBytes + Traits::kNumStages * kQBytes + Traits::kNumDoutStages * kDoutBytes + kExchangeBytes +
      kOtherKBytes + kDqStagedBytes +
      ceil_div(kStatisticsStages * kStatisticsBytes + kControlBytes, kSmemAlignment) * kSmemAlignment;
};

// Tiles announced to the consumers and not yet done with.
constexpr int kKeyTileSlots = 2;

// A block of keys of one head and sequence, and the query blocks that see it.
struct KeyTile {
  int n_block;  // negative: there are no more tiles
  int batch;
  int head_kv;
  int first_head_q, num_heads_q;  // that share the keys, or the tile's part of them
  int key_part;                   // where dk and dv go that others are added to (bwd/key_part.cuh)
  Sequence q;
  Sequence k;
  BlockRange blocks;    // of queries
  int64_t scratch_row;  // where the sequence's rows begin in the scratch, but for the head

  FA_DEVICE bool exists() const { return n_block >= 0; }
};

template <class Traits>
struct BackwardControl {
  SharedRing<Traits::kNumStages, BackwardShape<Traits>::kClusterSize> q;         // with lse_log2, the first with k
  SharedRing<Traits::kNumDoutStages, BackwardShape<Traits>::kClusterSize> dout;  // with delta, the first with v
  Ring<1> dq[BackwardShape<Traits>::kNumConsumerWarpgroups];  // each one's with its adder (bwd/adder.cuh)
  Ring<2> other_ds;  // the other CTA's dS; `empty`: that of this CTA at the other
  Ring<kKeyTileSlots> tiles;
  KeyTile tile[kKeyTileSlots];
  // Counts of one thread each, which has no register for them: of tiles announced, and done with by each adder; of
  // numbers of tiles that passed between two CTAs.
  uint32_t num_announced, num_added[BackwardShape<Traits>::kNumConsumerWarpgroups], num_numbers;
  uint64_t kv_empty;  // k and v, in whose place dk and dv are at the end of a tile
  Ring<1> numbers;    // with two CTAs: of tiles, from the first one's producer to the second one's
  alignas(16) int sent_number[4];
  alignas(16) int received_number[4];
};

// dq on its way to memory.
template <class Traits, DqPath = Traits::kDqPath>
struct DqBuffers {
  using Shape = BackwardShape<Traits>;
  float dq[Shape::kNumConsumerWarpgroups][Shape::kDqStagedBytes / 4 / Shape::kNumConsumerWarpgroups];
};

template <class Traits>
struct DqBuffers<Traits, DqPath::kDirect> {};

// What consumer warpgroups pass on: two buffers of dS^T, kTileKeys rows x block_m queries.
template <class Traits, WarpgroupSplit = Traits::kSplit, int = BackwardShape<Traits>::kClusterSize>
struct WarpgroupExchange : DqBuffers<Traits> {
  uint8_t ds[2][BackwardShape<Traits>::kDsBytes];
};

// One buffer of P^T and one of dS^T, laid out alike.
template <class Traits>
struct WarpgroupExchange<Traits, WarpgroupSplit::kColumns, 1> {
  uint8_t p[BackwardShape<Traits>::kDsBytes];
  uint8_t ds[1][BackwardShape<Traits>::kDsBytes];
};

// With two CTAs: buffers of dS^T of either one, and what goes with the other's.
template <class Traits>
struct WarpgroupExchange<Traits, WarpgroupSplit::kColumns, 2> {
  uint8_t other_k[BackwardShape<Traits>::kOtherKBytes];
  uint8_t p[BackwardShape<Traits>::kDsBytes];
  uint8_t ds[2][BackwardShape<Traits>::kDsBytes];
  uint8_t other_ds[2][BackwardShape<Traits>::kDsBytes];
};

template <class Traits>
struct alignas(kSmemAlignment) BackwardSmem {
  using Shape = BackwardShape<Traits>;

  uint8_t k[Shape::kKBytes];  // at the end of the tile dk, on its way to memory
  uint8_t v[Shape::kVBytes];  // dv
  uint8_t q[Traits::kNumStages][Shape::kQBytes];
  uint8_t dout[Traits::kNumDoutStages][Shape::kDoutBytes];
  WarpgroupExchange<Traits> exchange;
  float lse_log2[Traits::kNumStages][Traits::kBlockM];
  float delta[Traits::kNumDoutStages][Traits::kBlockM];
  union {
    BackwardControl<Traits> control;
    uint8_t control_bytes[kControlBytes];
  };

  static_assert(sizeof(BackwardControl<Traits>) <= kControlBytes, "raise kControlBytes and its Python twin");
};

// The first key of one of a tile's CTAs.
template <class Traits>
FA_DEVICE int first_key(const KeyTile& tile, int rank) {
  return tile.n_block * Traits::kBlockN + rank * BackwardShape<Traits>::kTileKeys;
}

// Of this CTA among those of a tile.
template <class Traits>
FA_DEVICE int tile_rank() {
  return BackwardShape<Traits>::kClusterSize == 1 ? 0 : cluster_rank();
}

// Where a sequence's rows of head 0 begin in the scratch.
template <class Traits>
FA_DEVICE int64_t scratch_row(const BackwardParams& params, const Sequence& q, int batch) {
  if (params.cu_seqlens_q) return padded_offset(q.offset, batch, Traits::kBlockM);
  return batch * params.rows_batch_stride;
}

template <class Traits>
FA_DEVICE Visibility<Traits::kMask> visibility(const BackwardParams& params, const Sequence& q, const Sequence& k) {
  return {q.length, k.length, params.window_left, params.window_right, params.attention_chunk};
}

template <class Traits>
FA_DEVICE Visibility<Traits::kMask> visibility(const BackwardParams& params, const KeyTile& tile) {
  return visibility<Traits>(params, tile.q, tile.k);
}

}  // namespace fa
