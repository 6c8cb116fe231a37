// Which tile a CTA works on next. Run by one whole warp, which announces the tiles to everybody else.
#pragma once

#include "block_range.h"
#include "enums.h"
#include "length_classes.cuh"
#include "packing.h"
#include "schedule.h"
#include "seqlen.h"
#include "tile_counter.cuh"

namespace fa {

// Where a tile lies: a query block (or one for each CTA of a cluster, in a row) of a (head, value pass) pair of one
// sequence.
struct ScheduledTile {
  bool valid;
  int batch;
  TilePosition position;
};

// Who takes which tile. All functions are called by whole warps.
template <int kClusterSize>
class TileQueue;

// Tiles go to whichever CTA is free.
template <>
class TileQueue<1> {
 public:
  // The next tile's index: a CTA's first is its own number, the others come from the launch's counter. The one after it
  // is asked for at once, so that its way to memory and back passes while this tile is loaded.
  FA_DEVICE int take(TileCounter* counter) {
    const int index = __shfl_sync(~0u, next_, 0);
    if (threadIdx.x % kWarpThreads == 0) next_ = int(gridDim.x) + take_number(counter);
    return index;
  }

  // To be called once, after the last take().
  FA_DEVICE static void close(TileCounter* counter) {
    if (threadIdx.x % kWarpThreads == 0) close_counter(counter, int(gridDim.x));
  }

 private:
  int next_ = int(blockIdx.x);  // of lane 0
};

// The CTAs of a cluster must work on the same keys, so that they take the same number: each cluster one out of as many
// as there are clusters, whether it is free or not. That serves tiles that take equally long, of Mask::kFull and equal
// lengths; of variable ones the result would be right, but not in time, and the planner asks for no such kernel.
template <int kClusterSize>
class TileQueue {
 public:
  FA_DEVICE int take(TileCounter*) {
    const int index = next_;
    next_ += int(gridDim.x) / kClusterSize;
    return index;
  }

  FA_DEVICE static void close(TileCounter*) {}

 private:
  int next_ = int(blockIdx.x) / kClusterSize;
};

// What the queries of a sequence are cut into: a block for each CTA of a cluster.
template <class Traits>
FA_DEVICE int scheduled_m_blocks(const ForwardParams& params, int length) {
  return ceil_div(params.packing.warpgroups(length), Traits::kBlockM / kWarpgroupRows * Traits::kClusterSize);
}

// What the tiles of a sequence are numbered over, beside query blocks: (group of packed heads, value pass) pairs.
FA_DEVICE int scheduled_heads(const ForwardParams& params) {
  return params.packing.heads.divide(params.heads_q) * params.num_value_passes;
}

template <class Traits, SeqLayout kSeqLayout = Traits::kSeqLayout>
class Scheduler;

// Equal lengths: tiles are numbered over all (batch, head, value pass) triples.
template <class Traits>
class Scheduler<Traits, SeqLayout::kDense> {
 public:
  FA_DEVICE explicit Scheduler(const ForwardParams&) {}

  // Counts are derived anew each time: the producer has few registers.
  FA_DEVICE ScheduledTile next(const ForwardParams& params) {
    const int num_heads = scheduled_heads(params);
    const int num_m_blocks = scheduled_m_blocks<Traits>(params, params.seqlen_q);
    const int index = queue_.take(params.tile_counter);
    if (index >= num_m_blocks * num_heads * params.batch) return {false, 0, {}};
    TilePosition position = tile_position<Traits::kMask>(
        index, num_m_blocks, num_heads * params.batch, {params.heads_per_section, params.least_heads_in_last_section});
    const int batch = position.head / num_heads;
    position.head -= batch * num_heads;
    return {true, batch, position};
  }

  FA_DEVICE void close(const ForwardParams& params) { Queue::close(params.tile_counter); }

 private:
  using Queue = TileQueue<Traits::kClusterSize>;

  Queue queue_;
};

// Lengths known to the device alone: tiles are numbered sequence by sequence, and the warp scans 32 sequences at a
// time for the one that holds its next index. Indices only grow, so the scan never goes back.
//
// Tiles of sequences with many keys take longest, and none should be left for the end: of the 32, those with the most
// keys come first, and a batch of more is gone over once for each class of lengths in it.
template <class Traits>
class Scheduler<Traits, SeqLayout::kVarlen> {
 public:
  FA_DEVICE explicit Scheduler(const ForwardParams& params) : classes_(find_classes(params)) {}

  // One loop, and all that decides on its course known to be the same in the warp: else the producer's counters, too,
  // would take vector registers, which it does not have.
  FA_DEVICE ScheduledTile next(const ForwardParams& params) {
    const int index = queue_.take(params.tile_counter);
    const int lane = threadIdx.x % kWarpThreads;
    const int num_heads = scheduled_heads(params);
    for (;;) {
      const int m_blocks = sequence_ == kNone ? 0 : num_m_blocks(params, sequence_);
      const int tiles_up_to = inclusive_scan(m_blocks * num_heads, lane);
      const unsigned ends_after = __ballot_sync(~0u, tiles_before_ + tiles_up_to > index);
      if (ends_after != 0) {
        const int owner = __ffs(int(ends_after)) - 1;
        const int owner_blocks = __shfl_sync(~0u, m_blocks, owner);
        const int owner_begin = tiles_before_ + __shfl_sync(~0u, tiles_up_to, owner) - owner_blocks * num_heads;
        const int batch = __shfl_sync(~0u, sequence_, owner);
        return {true, batch, position(params, batch, index - owner_begin, owner_blocks)};
      }
      tiles_before_ += __shfl_sync(~0u, tiles_up_to, kWarpThreads - 1);
      do {
        group_ += kWarpThreads;
        if (group_ >= params.batch) {
          group_ = 0;
          classes_.drop_first();
          if (classes_.empty()) return {false, 0, {}};
        }
      } while (!classes_.first_holds_all() && __ballot_sync(~0u, is_in_class(params, group_ + lane)) == 0);
      sequence_ = longest_first(params, lane);
    }
  }

