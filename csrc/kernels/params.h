// The ABI between the runtime (host C++) and the kernels: what one launch is given.
//
// Plain data only. Both sides include this file and assert the sizes below, and it is part of the cache key, so that a
// kernel compiled against another layout cannot be launched by mistake.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "core/packing.h"

namespace fa {

// Keys after which a tile adds its output to `promoted_out` (fwd/promotion.cuh says why).
constexpr int kPromotionKeys = 1 << 18;

// Hands out a launch's tiles. Both members are 0 when a launch starts, and the launch leaves them so.
struct TileCounter {
  int32_t taken;     // tiles handed out; of a forward pass, beyond the first of each CTA
  int32_t finished;  // takers that found no tile left
};

// Tensor maps are five-dimensional: {column, head, row, origin, batch}, innermost first.
//
// `row` and `origin` have the same stride. A sequence of `len` rows that starts at row `offset` of its
// storage is addressed by row = bound - len + r, origin = offset + len, where `bound` is the size of the
// row dimension and the map's base address lies `bound` rows before the tensor. Then r >= len is out of
// bounds, so loads return zeros and stores write nothing there, wherever the sequence ends. With a dense
// layout, bound = seqlen and offset = 0.
//
// A box must hold at least one element in bounds: for one that does not, the copy engine touches the base address,
// which may not be mapped.
struct alignas(128) ForwardParams {
  CUtensorMap q;  // box {swizzle width, packed heads, a warpgroup's positions, 1, 1}
  CUtensorMap k;  // box {swizzle width, 1, block_n rows, 1, 1}
  CUtensorMap v;  // box {swizzle width, 1, block_n rows, 1, 1}
  CUtensorMap o;  // as q

  // Output row `row` of a head: out + batch * out_batch_stride + row * out_row_stride + head * out_head_stride.
  // Elements of 16 bits; addresses and strides are multiples of 16 bytes. For kernels that do not store through `o`.
  void* out;
  int64_t out_batch_stride;  // 0 with cu_seqlens_q
  int64_t out_row_stride;
  int64_t out_head_stride;

  float* lse;                // fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q) with cu_seqlens_q
  int64_t lse_batch_stride;  // elements; 0 with cu_seqlens_q
  int64_t lse_head_stride;   // elements

  // fp32 (num_ctas, the kernel's kPromotedFloats), contents undefined; null where no sequence has more than
  // kPromotionKeys keys.
  float* promoted_out;

  TileCounter* tile_counter;  // of this launch alone while it runs

  const int32_t* cu_seqlens_q;  // (batch + 1), or null: q is dense
  const int32_t* cu_seqlens_k;  // (batch + 1), or null: k and v are dense
  const int32_t* seqused_q;     // (batch), or null: every row is used
  const int32_t* seqused_k;     // (batch), or null: every row is used

  int32_t batch;
  int32_t heads_q;
  int32_t head_dim_v;         // columns of v and out, over all value passes
  int32_t seqlen_q;           // rows of a dense q; max_seqlen_q with cu_seqlens_q
  int32_t seqlen_k;           // rows of a dense k; max_seqlen_k with cu_seqlens_k
  int32_t row_bound_q;        // size of the row dimension of the q and o maps
  int32_t row_bound_k;        // size of the row dimension of the k and v maps
  Divisor heads_per_kv;       // query heads that share a key head
  Packing packing;            // of these in tiles
  int32_t num_value_passes;   // column passes over values wider than the value tile
  int32_t heads_per_section;  // (batch, head, pass) triples that are worked on together
  int32_t least_heads_in_last_section;

  // The score of a pair is score_scale * (q . k) without softcap, or tanh(score_scale * (q . k)) with it.
  // The softmax is taken in base 2 over score * exp2_scale (without softcap score_scale is 1 and unused).
  float score_scale;
  float exp2_scale;

  int32_t window_left;      // keys; negative: unlimited
  int32_t window_right;     // keys; negative: unlimited
  int32_t attention_chunk;  // keys; 0: none
};

static_assert(sizeof(CUtensorMap) == 128, "a tensor map is 128 opaque bytes");
static_assert(sizeof(ForwardParams) == 4 * 128 + 256, "the kernel and the runtime must agree on this layout");

}  // namespace fa
