// What the stand-in driver writes into the 128 opaque bytes of a tensor map.
#pragma once

#include <cstdint>

#include "instructions.h"

namespace emulator {

constexpr int kMapElementBytes = 2;

struct TensorMap {
  static constexpr uint32_t kMark = 0x7E4502;

  uint32_t mark;
  uint32_t swizzle_bytes;
  uint64_t base;
  uint64_t sizes[kMapDims];
  uint64_t strides[kMapDims - 1];  // bytes, of dimensions 1 to 4
  uint16_t box[kMapDims];
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace emulator
