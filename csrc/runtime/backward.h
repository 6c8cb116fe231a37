// The backward pass: checks the arguments, fills the kernels' parameters, launches the three of them.
#pragma once

#include <cstdint>

#include "check.h"
#include "kernel_registry.h"
#include "kernels/bwd/params.h"
#include "row_tensor.h"
#include "tensor_map.h"

namespace fa {

// The tensors of one call, as the caller gave them. Columns of q, k, dq and dk: head_dim; of the others: head_dim_v.
struct BackwardTensors {
  TensorView dout;              // as out
  TensorView q;                 // (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim)
  TensorView k;                 // (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim)
  TensorView v;                 // as k, with head_dim_v columns
  TensorView out;               // as q, with head_dim_v columns
  TensorView lse;               // fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q)
  OptionalTensor dlse;          // as lse; without: zero
  TensorView statistics;        // fp32 (2, batch, heads_q, rows) or (2, heads_q, rows), contiguous; written
  TensorView dq;                // as q; written
  TensorView dk;                // as k; written
  TensorView dv;                // as v; written
  OptionalTensor cu_seqlens_q;  // int32 (batch + 1): the query side is packed
  OptionalTensor cu_seqlens_k;  // int32 (batch + 1): k, v, dk and dv are packed
  OptionalTensor seqused_q;     // int32 (batch)
  OptionalTensor seqused_k;     // int32 (batch)
  TensorView dq_scratch;        // fp32, contiguous: BackwardKernels::dq_scratch_floats
  OptionalTensor key_parts;  // fp32, contiguous: BackwardKernels::key_part_floats; wanted where group_parts exceeds 1
};

// The loaded kernels of one configuration, and what else is fixed when they are compiled.
struct BackwardKernels {
  Kernel preprocess;
  Kernel main;
  Kernel postprocess;
  int64_t head_dim;    // of the tiles
  int64_t head_dim_v;  // of the tiles
  int64_t block_m;
  int64_t block_n;
  int64_t cluster_size;  // CTAs of the main kernel that share block_n keys
  int64_t num_dq_parts;  // of a block of dq, one for each consumer warpgroup of these
  bool varlen;
  bool takes_turns;       // with additions to dq
  TensorMapBox q_box;     // of q
  TensorMapBox dout_box;  // of dout
  TensorMapBox k_box;     // of k
  TensorMapBox v_box;     // of v
  TensorMapBox dk_box;    // of dk
  TensorMapBox dv_box;    // of dv

  // Elements of scratch for that many rows of statistics, of all heads and sequences together: dq in fp32, and one turn
  // for each part of a block where additions take turns.
  int64_t dq_scratch_floats(int64_t rows) const {
    return rows * head_dim + (takes_turns ? rows / block_m * num_dq_parts : 0);
  }
  // Elements of scratch for dk and dv of each tile, in fp32, where several are added up.
  int64_t key_part_floats(int64_t num_tiles) const { return num_tiles * block_n * (head_dim + head_dim_v); }
};

// What a launch is told beside its tensors; the meaning is that of the same names in BackwardParams.
struct BackwardOptions {
  int64_t group_parts;
  int64_t num_ctas;  // of the main kernel, persistent; whole clusters
  int64_t heads_per_section;
  int64_t least_heads_in_last_section;
  double softmax_scale;
  double score_scale;
  double exp2_scale;
  int64_t window_left;
  int64_t window_right;
  int64_t attention_chunk;
};

// The tensors of a call after all checks.
struct CheckedBackwardTensors {
  RowTensor dout, q, k, v, out, dq, dk, dv;
  int64_t batch;
  int64_t scratch_rows;  // of each head: the last dimension of the statistics
};

// Throws ValueError or TypeError, naming the argument, for tensors that do not fit together or to the kernels.
CheckedBackwardTensors check_backward_tensors(const BackwardTensors& tensors, const BackwardKernels& kernels);

// A backward pass but for its tensors: what all calls of one signature share is judged and converted once.
class BackwardLauncher {
 public:
  // Throws ValueError for an unknown handle or an option that does not fit.
  BackwardLauncher(int64_t handle, const BackwardOptions& options);

  // Enqueues one backward pass on the current stream of the tensors' device; every row of dq, dk and dv is written.
  // Nothing is launched if it throws. Waits for nothing and allocates nothing, but for the tile counters
  // (tile_counters.h). May be called by several threads at once.
  void operator()(const BackwardTensors& tensors) const;

 private:
  const BackwardKernels* kernels_;
  int64_t num_ctas_;
  BackwardParams params_{};  // the options; a call adds its tensors to a copy
};

}  // namespace fa
