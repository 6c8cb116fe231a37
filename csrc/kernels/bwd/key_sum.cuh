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
    float dk[Shape::kDkColumns / 2];
    sum(dk, [](const KeyPart<Traits>& part, auto& sum) { part.add_dk_to(sum); });
    store(dk, params_.dk_rows, params_.head_dim);
    float dv[Shape::kDvColumns / 2];
    sum(dv, [](const KeyPart<Traits>& part, auto& sum) { part.add_dv_to(sum); });
    store(dv, params_.dv_rows, params_.head_dim_v);
  }

 private:
  using Shape = BackwardShape<Traits>;

  FA_DEVICE static int warpgroup() { return threadIdx.x / kWarpgroupThreads; }

  // Always in the same order.
  template <int kSize, class Add>
  FA_DEVICE void sum(float (&gradient)[kSize], Add add) const {
    clear_fragment(gradient);
#pragma unroll 1
    for (int part = 0; part < params_.group_parts; ++part) {
      const int index = (head_ * params_.group_parts + part) * params_.num_n_blocks + place_;
      add(KeyPart<Traits>(params_, index, warpgroup()), gradient);
    }
  }

  // `columns`: of all that the tensor has.
  template <int kSize>
  FA_DEVICE void store(const float (&gradient)[kSize], const HeadRows& rows, int columns) const {
    const int rank = warpgroup() / Shape::kNumConsumerWarpgroups, of_cta = warpgroup() % Shape::kNumConsumerWarpgroups;
    const int first_row = block_.n_block * Traits::kBlockN + rank * Shape::kTileKeys + fragment_row() +
                          (Shape::kSplitsColumns ? 0 : of_cta * kWarpgroupRows);
    const int first_column = Shape::kSplitsColumns ? of_cta * 2 * kSize : 0;
    uint16_t* const head = static_cast<uint16_t*>(rows.data) + k_.batch * rows.batch_stride +
                           block_.head_kv * rows.head_stride + first_column;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int position = first_row + 8 * r;
      const int num_columns = position < k_.length ? columns - first_column : 0;
      store_row<Traits::kDtype>(head + int64_t{k_.offset + position} * rows.row_stride, num_columns, gradient, r);
    }
  }

  const BackwardParams& params_;
  const int head_, place_;
  const KeyBlock block_;
  const Sequence k_;
};

}  // namespace fa
