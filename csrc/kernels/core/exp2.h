// 2^x by a polynomial: for a share of the softmax's exponentials, since the unit that computes ex2 does 16 of them a
// clock and multiprocessor, while the FMA pipes have time to spare.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace fa {

FA_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

FA_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The number in [least, most] that is nearest to `x`; NaN if that is.
FA_HOST_DEVICE float clamp_or_nan(float x, float least, float most) {
#if defined(__CUDA_ARCH__)
  asm("max.NaN.f32 %0, %0, %1;\nmin.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(least), "f"(most));
  return x;
#else
  return x < least ? least : x > most ? most : x;
#endif
}

// 2^x to a relative error of 3e-6 (bfloat16 rounds to 2e-3, float16 to 2.4e-4); exact for whole numbers. What is above
// 2^127 becomes 2^127. What is below 2^-126 becomes 2^-126, -infinity too: a masked score must not come here.
FA_HOST_DEVICE float exp2_polynomial(float x) {
  // Adding 1.5 * 2^23 leaves no bits for a fraction: the sum's last bits are x rounded to a whole number, and with 127
  // more, the exponent field of a power of two.
  constexpr float kRound = 12582912.f + 127.f;
  const float clamped = clamp_or_nan(x, -126.f, 127.f);
  const float rounded = clamped + kRound;
  const float fraction = clamped - (rounded - kRound);  // in [-1/2, 1/2]
  // The minimax polynomial of degree 4 with value 1 at 0.
  float power = 0.009582818485796452f;
  power = power * fraction + 0.05590637028217316f;
  power = power * fraction + 0.24024099111557007f;
  power = power * fraction + 0.6931241750717163f;
  power = power * fraction + 1.f;
  // A product, not a sum of bits: that would make a finite number of the NaN that GPUs have, 0x7FFFFFFF.
  return power * float_of(bits_of(rounded) << 23);
}

}  // namespace fa
