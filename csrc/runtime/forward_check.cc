// What the tensors of a forward pass must satisfy to be launched without harm.
#include "check.h"
#include "forward.h"

namespace fa {
namespace {

constexpr DLDataType kFloat32{kDLFloat, 32, 1};

int64_t batch_size(const ForwardTensors& tensors, const RowTensor& q, const RowTensor& k) {
  if (!tensors.cu_seqlens_q.has_value()) return q.batch;
  if (!tensors.cu_seqlens_k.has_value()) return k.batch;
  const TensorView& cu_seqlens_q = tensors.cu_seqlens_q.value();
  FA_CHECK(cu_seqlens_q.ndim() == 1 && cu_seqlens_q.size(0) >= 1, ValueError)
      << "cu_seqlens_q has shape " << describe_shape(cu_seqlens_q) << "; required is (batch + 1)";
  return cu_seqlens_q.size(0) - 1;
}

void check_heads(const RowTensor& q, const RowTensor& k) {
  FA_CHECK(k.heads > 0 ? q.heads % k.heads == 0 : q.heads == 0, ValueError)
      << "q has " << q.heads << " heads and k has " << k.heads
      << "; required is a number of q's heads that is a multiple of k's";
}

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

// Two rows of a tensor that is written must not share memory.
void check_no_stride_0(const RowTensor& out) {
  bool expanded = (out.batch > 1 && out.batch_stride == 0) || (out.rows > 1 && out.row_stride == 0) ||
                  (out.heads > 1 && out.head_stride == 0);
  FA_CHECK(!expanded, ValueError) << out.name
                                  << " is expanded (a stride is 0), so that several rows share memory; required is a "
                                     "tensor that can be written";
}

void check_lse(const ForwardTensors& tensors) {
  check_dtype("lse", tensors.lse, kFloat32);
  FA_CHECK(tensors.lse.size(-1) <= 1 || tensors.lse.stride(-1) == 1, ValueError)
      << "lse has a stride of " << tensors.lse.stride(-1)
      << " in its last dimension; required is 1 (a contiguous last dimension)";
}

void check_promoted_out(const OptionalTensor& tensor, DLDevice device) {
  if (!tensor.has_value()) return;
  check_device("promoted_out", tensor.value(), device);
  check_dtype("promoted_out", tensor.value(), kFloat32);
  FA_CHECK(tensor.value().IsContiguous(), ValueError)
      << "promoted_out is not contiguous; required is a contiguous tensor";
}

void check_index_tensors(const ForwardTensors& tensors, int64_t batch, DLDevice device) {
  auto check = [&](const char* name, const OptionalTensor& tensor, int64_t size, const char* meaning) {
    if (tensor.has_value()) check_index_vector(name, tensor.value(), size, meaning, device);
  };
  check("cu_seqlens_q", tensors.cu_seqlens_q, batch + 1, "(batch + 1)");
  check("cu_seqlens_k", tensors.cu_seqlens_k, batch + 1, "(batch + 1)");
  check("seqused_q", tensors.seqused_q, batch, "(batch)");
  check("seqused_k", tensors.seqused_k, batch, "(batch)");
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
  checked.batch = batch_size(tensors, checked.q, checked.k);
  check_heads(checked.q, checked.k);
  check_shapes(tensors, checked);
  check_no_stride_0(checked.out);
  check_lse(tensors);
  check_index_tensors(tensors, checked.batch, device);
  check_promoted_out(tensors.promoted_out, device);
  return checked;
}

}  // namespace fa
