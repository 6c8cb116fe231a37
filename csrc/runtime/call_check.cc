#include "call_check.h"

namespace fa {
namespace {

constexpr DLDataType kFloat32{kDLFloat, 32, 1};

}  // namespace

int64_t batch_size(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, const RowTensor& q,
                   const RowTensor& k) {
  if (!cu_seqlens_q.has_value()) return q.batch;
  if (!cu_seqlens_k.has_value()) return k.batch;
  const TensorView& offsets = cu_seqlens_q.value();
  FA_CHECK(offsets.ndim() == 1 && offsets.size(0) >= 1, ValueError)
      << "cu_seqlens_q has shape " << describe_shape(offsets) << "; required is (batch + 1)";
  return offsets.size(0) - 1;
}

void check_heads(const RowTensor& q, const RowTensor& k) {
  FA_CHECK(k.heads > 0 ? q.heads % k.heads == 0 : q.heads == 0, ValueError)
      << "q has " << q.heads << " heads and k has " << k.heads
      << "; required is a number of q's heads that is a multiple of k's";
}

void check_no_stride_0(const RowTensor& written) {
  bool expanded = (written.batch > 1 && written.batch_stride == 0) || (written.rows > 1 && written.row_stride == 0) ||
                  (written.heads > 1 && written.head_stride == 0);
  FA_CHECK(!expanded, ValueError) << written.name
                                  << " is expanded (a stride is 0), so that several rows share memory; required is a "
                                     "tensor that can be written";
}

void check_statistic(const char* name, const TensorView& tensor) {
  check_dtype(name, tensor, kFloat32);
  FA_CHECK(tensor.size(-1) <= 1 || tensor.stride(-1) == 1, ValueError)
      << name << " has a stride of " << tensor.stride(-1)
      << " in its last dimension; required is 1 (a contiguous last dimension)";
}

void check_scratch(const char* name, const TensorView& tensor, DLDevice device_of_q) {
  check_device(name, tensor, device_of_q);
  check_dtype(name, tensor, kFloat32);
  FA_CHECK(tensor.IsContiguous(), ValueError) << name << " is not contiguous; required is a contiguous tensor";
}

void check_index_tensors(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                         const OptionalTensor& seqused_q, const OptionalTensor& seqused_k, int64_t batch,
                         DLDevice device_of_q) {
  auto check = [&](const char* name, const OptionalTensor& tensor, int64_t size, const char* meaning) {
    if (tensor.has_value()) check_index_vector(name, tensor.value(), size, meaning, device_of_q);
  };
  check("cu_seqlens_q", cu_seqlens_q, batch + 1, "(batch + 1)");
  check("cu_seqlens_k", cu_seqlens_k, batch + 1, "(batch + 1)");
  check("seqused_q", seqused_q, batch, "(batch)");
  check("seqused_k", seqused_k, batch, "(batch)");
}

}  // namespace fa
