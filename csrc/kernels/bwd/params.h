// The ABI between the runtime and the backward kernels. See ../params.h for the conventions.
#pragma once

#include "../params.h"

namespace fa {

// Row `row` of a head: data + batch * batch_stride + row * row_stride + head * head_stride. Elements of 16 bits;
// addresses and strides are multiples of 16 bytes. The batch stride is 0 in packed storage.
struct HeadRows {
  void* data;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
};

// One launch of a backward pass; all of its three kernels get the same.
//
// Scratch of one float per query row and head lies in blocks of block_m rows: sequence `b` of a packed side begins at
// row padded_offset(b) of its head (core/seqlen.h), so that every block is whole and begins at a multiple of block_m.
struct alignas(128) BackwardParams {
  CUtensorMap q;     // box {swizzle width, 1, block_m rows, 1, 1}
  CUtensorMap dout;  // the same
  CUtensorMap k;     // box {swizzle width, 1, block_n rows, 1, 1}
  CUtensorMap v;     // the same
  CUtensorMap dk;    // box {swizzle width, 1, 64 rows, 1, 1}
  CUtensorMap dv;    // the same

  HeadRows out;
  HeadRows dout_rows;
  HeadRows dq_rows;
  HeadRows dk_rows;
  HeadRows dv_rows;

  const float* lse;                             // natural, as the forward pass wrote it
  const float* dlse;                            // its gradient, or null: zero
  int64_t lse_batch_stride, lse_head_stride;    // elements; the batch stride is 0 with cu_seqlens_q
  int64_t dlse_batch_stride, dlse_head_stride;  // the same

  // Scratch, contents undefined before.
  float* delta;       // sum of dout * out over a row's columns, less the row's dlse; 0 for rows as below
  float* lse_log2;    // lse * log2(e); +infinity for rows that do not exist or see no key
  float* dq_blocks;   // head_dim floats for each of these rows, blocks in the order of the accumulators
  int32_t* dq_turns;  // where additions take turns: one for each block and consumer warpgroup (bwd/dq_part.cuh)
  float* key_parts;   // with group_parts > 1: dk and dv of each tile (bwd/key_part.cuh)
  int64_t rows_batch_stride,
      rows_head_stride;  // of delta and lse_log2, elements; the batch stride is 0 with cu_seqlens_q

  TileCounter* tile_counter;  // of this launch alone while it runs

  const int32_t* cu_seqlens_q;  // as in ForwardParams, the four of them
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_q;
  const int32_t* seqused_k;

  int32_t batch;
  int32_t heads_q;
  int32_t heads_kv;
  int32_t head_dim;      // columns of q, k, dq and dk; a multiple of 8
  int32_t head_dim_v;    // columns of v, out, dout and dv; a multiple of 8
  int32_t seqlen_q;      // rows of a dense q
  int32_t seqlen_k;      // rows of a dense k
  int32_t row_bound_q;   // size of the row dimension of the q and dout maps
  int32_t row_bound_k;   // size of the row dimension of the k, v, dk and dv maps
  int32_t num_m_blocks;  // of each query sequence, or of all packed ones together (core/seqlen.h)
  int32_t num_n_blocks;  // of each key sequence, or of all packed ones together

  int32_t num_query_blocks;  // num_m_blocks of each query head, of each sequence or of all
  int32_t num_key_blocks;    // num_n_blocks of each key head, of each sequence or of all
  int32_t group_parts;       // of the query heads that share keys, each of which has tiles of its own; divides them
  int32_t num_tiles;         // num_key_blocks of each part

  int32_t heads_per_section;            // core/schedule.h; of parts of (batch, key head) pairs
  int32_t least_heads_in_last_section;  // the same

  float softmax_scale;  // of dq and dk: a score's gradient times this, with the softcap's slope included
  float score_scale;    // as in ForwardParams
  float exp2_scale;     // as in ForwardParams

  int32_t window_left;  // as in ForwardParams, the three of them
  int32_t window_right;
  int32_t attention_chunk;
};

// Sequences share out the rows that take part in none of them; each share is worked on by so many CTAs.
constexpr int kUnusedRowCtas = 8;

static_assert(sizeof(BackwardParams) == 6 * 128 + 4 * 128, "the kernels and the runtime must agree on this layout");

}  // namespace fa
