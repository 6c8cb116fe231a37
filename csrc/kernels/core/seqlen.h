// Where a sequence lies in its storage and how long it is.
#pragma once

#include "../params.h"
#include "enums.h"
#include "platform.h"

namespace fa {

// One side (queries or keys) of one sequence.
struct Sequence {
  int length;  // rows that take part
  int offset;  // first row, counted from the start of packed storage; 0 in dense storage
  int batch;   // coordinate of the tensor maps' batch dimension; 0 in packed storage

  // Coordinates of row `row` in the tensor maps of params.h. Rows at or past `length` are out of bounds there.
  FA_HOST_DEVICE int map_row(int row_bound, int row) const { return row_bound - length + row; }
  FA_HOST_DEVICE int map_origin() const { return offset + length; }
};

// `dense_rows`: rows of each sequence where cu_seqlens is null. `seqused` can only shorten a sequence: a value
// past its storage would read a neighbour's rows.
FA_HOST_DEVICE Sequence varlen_sequence(int batch, int dense_rows, const int32_t* cu_seqlens, const int32_t* seqused) {
  const int offset = cu_seqlens ? cu_seqlens[batch] : 0;
  const int rows = cu_seqlens ? cu_seqlens[batch + 1] - offset : dense_rows;
  const int length = seqused ? max_of(0, min_of(rows, seqused[batch])) : rows;
  return {length, offset, cu_seqlens ? 0 : batch};
}

// Where a packed sequence begins in scratch that holds whole blocks of block_m rows. Its last block, filled up, ends
// before the next sequence begins.
FA_HOST_DEVICE int padded_offset(int first_row, int batch, int block_m) {
  return (first_row + batch * block_m) / block_m * block_m;
}

// Blocks of packed rows are numbered over all sequences: sequence `b` begins at block padded_offset(b) / block_rows,
// counted from the first one's row, so that a number tells the sequence, however long these are. Some numbers stand for
// blocks without rows.
FA_HOST_DEVICE int num_packed_blocks(int rows, int num_sequences, int block_rows) {
  return rows / block_rows + num_sequences;
}

struct PackedBlock {
  int batch;
  int block;  // of the sequence
};

// What block `number` stands for.
FA_HOST_DEVICE PackedBlock packed_block(const int32_t* cu_seqlens, int num_sequences, int number, int block_rows) {
  const auto first_block = [=](int batch) {
    return padded_offset(cu_seqlens[batch] - cu_seqlens[0], batch, block_rows) / block_rows;
  };
  int batch = 0;
  for (int left = num_sequences; left > 1;) {
    const int half = left / 2;
    const bool is_behind = first_block(batch + half) <= number;
    if (is_behind) batch += half;
    left = is_behind ? left - half : half;
  }
  return {batch, number - first_block(batch)};
}

struct RowRange {
  int begin, end;  // rows [begin, end) of the storage
};

// The stored rows behind the used ones of sequence `batch`, up to the next sequence or the end of the storage.
FA_HOST_DEVICE RowRange rows_behind(const Sequence& sequence, int batch, int num_sequences, int stored_rows,
                                    const int32_t* cu_seqlens) {
  const bool last = cu_seqlens == nullptr || batch + 1 == num_sequences;
  return {sequence.offset + sequence.length, last ? stored_rows : cu_seqlens[batch + 1]};
}

template <SeqLayout kSeqLayout, class Params>
FA_HOST_DEVICE Sequence query_sequence(const Params& params, int batch) {
  if constexpr (kSeqLayout == SeqLayout::kDense) return {params.seqlen_q, 0, batch};
  return varlen_sequence(batch, params.seqlen_q, params.cu_seqlens_q, params.seqused_q);
}

template <SeqLayout kSeqLayout, class Params>
FA_HOST_DEVICE Sequence key_sequence(const Params& params, int batch) {
  if constexpr (kSeqLayout == SeqLayout::kDense) return {params.seqlen_k, 0, batch};
  return varlen_sequence(batch, params.seqlen_k, params.cu_seqlens_k, params.seqused_k);
}

}  // namespace fa
