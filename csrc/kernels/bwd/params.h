// The ABI between the runtime and the backward kernels. See ../params.h for the conventions.
#pragma once

#include "../params.h"

namespace fa {

// Scratch of one float per query row and head lies in blocks of block_m rows: sequence `b` of a packed side begins at
// row padded_offset(b) of its head (core/seqlen.h), so that every block is whole and begins at a multiple of block_m.
struct alignas(128) BackwardParams {
  CUtensorMap q;     // box {swizzle width, 1, block_m rows, 1, 1}
  CUtensorMap dout;  // the same
  CUtensorMap k;     // box {swizzle width, 1, block_n rows, 1, 1}
  CUtensorMap v;     // the same
  CUtensorMap dk;    // box {swizzle width, 1, 64 rows, 1, 1}
  CUtensorMap dv;    // the same

  const void* out;  // 16 bit; the forward's output, and the gradient that comes in; rows of heads, as below
  const void* dout_rows;
  void* dq;
  const float* lse;   // natural, as the forward wrote it
  const float* dlse;  // its gradient, laid out alike, or null: none

  int64_t out_batch_stride, out_row_stride, out_head_stride;     // elements
  int64_t dout_batch_stride, dout_row_stride, dout_head_stride;  // elements
  int64_t dq_batch_stride, dq_row_stride, dq_head_stride;        // elements
  int64_t lse_batch_stride, lse_head_stride;                     // elements
  int64_t dlse_batch_stride, dlse_head_stride;                   // elements

  float* lse_log2;   // scratch: lse * log2(e), +infinity for rows that do not exist or see no key
  float* delta;      // scratch: sum of dout * out over a row's columns, less the row's dlse
  float* dq_blocks;  // scratch: fp32 (batch, heads_q, blocks, kDqFloats), in the order of the accumulators
  int64_t rows_batch_stride, rows_head_stride;  // of the scratch; elements of lse_log2 and delta

  TileCounter* tile_counter;

  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_q;
  const int32_t* seqused_k;

  int32_t batch;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t head_dim;    // columns of q, k, dq and dk
  int32_t head_dim_v;  // columns of v, out, dout and dv
  int32_t seqlen_q;
  int32_t seqlen_k;
  int32_t row_bound_q;
  int32_t row_bound_k;

  float softmax_scale;  // of dq and dk: the gradient of a score times this, with softcap included
  float score_scale;    // as in ForwardParams
  float exp2_scale;     // as in ForwardParams

  int32_t window_left;
  int32_t window_right;
  int32_t attention_chunk;
};

}  // namespace fa
