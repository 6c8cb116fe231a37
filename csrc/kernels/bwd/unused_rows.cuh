// Rows of the gradients that belong to no query or key: past the used length of a sequence, or outside of all
// sequences. Nothing but zeros is written there, whatever the other tensors hold.
#pragma once

#include "../core/seqlen.h"
#include "../core/traits.cuh"
#include "params.h"

namespace fa {

// One of the CTAs that share the unused rows next to one sequence.
template <class Traits>
class UnusedRows {
 public:
  FA_DEVICE UnusedRows(const BackwardParams& params, int index)
      : params_(params), batch_(index / kUnusedRowCtas), share_(index % kUnusedRowCtas) {}

  FA_DEVICE void clear() const {
    const Sequence q = query_sequence<Traits::kSeqLayout>(params_, batch_);
    const Sequence k = key_sequence<Traits::kSeqLayout>(params_, batch_);
    const int *cu_seqlens_q = params_.cu_seqlens_q, *cu_seqlens_k = params_.cu_seqlens_k;
    clear_rows(params_.dq_rows, q, cu_seqlens_q, params_.row_bound_q, params_.heads_q, params_.head_dim);
    clear_rows(params_.dk_rows, k, cu_seqlens_k, params_.row_bound_k, params_.heads_kv, params_.head_dim);
    clear_rows(params_.dv_rows, k, cu_seqlens_k, params_.row_bound_k, params_.heads_kv, params_.head_dim_v);
  }

 private:
  FA_DEVICE void clear_rows(const HeadRows& rows, const Sequence& sequence, const int32_t* cu_seqlens, int stored_rows,
                            int heads, int columns) const {
    clear_range(rows, sequence.batch, rows_behind(sequence, batch_, params_.batch, stored_rows, cu_seqlens), heads,
                columns);
    if (cu_seqlens != nullptr && batch_ == 0) clear_range(rows, 0, {0, cu_seqlens[0]}, heads, columns);
  }

  FA_DEVICE void clear_range(const HeadRows& rows, int batch, RowRange range, int heads, int columns) const {
    constexpr int kColumnsPerStore = 8;  // 16 bytes
    const int stores_per_head = columns / kColumnsPerStore;
    uint16_t* const data = static_cast<uint16_t*>(rows.data) + batch * rows.batch_stride;
    for (int row = range.begin + share_; row < range.end; row += kUnusedRowCtas) {
      for (int i = threadIdx.x; i < heads * stores_per_head; i += blockDim.x) {
        const int head = i / stores_per_head, column = i % stores_per_head * kColumnsPerStore;
        *reinterpret_cast<uint4*>(data + row * rows.row_stride + head * rows.head_stride + column) = {0, 0, 0, 0};
      }
    }
  }

  const BackwardParams& params_;
  int batch_, share_;
};

}  // namespace fa
