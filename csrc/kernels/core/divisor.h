// Division by a number that the host knows when it launches.
#pragma once

#include <cstdint>

#include "platform.h"

namespace fa {

// As a product and a shift: a division proper takes many instructions, and registers that the producer does not have.
//
// The multiplier is too large by less than 1, so the quotient of a dividend below 2^31 by less than 2^31 / 2^shift,
// which is no more than 1 / value: not enough to reach the next integer.
struct Divisor {
  int32_t value;
  uint32_t multiplier;  // ceil(2^shift / value)
  int32_t shift;        // 31 + ceil(log2(value)): the multiplier has 32 bits, of which the first is set

  // By `value` >= 1.
  static Divisor of(int value) {
    int shift = 31;
    while (int64_t{1} << (shift - 31) < value) ++shift;
    const uint64_t divisor = uint64_t(value);
    return {value, uint32_t(((uint64_t{1} << shift) + divisor - 1) / divisor), shift};
  }

  // 0 <= dividend < 2^31.
  FA_HOST_DEVICE int divide(int dividend) const { return int(uint64_t(unsigned(dividend)) * multiplier >> shift); }
  // Rounded up; 0 <= dividend <= 2^31 - value.
  FA_HOST_DEVICE int divide_up(int dividend) const { return divide(dividend + (value - 1)); }
};

}  // namespace fa
