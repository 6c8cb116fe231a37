#include "row_tensor.h"

#include "check.h"

namespace fa {
namespace {

void check_element_type(const char* name, DLDataType dtype) {
  bool known = (dtype.code == kDLFloat || dtype.code == kDLBfloat) && dtype.bits == 16 && dtype.lanes == 1;
  FA_CHECK(known, TypeError) << name << " has dtype " << describe(dtype) << "; supported are float16 and bfloat16";
}

}  // namespace

RowTensor make_row_tensor(const char* name, const TensorView& tensor, Layout layout) {
  check_element_type(name, tensor.dtype());
  bool dense = layout == Layout::kDense;
  FA_CHECK(tensor.ndim() == (dense ? 4 : 3), ValueError)
      << name << " has shape " << describe_shape(tensor) << "; required is "
      << (dense ? "(batch, seqlen, heads, head_dim), since no cu_seqlens are given for it"
                : "(total rows, heads, head_dim), since cu_seqlens are given for it");
  RowTensor rows{};
  rows.name = name;
  rows.address = reinterpret_cast<uintptr_t>(data_address(tensor));
  rows.dtype = tensor.dtype();
  rows.batch = dense ? tensor.size(0) : 1;
  rows.rows = tensor.size(-3);
  rows.heads = tensor.size(-2);
  rows.columns = tensor.size(-1);
  rows.batch_stride = dense ? tensor.stride(0) : 0;
  rows.row_stride = tensor.stride(-3);
  rows.head_stride = tensor.stride(-2);
  rows.column_stride = tensor.stride(-1);
  return rows;
}

}  // namespace fa
