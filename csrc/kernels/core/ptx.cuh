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

}  // namespace fa
