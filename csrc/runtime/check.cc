#include "check.h"

#include <tvm/ffi/dtype.h>

#include <limits>

namespace fa {
namespace {

constexpr DLDataType kInt32{kDLInt, 32, 1};

bool has_shape(const TensorView& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.ndim() != static_cast<int32_t>(shape.size())) return false;
  int dim = 0;
  for (int64_t size : shape) {
    if (tensor.size(dim++) != size) return false;
  }
  return true;
}

}  // namespace

std::string describe(DLDevice device) {
  std::string type = device.device_type == kDLCPU    ? "cpu"
                     : device.device_type == kDLCUDA ? "cuda"
                                                     : "device type " + std::to_string(device.device_type);
  return device.device_type == kDLCPU ? type : type + ":" + std::to_string(device.device_id);
}

std::string describe(DLDataType dtype) { return tvm::ffi::DLDataTypeToString(dtype); }

std::string describe_shape(const TensorView& tensor) { return describe_list(tensor.shape()); }

void check_shape(const char* name, const TensorView& tensor, std::initializer_list<int64_t> shape,
                 const char* meaning) {
  FA_CHECK(has_shape(tensor, shape), ValueError)
      << name << ": shape " << describe_shape(tensor) << " does not fit the other arguments; required is " << meaning
      << " = " << describe_list(shape);
}

void check_device(const char* name, const TensorView& tensor, DLDevice device_of_q) {
  DLDevice device = tensor.device();
  FA_CHECK(device.device_type == device_of_q.device_type && device.device_id == device_of_q.device_id, ValueError)
      << name << " is on " << describe(device) << "; required is q's device, " << describe(device_of_q);
}

void check_dtype(const char* name, const TensorView& tensor, DLDataType dtype) {
  DLDataType given = tensor.dtype();
  FA_CHECK(given.code == dtype.code && given.bits == dtype.bits && given.lanes == dtype.lanes, TypeError)
      << name << " has dtype " << describe(given) << "; required is " << describe(dtype);
}

void check_index_vector(const char* name, const TensorView& tensor, int64_t size, const char* meaning,
                        DLDevice device_of_q) {
  check_device(name, tensor, device_of_q);
  check_dtype(name, tensor, kInt32);
  check_shape(name, tensor, {size}, meaning);
  FA_CHECK(size <= 1 || tensor.stride(0) == 1, ValueError)
      << name << " has stride " << tensor.stride(0) << "; required is a contiguous vector (stride 1)";
}

int32_t checked_int32(const char* name, int64_t value, int64_t minimum) {
  constexpr int64_t kMaximum = std::numeric_limits<int32_t>::max();
  FA_CHECK(minimum <= value && value <= kMaximum, ValueError)
      << name << " is " << value << "; supported is " << minimum << " to " << kMaximum;
  return static_cast<int32_t>(value);
}

}  // namespace fa
