// Instructions that CUTLASS has no wrapper for.
#pragma once

#include <cstdint>

#include "enums.h"
#include "platform.h"

namespace fa {

FA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// What follows in program order is issued only when `sum`, which is never negative, is known. The compiler moves waits
// for products up, above arithmetic that does not depend on them, so that it would no longer run beside the products;
// it cannot move them above a branch.
FA_DEVICE void hold_until_known(float sum) {
  if (sum < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// Two floats rounded to 16 bits, `low` in the low half.
template <Dtype kDtype>
FA_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDtype == Dtype::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The two 16-bit floats of a word, the low half first.
template <Dtype kDtype>
FA_DEVICE float2 unpack(uint32_t packed) {
  float2 values;
  if constexpr (kDtype == Dtype::kBf16) {
    values.x = __uint_as_float(packed << 16);
    values.y = __uint_as_float(packed & 0xFFFF0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(packed));
  }
  return values;
}

}  // namespace fa
