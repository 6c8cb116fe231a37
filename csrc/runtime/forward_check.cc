// What the tensors of a forward pass must satisfy to be launched without harm.
#include "call_check.h"
#include "forward.h"

namespace fa {
namespace {

void check_shapes(const ForwardTensors& tensors, const CheckedTensors& checked) {
  const auto& [q, k, v, out, batch] = checked;
  if (tensors.cu_seqlens_k.has_value()) {
    check_shape("k", tensors.k, {k.rows, k.heads, q.columns}, "(total_k, heads_kv, head_dim of q)");
    check_shape("v", tensors.v, {k.rows, k.heads, v.columns}, "(total_k, heads_kv, head_dim_v)");
  } else {
    check_shape("k", tensors.k, {batch, k.rows, k.heads, q.columns}, "(batch, seqlen_k, heads_kv, head_dim of q)");
    check_shape("v", tensors.v, {batch, k.rows, k.heads, v.columns}, "(batch, seqlen_k, heads_kv, head_dim_v)");
  }
  if (tensors.cu_seqlens_q.has_value()) {
    check_shape("out", tensors.out, {q.rows, q.heads, v.columns}, "(total_q, heads_q, head_dim_v)");
    check_shape("lse", tensors.lse, {q.heads, q.rows}, "(heads_q, total_q)");
  } else {
    check_shape("out", tensors.out, {batch, q.rows, q.heads, v.columns}, "(batch, seqlen_q, heads_q, head_dim_v)");
    check_shape("lse", tensors.lse, {batch, q.heads, q.rows}, "(batch, heads_q, seqlen_q)");
  }
  FA_CHECK(q.columns > 0, ValueError) << "q has head_dim 0; required is at least 1";
  FA_CHECK(v.columns > 0, ValueError) << "v has head_dim_v 0; required is at least 1";
}

}  // namespace

CheckedTensors check_forward_tensors(const ForwardTensors& tensors) {
  DLDevice device = tensors.q.device();
  FA_CHECK(device.device_type == kDLCUDA, ValueError)
      << "q is on " << describe(device) << "; the kernels support CUDA devices";
  check_device("k", tensors.k, device);
  check_device("v", tensors.v, device);
  check_device("out", tensors.out, device);
  check_device("lse", tensors.lse, device);

  Layout layout_q = tensors.cu_seqlens_q.has_value() ? Layout::kPacked : Layout::kDense;
  Layout layout_k = tensors.cu_seqlens_k.has_value() ? Layout::kPacked : Layout::kDense;
  CheckedTensors checked{make_row_tensor("q", tensors.q, layout_q), make_row_tensor("k", tensors.k, layout_k),
                         make_row_tensor("v", tensors.v, layout_k), make_row_tensor("out", tensors.out, layout_q),
                         /*batch=*/0};
  check_dtype("k", tensors.k, checked.q.dtype);
  check_dtype("v", tensors.v, checked.q.dtype);
  check_dtype("out", tensors.out, checked.q.dtype);
  checked.batch = batch_size(tensors.cu_seqlens_q, tensors.cu_seqlens_k, checked.q, checked.k);
  check_heads(checked.q, checked.k);
  check_shapes(tensors, checked);
  check_no_stride_0(checked.out);
  check_statistic("lse", tensors.lse);
  check_index_tensors(tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k, checked.batch,
                      device);
  if (tensors.promoted_out.has_value()) check_scratch("promoted_out", tensors.promoted_out.value(), device);
  return checked;
}

}  // namespace fa
