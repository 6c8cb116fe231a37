// The forward pass: checks the arguments, fills the kernel's parameters, launches.
#pragma once

#include <cstdint>

#include "check.h"
#include "kernel_registry.h"
#include "kernels/params.h"
#include "row_tensor.h"
#include "tensor_map.h"

namespace fa {

// The tensors of one call, as the caller gave them. Columns of q and k: head_dim; of v and out: head_dim_v.
struct ForwardTensors {
  tvm::ffi::TensorView q;       // (batch, seqlen_q, heads_q, head_dim), or (total_q, heads_q, head_dim)
  tvm::ffi::TensorView k;       // (batch, seqlen_k, heads_kv, head_dim), or (total_k, heads_kv, head_dim)
  tvm::ffi::TensorView v;       // as k, with head_dim_v columns
  tvm::ffi::TensorView out;     // as q, with head_dim_v columns; written
  tvm::ffi::TensorView lse;     // fp32 (batch, heads_q, seqlen_q), or (heads_q, total_q); written
  OptionalTensor cu_seqlens_q;  // int32 (batch + 1): q, out and lse are packed
  OptionalTensor cu_seqlens_k;  // int32 (batch + 1): k and v are packed
  OptionalTensor seqused_q;     // int32 (batch)
  OptionalTensor seqused_k;     // int32 (batch)
  OptionalTensor promoted_out;  // fp32, contiguous: scratch, wanted where a sequence has more than kPromotionKeys keys
};

// A loaded kernel, and what else is fixed when it is compiled.
struct ForwardKernel {
  Kernel kernel;
  int32_t promoted_floats;  // of ForwardParams::promoted_out, for each CTA
  TensorMapBox q_box;
  TensorMapBox k_box;
  TensorMapBox v_box;
  TensorMapBox o_box;
};

// What a launch is told beside its tensors; the meaning is that of the same names in ForwardParams.
struct ForwardOptions {
  int64_t max_seqlen_q;  // read with cu_seqlens_q; the seqlen of a dense q is its own
  int64_t max_seqlen_k;  // read with cu_seqlens_k
  int64_t num_ctas;      // 0: nothing is launched
  int64_t packed_heads;  // of ForwardParams::packing
  int64_t num_value_passes;
  int64_t heads_per_section;
  int64_t least_heads_in_last_section;
  double score_scale;
  double exp2_scale;
  int64_t window_left;
  int64_t window_right;
  int64_t attention_chunk;
};

// The tensors of a call after all checks.
struct CheckedTensors {
  RowTensor q;
  RowTensor k;
  RowTensor v;
  RowTensor out;
  int64_t batch;
};

// Throws ValueError or TypeError, naming the argument, for tensors that do not fit together.
CheckedTensors check_forward_tensors(const ForwardTensors& tensors);

// A forward pass but for its tensors: what all calls of one signature share is judged and converted once.
class ForwardLauncher {
 public:
  // Throws ValueError for an unknown handle (it is not read where num_ctas is 0) or an option that does not fit.
  ForwardLauncher(int64_t handle, const ForwardOptions& options);

  // Enqueues one forward pass on the current stream of the tensors' device. Nothing is written, and nothing is
  // launched, if it throws, if the output is empty or if num_ctas is 0. Waits for nothing and allocates nothing, but
  // for the tile counters (tile_counters.h). May be called by several threads at once.
  void operator()(const ForwardTensors& tensors) const;

 private:
  float* promoted_out(const OptionalTensor& tensor) const;

  const ForwardKernel* kernel_ = nullptr;  // null: nothing is launched
  uint32_t num_ctas_;
  ForwardParams params_{};  // the options; a call adds its tensors to a copy
};

}  // namespace fa
