// Where the kernels think that a sequence lies, for the CPU tests.
#include "core/seqlen.h"

// Has a twin in tests/cpu/test_seqlen.py.
struct Side {
  int32_t seqlen;
  const int32_t *cu_seqlens, *seqused;
};

extern "C" void sequences(fa::SeqLayout layout, const Side* q, const Side* k, int batch, fa::Sequence* result) {
  fa::ForwardParams params = {};
  params.seqlen_q = q->seqlen;
  params.cu_seqlens_q = q->cu_seqlens;
  params.seqused_q = q->seqused;
  params.seqlen_k = k->seqlen;
  params.cu_seqlens_k = k->cu_seqlens;
  params.seqused_k = k->seqused;
  if (layout == fa::SeqLayout::kDense) {
    result[0] = fa::query_sequence<fa::SeqLayout::kDense>(params, batch);
    result[1] = fa::key_sequence<fa::SeqLayout::kDense>(params, batch);
  } else {
    result[0] = fa::query_sequence<fa::SeqLayout::kVarlen>(params, batch);
    result[1] = fa::key_sequence<fa::SeqLayout::kVarlen>(params, batch);
  }
}

extern "C" int map_row(const fa::Sequence* sequence, int row_bound, int row) {
  return sequence->map_row(row_bound, row);
}

extern "C" int map_origin(const fa::Sequence* sequence) { return sequence->map_origin(); }

extern "C" void rows_behind(const fa::Sequence* sequence, int batch, int num_sequences, int stored_rows,
                            const int32_t* cu_seqlens, fa::RowRange* result) {
  *result = fa::rows_behind(*sequence, batch, num_sequences, stored_rows, cu_seqlens);
}

extern "C" int padded_offset(int first_row, int batch, int block_m) {
  return fa::padded_offset(first_row, batch, block_m);
}

extern "C" int num_packed_blocks(int rows, int num_sequences, int block_rows) {
  return fa::num_packed_blocks(rows, num_sequences, block_rows);
}

extern "C" void packed_block(const int32_t* cu_seqlens, int num_sequences, int number, int block_rows,
                             fa::PackedBlock* result) {
  *result = fa::packed_block(cu_seqlens, num_sequences, number, block_rows);
}
