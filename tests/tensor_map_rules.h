// What cuda.h says that the driver requires of a tensor map of 16-bit elements, for those that stand in for it.
#pragma once

#include <cuda.h>

#include <cstdint>

inline bool is_legal_map(const CUtensorMap* map, uint32_t rank, const void* address, const cuuint64_t* sizes,
                         const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides) {
  constexpr uint32_t kMaxRank = 5, kMaxBox = 256, kMaxElementStride = 8, kElementBytes = 2;
  constexpr uint64_t kMaxSize = uint64_t(1) << 32, kStrideLimit = uint64_t(1) << 40;
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0 || reinterpret_cast<uintptr_t>(address) % 16 != 0) return false;
  if (rank == 0 || rank > kMaxRank || box[0] * kElementBytes % 16 != 0) return false;
  for (uint32_t dim = 0; dim < rank; ++dim) {
    if (sizes[dim] == 0 || sizes[dim] > kMaxSize || box[dim] == 0 || box[dim] > kMaxBox) return false;
    if (element_strides[dim] == 0 || element_strides[dim] > kMaxElementStride) return false;
    if (dim > 0 && (strides[dim - 1] % 16 != 0 || strides[dim - 1] >= kStrideLimit)) return false;
  }
  return true;
}