  FA_DEVICE void close(const ForwardParams& params) { Queue::close(params.tile_counter); }

 private:
  using Queue = TileQueue<Traits::kClusterSize>;

  static constexpr int kNone = -1;

  // Looks at all lengths, except where they cannot be worth telling apart.
  FA_DEVICE static LengthClasses find_classes(const ForwardParams& params) {
    if (params.batch <= kWarpThreads) return {};
    if (!LengthClasses::can_differ(visible_keys(params, params.seqlen_k), params.batch)) return {};
    unsigned octaves = 0;
#pragma unroll 4
    for (int group = 0; group < params.batch; group += kWarpThreads) {
      const int sequence = group + int(threadIdx.x % kWarpThreads);
      if (sequence < params.batch) octaves |= 1u << octave(visible_keys_of(params, sequence));
    }
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) octaves |= __shfl_xor_sync(~0u, octaves, distance);
    // All lanes have the same, but the compiler knows it of one lane's alone.
    return {__shfl_sync(~0u, octaves, 0), params.batch};
  }

  // Of `length` keys, how many a row sees at most: what a tile's time grows with.
  FA_DEVICE static int visible_keys(const ForwardParams& params, int length) {
    if constexpr (Traits::kMask == Mask::kLocal) {
      if (params.window_left >= 0 && params.window_right >= 0) {
        length = min_of(length, params.window_left + params.window_right + 1);
      }
      if (params.attention_chunk > 0) length = min_of(length, params.attention_chunk);
    }
    return length;
  }

  FA_DEVICE static int visible_keys_of(const ForwardParams& params, int sequence) {
    return visible_keys(params, key_sequence<SeqLayout::kVarlen>(params, sequence).length);
  }

  FA_DEVICE bool is_in_class(const ForwardParams& params, int sequence) const {
    return sequence < params.batch && classes_.first_holds(visible_keys_of(params, sequence));
  }

  // The sequence that this lane stands for: one of the class out of the group, or kNone.
  FA_DEVICE int longest_first(const ForwardParams& params, int lane) const {
    // 16 keys more or less do not matter; then 5 bits are left for the place in the group, the first one being largest.
    int rank = -1;
    if (group_ + lane < params.batch) {
      const int keys = visible_keys_of(params, group_ + lane);
      if (classes_.first_holds(keys)) rank = keys / 16 * kWarpThreads + (kWarpThreads - 1 - lane);
    }
    rank = sort_falling(rank, lane);
    return rank < 0 ? kNone : group_ + kWarpThreads - 1 - rank % kWarpThreads;
  }

  // Bitonic: runs of 2, 4, ... lanes, every other one rising, are merged. Not unrolled: the compiler would find out all
  // directions ahead, and the producer has no register to spare.
  FA_DEVICE static int sort_falling(int value, int lane) {
#pragma unroll 1
    for (int run = 2; run <= kWarpThreads; run *= 2) {
      for (int distance = run / 2; distance > 0; distance /= 2) {
        const int other = __shfl_xor_sync(~0u, value, distance);
        const bool takes_larger = ((lane & distance) == 0) == ((lane & run) == 0);
        value = takes_larger ? max_of(value, other) : min_of(value, other);
      }
    }
    return value;
  }

  FA_DEVICE static int num_m_blocks(const ForwardParams& params, int batch) {
    return scheduled_m_blocks<Traits>(params, query_sequence<SeqLayout::kVarlen>(params, batch).length);
  }

  // `heads_per_section` was chosen for the longest sequence; a shorter one lets more heads share the L2 cache.
  // Floats, since a 64-bit division costs more registers than the producer has; all CTAs get the same result.
  FA_DEVICE TilePosition position(const ForwardParams& params, int batch, int index, int num_m_blocks) const {
    const int num_heads = scheduled_heads(params);
    const int length = max_of(1, key_sequence<SeqLayout::kVarlen>(params, batch).length);
    const float fitting = float(params.heads_per_section) * float(max_of(1, params.seqlen_k)) / float(length);
    const int heads_per_section = fitting < float(num_heads) ? int(fitting) : num_heads;
    // Shorter sequences follow, whose tiles are there for the end.
    return tile_position<Traits::kMask>(index, num_m_blocks, num_heads, {max_of(1, heads_per_section), 0});
  }

  FA_DEVICE static int inclusive_scan(int value, int lane) {
#pragma unroll
    for (int distance = 1; distance < kWarpThreads; distance *= 2) {
      const int below = __shfl_up_sync(~0u, value, distance);
      if (lane >= distance) value += below;
    }
    return value;
  }

  Queue queue_;
  LengthClasses classes_;      // the first one is under the scan
  int group_ = -kWarpThreads;  // first of the 32 sequences under the scan; at first there are none
  int sequence_ = kNone;       // the one of them that this lane stands for
  int tiles_before_ = 0;       // tiles of all sequences before them
};

}  // namespace fa
