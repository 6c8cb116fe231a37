// What follows from a configuration. `Traits` is generated (one constant per field of ForwardConfig); the values
// derived here have twins in hopper/flash_attn_3/config.py, and generated static_asserts compare the two.
#pragma once

#include <cstdint>
#include <type_traits>

#include "enums.h"
#include "packing.h"

namespace fa {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kMmaDepth = 16;        // K of wgmma.m64nNk16
constexpr int kControlBytes = 1024;  // shared memory set aside for barriers and tile coordinates
constexpr int kTileSlots = 4;        // tiles announced to the consumers and not yet done with

// Width in bytes of one shared-memory column chunk of a tile `width` 16-bit elements wide, which is also its swizzle.
constexpr int swizzle_bytes(int width) { return width * 2 % 128 == 0 ? 128 : 64; }

constexpr int kMaxConsumerWarpgroups = 4;

// Registers of a thread of each role after setmaxnreg. A CTA has no more than it is launched with, a multiple of 8 for
// each thread: consumers that ask for more wait forever.
struct RegisterSplit {
  int producer, consumer;
};
// A producer that shares its copies with a cluster's other CTAs needs more.
constexpr RegisterSplit register_split(int num_consumer_warpgroups, int cluster_size = 1) {
  constexpr RegisterSplit kSplits[kMaxConsumerWarpgroups] = {{56, 256}, {24, 240}, {32, 160}, {32, 112}};
  if (num_consumer_warpgroups == 2 && cluster_size > 1) return {40, 232};
  return kSplits[num_consumer_warpgroups - 1];
}

constexpr bool fits_register_file(int num_consumer_warpgroups, int cluster_size = 1) {
  const RegisterSplit split = register_split(num_consumer_warpgroups, cluster_size);
  const int at_launch = 65536 / (kWarpgroupThreads * (num_consumer_warpgroups + 1)) / 8 * 8;
  return split.producer + split.consumer * num_consumer_warpgroups <= at_launch * (num_consumer_warpgroups + 1);
}

template <class Traits>
struct ForwardShape {
  static constexpr int kElementBytes = 2;
  static constexpr int kNumConsumerWarpgroups = Traits::kBlockM / kWarpgroupRows;
  static constexpr int kNumThreads = kWarpgroupThreads * (kNumConsumerWarpgroups + 1);
  static constexpr int kProducerRegisters = register_split(kNumConsumerWarpgroups, Traits::kClusterSize).producer;
  static constexpr int kConsumerRegisters = register_split(kNumConsumerWarpgroups, Traits::kClusterSize).consumer;
  static_assert(fits_register_file(kNumConsumerWarpgroups, Traits::kClusterSize));
  static constexpr int kSwizzleBytes = swizzle_bytes(Traits::kHeadDim);
  static constexpr int kSwizzleBytesV = swizzle_bytes(Traits::kHeadDimV);
  static constexpr bool kOwnOutputBuffer = Traits::kOutputBuffer == OutputBuffer::kOwn;
  // Whether a tile's last product runs beside the next tile's first. Where the output is staged over q, the next q must
  // wait for it.
  static constexpr bool kOverlapsTiles = Traits::kOutputBuffer != OutputBuffer::kWithQ;
  // Of a tile's first block a warpgroup takes only so many keys where its rows see no more: half, in whole products.
  static constexpr int kHalfKeys = ceil_div(Traits::kBlockN / 2, kMmaDepth) * kMmaDepth;
  // Arrivals with which a warpgroup frees a key buffer, or q. The products are complete for all of its warps at once,
  // but with kOnOverflow each warp may read on by itself.
  static constexpr int kReleasesPerWarpgroup =
      Traits::kRescale == Rescale::kOnOverflow ? kWarpgroupThreads / kWarpThreads : 1;

  static constexpr int kQBytes = Traits::kBlockM * Traits::kHeadDim * kElementBytes;   // one stage
  static constexpr int kKBytes = Traits::kBlockN * Traits::kHeadDim * kElementBytes;   // one stage
  static constexpr int kVBytes = Traits::kBlockN * Traits::kHeadDimV * kElementBytes;  // one stage
  static constexpr int kOBytes = Traits::kBlockM * Traits::kHeadDimV * kElementBytes;
  // A CTA's share of ForwardParams::promoted_out: the output, and two rows' references for each thread.
  static constexpr int kPromotedFloats =
      Traits::kBlockM * Traits::kHeadDimV + 2 * kNumConsumerWarpgroups * kWarpgroupThreads;
  static constexpr int kSmemBytes = Traits::kNumQStages * kQBytes + Traits::kNumStages * (kKBytes + kVBytes) +
                                    (kOwnOutputBuffer ? kOBytes : 0) + kControlBytes;
};

}  // namespace fa
