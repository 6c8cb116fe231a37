// What the tensors of a backward pass must satisfy to be launched without harm.
#include "backward.h"
#include "call_check.h"

namespace fa {
namespace {

struct NamedTensor {
  const char* name;
  const TensorView& tensor;
};

// Rows of statistics that each head needs (BackwardParams); csrc/kernels/core/seqlen.h lays them out.
int64_t scratch_rows(const CheckedBackwardTensors& checked, int64_t block_m, bool packed) {
  int64_t rows = checked.q.rows + (packed ? checked.batch * block_m : 0);
  return checked_int32("rows of q, filled up to whole blocks", (rows + block_m - 1) / block_m * block_m, 0);
}

void check_key_shapes(const BackwardTensors& tensors, const CheckedBackwardTensors& checked) {
  const auto& [dout, q, k, v, out, dq, dk, dv, batch, rows] = checked;
  if (tensors.cu_seqlens_k.has_value()) {
    for (auto [name, tensor] : {NamedTensor{"k", tensors.k}, {"dk", tensors.dk}}) {
      check_shape(name, tensor, {k.rows, k.heads, q.columns}, "(total_k, heads_kv, head_dim of q)");
    }
    for (auto [name, tensor] : {NamedTensor{"v", tensors.v}, {"dv", tensors.dv}}) {
      check_shape(name, tensor, {k.rows, k.heads, v.columns}, "(total_k, heads_kv, head_dim_v)");
    }
    return;
  }
  for (auto [name, tensor] : {NamedTensor{"k", tensors.k}, {"dk", tensors.dk}}) {
    check_shape(name, tensor, {batch, k.rows, k.heads, q.columns}, "(batch, seqlen_k, heads_kv, head_dim of q)");
  }
  for (auto [name, tensor] : {NamedTensor{"v", tensors.v}, {"dv", tensors.dv}}) {
    check_shape(name, tensor, {batch, k.rows, k.heads, v.columns}, "(batch, seqlen_k, heads_kv, head_dim_v)");
  }
}

void check_query_shapes(const BackwardTensors& tensors, const CheckedBackwardTensors& checked) {
  const auto& [dout, q, k, v, out, dq, dk, dv, batch, rows] = checked;
  if (tensors.cu_seqlens_q.has_value()) {
    check_shape("dq", tensors.dq, {q.rows, q.heads, q.columns}, "(total_q, heads_q, head_dim)");
    for (auto [name, tensor] : {NamedTensor{"out", tensors.out}, {"dout", tensors.dout}}) {
      check_shape(name, tensor, {q.rows, q.heads, v.columns}, "(total_q, heads_q, head_dim_v)");
    }
    check_shape("lse", tensors.lse, {q.heads, q.rows}, "(heads_q, total_q)");
    if (tensors.dlse.has_value()) check_shape("dlse", tensors.dlse.value(), {q.heads, q.rows}, "(heads_q, total_q)");
    check_shape("statistics", tensors.statistics, {2, q.heads, rows}, "(2, heads_q, rows in whole blocks)");
    return;
  }
  check_shape("dq", tensors.dq, {batch, q.rows, q.heads, q.columns}, "(batch, seqlen_q, heads_q, head_dim)");
  for (auto [name, tensor] : {NamedTensor{"out", tensors.out}, {"dout", tensors.dout}}) {
    check_shape(name, tensor, {batch, q.rows, q.heads, v.columns}, "(batch, seqlen_q, heads_q, head_dim_v)");
  }
  check_shape("lse", tensors.lse, {batch, q.heads, q.rows}, "(batch, heads_q, seqlen_q)");
  if (tensors.dlse.has_value()) {
    check_shape("dlse", tensors.dlse.value(), {batch, q.heads, q.rows}, "(batch, heads_q, seqlen_q)");
  }
  check_shape("statistics", tensors.statistics, {2, batch, q.heads, rows}, "(2, batch, heads_q, rows in whole blocks)");
}

// Rows are read and written in parts of 16 bytes.
void check_columns(const char* name, int64_t columns, int64_t tile) {
  constexpr int64_t kColumnsPerAccess = 8;
  FA_CHECK(0 < columns && columns <= tile && columns % kColumnsPerAccess == 0, ValueError)
      << name << " has " << columns << " columns; supported by this kernel are multiples of " << kColumnsPerAccess
      << " up to " << tile;
}

void check_not_empty(const RowTensor& tensor, const TensorView& given) {
  FA_CHECK(!tensor.empty(), ValueError) << tensor.name << " has shape " << describe_shape(given)
                                        << "; required is a tensor that is not empty, since otherwise all gradients "
                                           "are zero";
}

void check_layout(const BackwardTensors& tensors, const BackwardKernels& kernels) {
  bool varlen = tensors.cu_seqlens_q.has_value() || tensors.cu_seqlens_k.has_value() || tensors.seqused_q.has_value() ||
                tensors.seqused_k.has_value();
  FA_CHECK(varlen == kernels.varlen, ValueError)
      << "cu_seqlens and seqused are " << (varlen ? "given" : "not given") << "; this kernel "
      << (kernels.varlen ? "requires one of them" : "supports sequences of equal length only");
}

}  // namespace

CheckedBackwardTensors check_backward_tensors(const BackwardTensors& tensors, const BackwardKernels& kernels) {
  DLDevice device = tensors.q.device();
  FA_CHECK(device.device_type == kDLCUDA, ValueError)
      << "q is on " << describe(device) << "; the kernels support CUDA devices";
  check_layout(tensors, kernels);
  Layout layout_q = tensors.cu_seqlens_q.has_value() ? Layout::kPacked : Layout::kDense;
  Layout layout_k = tensors.cu_seqlens_k.has_value() ? Layout::kPacked : Layout::kDense;
  const RowTensor q = make_row_tensor("q", tensors.q, layout_q);
  auto rows_of = [&](const char* name, const TensorView& tensor, Layout layout) {
    check_device(name, tensor, device);
    RowTensor rows = make_row_tensor(name, tensor, layout);
    check_dtype(name, tensor, q.dtype);
    return rows;
  };
  CheckedBackwardTensors checked{rows_of("dout", tensors.dout, layout_q),
                                 q,
                                 rows_of("k", tensors.k, layout_k),
                                 rows_of("v", tensors.v, layout_k),
                                 rows_of("out", tensors.out, layout_q),
                                 rows_of("dq", tensors.dq, layout_q),
                                 rows_of("dk", tensors.dk, layout_k),
                                 rows_of("dv", tensors.dv, layout_k),
                                 /*batch=*/0,
                                 /*scratch_rows=*/0};
  checked.batch = batch_size(tensors.cu_seqlens_q, tensors.cu_seqlens_k, checked.q, checked.k);
  checked.scratch_rows = scratch_rows(checked, kernels.block_m, tensors.cu_seqlens_q.has_value());
  check_heads(checked.q, checked.k);
  check_key_shapes(tensors, checked);
  check_scratch("statistics", tensors.statistics, device);
  check_query_shapes(tensors, checked);
  FA_CHECK(checked.batch > 0, ValueError) << "there is no sequence; required is at least one, since otherwise all "
                                             "gradients are zero";
  check_not_empty(checked.q, tensors.q);
  check_not_empty(checked.k, tensors.k);
  check_columns("q", checked.q.columns, kernels.head_dim);
  check_columns("v", checked.v.columns, kernels.head_dim_v);
  for (const RowTensor& written : {checked.dq, checked.dk, checked.dv}) check_no_stride_0(written);
  // Kernels address the rows of all that are written and of these two by themselves, in the tensor maps' terms.
  for (const RowTensor& rows : {checked.out, checked.dq}) tensor_map_geometry(rows);
  check_device("lse", tensors.lse, device);
  check_statistic("lse", tensors.lse);
  if (tensors.dlse.has_value()) {
    check_device("dlse", tensors.dlse.value(), device);
    check_statistic("dlse", tensors.dlse.value());
  }
  check_index_tensors(tensors.cu_seqlens_q, tensors.cu_seqlens_k, tensors.seqused_q, tensors.seqused_k, checked.batch,
                      device);
  check_scratch("dq_scratch", tensors.dq_scratch, device);
  int64_t needed = kernels.dq_scratch_floats(tensors.statistics.numel() / 2);
  FA_CHECK(tensors.dq_scratch.numel() >= needed, ValueError)
      << "dq_scratch has " << tensors.dq_scratch.numel() << " elements; required are at least " << needed;
  return checked;
}

}  // namespace fa
