#include "tensor_map.h"

#include <limits>

#include "check.h"
#include "driver.h"

namespace fa {
namespace {

constexpr int64_t kElementBytes = 2;
constexpr int64_t kAlignment = 16;                  // of the base address and of every stride
constexpr int64_t kStrideLimit = int64_t{1} << 40;  // bytes
constexpr int64_t kMaxCoordinate = std::numeric_limits<int32_t>::max();

// Bytes. The stride of a dimension of size 1 is never stepped over and may hold anything, so a valid one
// takes its place.
uint64_t stride_bytes(const char* name, const char* dimension, int64_t size, int64_t stride) {
  if (size <= 1) return kAlignment;
  constexpr int64_t kAlignmentElements = kAlignment / kElementBytes;
  FA_CHECK(0 <= stride && stride < kStrideLimit / kElementBytes && stride % kAlignmentElements == 0, ValueError)
      << name << " has a stride of " << stride << " elements between " << dimension << "; supported are multiples of "
      << kAlignmentElements << " elements (" << kAlignment << " bytes) from 0 to below 2^39 elements";
  return static_cast<uint64_t>(stride * kElementBytes);
}

void check_size(const char* name, const char* dimension, int64_t size) {
  FA_CHECK(size <= kMaxCoordinate, ValueError)
      << name << " has " << size << ' ' << dimension << "; supported is at most " << kMaxCoordinate;
}

void check_layout(const RowTensor& tensor) {
  FA_CHECK(tensor.columns == 1 || tensor.column_stride == 1, ValueError)
      << tensor.name << " has a stride of " << tensor.column_stride
      << " in its last dimension; required is 1 (a contiguous last dimension)";
  FA_CHECK(tensor.address % kAlignment == 0, ValueError)
      << tensor.name << " starts at address 0x" << std::hex << tensor.address << std::dec << ", "
      << tensor.address % kAlignment << " bytes past a multiple of " << kAlignment
      << "; required is an address aligned to " << kAlignment << " bytes";
  check_size(tensor.name, "columns", tensor.columns);
  check_size(tensor.name, "heads", tensor.heads);
  check_size(tensor.name, "rows", tensor.rows);
  check_size(tensor.name, "sequences", tensor.batch);
}

// 128 or 64 bytes; no kernel is loaded with another box.
CUtensorMapSwizzle swizzle_of(const TensorMapBox& box) {
  return box.columns * kElementBytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
}

}  // namespace

TensorMapGeometry tensor_map_geometry(const RowTensor& tensor) {
  check_layout(tensor);
  uint64_t head_stride = stride_bytes(tensor.name, "heads", tensor.heads, tensor.head_stride);
  uint64_t row_stride = stride_bytes(tensor.name, "rows", tensor.rows, tensor.row_stride);
  uint64_t batch_stride = stride_bytes(tensor.name, "sequences", tensor.batch, tensor.batch_stride);

  uint64_t bound = static_cast<uint64_t>(tensor.rows);
  FA_CHECK(row_stride == 0 || bound <= tensor.address / row_stride, ValueError)
      << tensor.name << " has " << bound << " rows of stride " << row_stride << " bytes at address 0x" << std::hex
      << tensor.address << "; required is an extent that does not exceed the address";
  return TensorMapGeometry{tensor.address - bound * row_stride,
                           {static_cast<uint64_t>(tensor.columns), static_cast<uint64_t>(tensor.heads), bound,
                            bound + 1, static_cast<uint64_t>(tensor.batch)},
                           {head_stride, row_stride, row_stride, batch_stride}};
}

void encode_tensor_map(const RowTensor& tensor, const TensorMapBox& box, CUtensorMap& map) {
  TensorMapGeometry geometry = tensor_map_geometry(tensor);
  std::array<uint32_t, 5> box_sizes{box.columns, box.heads, box.rows, 1, 1};
  std::array<uint32_t, 5> element_strides{1, 1, 1, 1, 1};
  CUtensorMapDataType type =
      tensor.dtype.code == kDLBfloat ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  CUresult result = driver().cuTensorMapEncodeTiled(
      &map, type, geometry.sizes.size(), reinterpret_cast<void*>(geometry.base), geometry.sizes.data(),
      geometry.strides.data(), box_sizes.data(), element_strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box),
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  FA_CHECK(result == CUDA_SUCCESS, ValueError)
      << tensor.name << ": the driver refuses its tensor map, " << describe(result)
      << "; (column, head, row, origin, batch) sizes " << describe_list(geometry.sizes) << ", strides in bytes "
      << describe_list(geometry.strides) << ", address 0x" << std::hex << tensor.address
      << "; a copy with .contiguous() is supported";
}

}  // namespace fa
