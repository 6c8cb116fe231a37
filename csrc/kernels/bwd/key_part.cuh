// Where blocks of keys lie, and the gradients of a block by a part of its query heads: these have tiles of their own
// where the keys alone would leave multiprocessors idle.
#pragma once

#include "smem.cuh"

namespace fa {

struct KeyBlock {
  int n_block;
  int batch;
  int head_kv;
};

// `head`: of all sequences' key heads, sequence by sequence; of packed keys, just a key head. `place`: of its
// num_n_blocks.
template <class Traits>
FA_DEVICE KeyBlock key_block(const BackwardParams& params, int head, int place) {
  if (Traits::kSeqLayout == SeqLayout::kVarlen && params.cu_seqlens_k != nullptr) {
    const PackedBlock packed = packed_block(params.cu_seqlens_k, params.batch, place, Traits::kBlockN);
    return {packed.block, packed.batch, head};
  }
  const int batch = head / params.heads_kv;
  return {place, batch, head - batch * params.heads_kv};
}

// One warpgroup's dk and dv of a tile in memory, fp32, in the order of the accumulators: thread t's registers i to i +
// 3 are floats 512 (i / 4) + 4 t and so on, first those of dk. `index`: of KeyTile::key_part.
template <class Traits>
class KeyPart {
 public:
  static constexpr int kDkFloats = kWarpgroupRows * BackwardShape<Traits>::kDkColumns;
  static constexpr int kFloats = kDkFloats + kWarpgroupRows * BackwardShape<Traits>::kDvColumns;

  // `warpgroup`: among the consumers of all of a tile's CTAs.
  FA_DEVICE KeyPart(const BackwardParams& params, int index, int warpgroup)
      : data_(params.key_parts + (int64_t{index} * BackwardShape<Traits>::kNumDqParts + warpgroup) * kFloats +
              threadIdx.x % kWarpgroupThreads * 4) {}

  template <int kSizeDk, int kSizeDv>
  FA_DEVICE void store(const float (&dk)[kSizeDk], const float (&dv)[kSizeDv]) const {
    store(data_, dk);
    store(data_ + kDkFloats, dv);
  }

  // Columns [column, column + 2 kSize) of dk, and behind these of dv, added to `sum`.
  template <int kSize>
  FA_DEVICE void add_to(float (&sum)[kSize], int column) const {
    const float* const from = data_ + column * kWarpgroupRows;
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 part = *reinterpret_cast<const float4*>(from + i * kWarpgroupThreads);
      sum[i] += part.x, sum[i + 1] += part.y, sum[i + 2] += part.z, sum[i + 3] += part.w;
    }
  }

 private:
  template <int kSize>
  FA_DEVICE static void store(float* to, const float (&from)[kSize]) {
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      *reinterpret_cast<float4*>(to + i * kWarpgroupThreads) =
          make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }

  float* data_;
};

}  // namespace fa
