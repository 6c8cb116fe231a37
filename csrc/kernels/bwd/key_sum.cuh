// Where parts of a group's heads have tiles of their own: dk and dv of a block of keys, the sum of these tiles', in
// rows.
#pragma once

#include "../core/fragment.cuh"
#include "key_part.cuh"

namespace fa {

// One CTA for each block of keys of a key head and sequence, with a warpgroup for each of a tile's consumers.
template <class Traits>
class KeyGradientSum {
 public:
  FA_DEVICE KeyGradientSum(const BackwardParams& params, int index)
      : params_(params),
        head_(index / params.num_n_blocks),
        place_(index % params.num_n_blocks),
        block_(key_block<Traits>(params, head_, place_)),
        k_(key_sequence<Traits::kSeqLayout>(params, block_.batch)) {}

  FA_DEVICE void run() const {
    if (block_.n_block * Traits::kBlockN >= k_.length) return;
    for (int column = 0; column < Shape::kDkColumns; column += kSliceColumns) {
      store(sum(column), params_.dk_rows, params_.head_dim, first_column(Shape::kDkColumns) + column);
    }
    for (int column = 0; column < Shape::kDvColumns; column += kSliceColumns) {
      store(sum(Shape::kDkColumns + column), params_.dv_rows, params_.head_dim_v,
            first_column(Shape::kDvColumns) + column);
    }
  }

 private:
  using Shape = BackwardShape<Traits>;

  // Of a warpgroup's at a time: more would only take registers.
  static constexpr int kSliceColumns = 32;
  struct Slice {
    float values[kSliceColumns / 2];
  };
  static_assert(Shape::kDkColumns % kSliceColumns == 0 && Shape::kDvColumns % kSliceColumns == 0);

  FA_DEVICE static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }
  // The same warpgroup's number among those of its CTA in the main kernel.
  FA_DEVICE static int number_in_cta() { return warpgroup() % Shape::kNumConsumerWarpgroups; }
  FA_DEVICE static int first_column(int columns) { return Shape::kSplitsColumns ? number_in_cta() * columns : 0; }

  // Always in the same order. `column`: of the warpgroup's dk, and behind these of dv.
  FA_DEVICE Slice sum(int column) const {
    Slice slice;
    clear_fragment(slice.values);
#pragma unroll 1
    for (int part = 0; part < params_.group_parts; ++part) {
      const int index = (head_ * params_.group_parts + part) * params_.num_n_blocks + place_;
      KeyPart<Traits>(params_, index, warpgroup()).add_to(slice.values, column);
    }
    return slice;
  }

  // `columns`: of all that the tensor has; `column`: the first one of the slice.
  FA_DEVICE void store(const Slice& slice, const HeadRows& rows, int columns, int column) const {
    const int rank = warpgroup() / Shape::kNumConsumerWarpgroups;
    const int first_row = block_.n_block * Traits::kBlockN + rank * Shape::kTileKeys + fragment_row() +
                          (Shape::kSplitsColumns ? 0 : number_in_cta() * kWarpgroupRows);
    uint16_t* const head =
        static_cast<uint16_t*>(rows.data) + k_.batch * rows.batch_stride + block_.head_kv * rows.head_stride + column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int position = first_row + 8 * r;
      const int num_columns = position < k_.length ? columns - column : 0;
      store_row<Traits::kDtype>(head + int64_t{k_.offset + position} * rows.row_stride, num_columns, slice.values, r);
    }
  }

  const BackwardParams& params_;
  const int head_, place_;
  const KeyBlock block_;
  const Sequence k_;
};

}  // namespace fa
