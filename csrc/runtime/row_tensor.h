// q, k, v and out in one form: rows of heads of columns.
#pragma once

#include <tvm/ffi/container/tensor.h>

#include <cstdint>

namespace fa {

enum class Layout {
  kDense,   // (batch, seqlen, heads, head_dim)
  kPacked,  // (total rows, heads, head_dim): the sequences of a batch one after another
};

// A packed tensor is a batch of one. Strides are in elements; those of dimensions of size 1 mean nothing.
struct RowTensor {
  const char* name;
  uintptr_t address;
  DLDataType dtype;
  int64_t batch;
  int64_t rows;
  int64_t heads;
  int64_t columns;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t head_stride;
  int64_t column_stride;

  bool empty() const { return batch == 0 || rows == 0 || heads == 0 || columns == 0; }
};

// Throws ValueError on another rank, TypeError unless the dtype is float16 or bfloat16.
RowTensor make_row_tensor(const char* name, const tvm::ffi::TensorView& tensor, Layout layout);

}  // namespace fa
