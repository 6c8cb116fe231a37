// Argument checks: every failure is a typed exception that names the argument, what came and what is allowed.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/optional.h>

#include <cstdint>
#include <initializer_list>
#include <string>

// FA_CHECK(condition, ValueError) << "text" throws when the condition fails. The text is formatted only then.
#define FA_CHECK(condition, ErrorKind)        \
  if (__builtin_expect(bool(condition), 1)) { \
  } else                                      \
    TVM_FFI_THROW(ErrorKind)

namespace fa {

using tvm::ffi::TensorView;

std::string describe(DLDevice device);                 // "cuda:1"
std::string describe(DLDataType dtype);                // "bfloat16"
std::string describe_shape(const TensorView& tensor);  // "(2, 128, 8, 64)"

template <typename Range>
std::string describe_list(const Range& values) {  // "(2, 128, 8, 64)"
  std::string text;
  for (auto value : values) text += (text.empty() ? "(" : ", ") + std::to_string(value);
  return text.empty() ? "()" : text + ")";
}

// Throws ValueError unless the tensor has exactly this shape. `meaning` names the dimensions.
void check_shape(const char* name, const TensorView& tensor, std::initializer_list<int64_t> shape, const char* meaning);

// Throws ValueError unless the tensor lies on q's device.
void check_device(const char* name, const TensorView& tensor, DLDevice device_of_q);

// Throws TypeError unless the tensor has this dtype.
void check_dtype(const char* name, const TensorView& tensor, DLDataType dtype);

// Throws unless the tensor is a contiguous int32 vector of `size` elements on q's device.
void check_index_vector(const char* name, const TensorView& tensor, int64_t size, const char* meaning,
                        DLDevice device_of_q);

// Narrows to int32, or throws ValueError unless minimum <= value <= 2^31 - 1.
int32_t checked_int32(const char* name, int64_t value, int64_t minimum);

using OptionalTensor = tvm::ffi::Optional<TensorView>;

inline char* data_address(const TensorView& tensor) {
  return static_cast<char*>(tensor.data_ptr()) + tensor.byte_offset();
}

inline const int32_t* index_pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? reinterpret_cast<const int32_t*>(data_address(tensor.value())) : nullptr;
}

}  // namespace fa
