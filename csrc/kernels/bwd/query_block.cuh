// What one CTA of the kernels before and after the main one works on.
#pragma once

#include "smem.cuh"

namespace fa {

// A block of query rows of one head and sequence.
struct QueryBlock {
  int m_block;
  int head;
  int batch;
  Sequence q;
  int64_t scratch_row;  // of its first row

  FA_DEVICE const uint16_t* row(const HeadRows& rows, int position) const {
    return static_cast<const uint16_t*>(rows.data) + q.batch * rows.batch_stride +
           int64_t{q.offset + position} * rows.row_stride + head * rows.head_stride;
  }
  FA_DEVICE uint16_t* written_row(const HeadRows& rows, int position) const {
    return const_cast<uint16_t*>(row(rows, position));
  }
};

template <class Traits>
FA_DEVICE QueryBlock query_block(const BackwardParams& params, int index) {
  QueryBlock block;
  block.m_block = index % params.num_m_blocks;
  block.head = index / params.num_m_blocks % params.heads_q;
  block.batch = index / params.num_m_blocks / params.heads_q;
  if (Traits::kSeqLayout == SeqLayout::kVarlen && params.cu_seqlens_q != nullptr) {
    const PackedBlock packed = packed_block(params.cu_seqlens_q, params.batch, block.m_block, Traits::kBlockM);
    block.m_block = packed.block;
    block.batch = packed.batch;
  }
  block.q = query_sequence<Traits::kSeqLayout>(params, block.batch);
  block.scratch_row = scratch_row<Traits>(params, block.q, block.batch) + block.head * params.rows_head_stride +
                      int64_t{block.m_block} * Traits::kBlockM;
  return block;
}

}  // namespace fa
