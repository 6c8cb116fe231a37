// The 16-bit floating-point formats.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "instructions.h"

namespace emulator {

struct Bf16 {
  static float decode(uint16_t bits) {
    const uint32_t word = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
  }
  // To the nearest, ties to even.
  static uint16_t encode(float value) {
    uint32_t word;
    memcpy(&word, &value, 4);
    if (std::isnan(value)) return 0x7FFF;
    return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
  }
};

struct Fp16 {
  inline static const std::array<float, 65536> kValues = [] {
    std::array<float, 65536> values;
    for (uint32_t i = 0; i < 65536; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      float value =
          exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(fraction + 1024), exponent - 25);
      if (exponent == 31) value = fraction == 0 ? INFINITY : NAN;
      values[i] = i >> 15 ? -value : value;
    }
    return values;
  }();

  static float decode(uint16_t bits) { return kValues[bits]; }
  static uint16_t encode(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    if (std::isnan(value)) return 0x7FFF;
    if (magnitude >= 65520.f) return sign | 0x7C00;
    if (magnitude == 0.f) return sign;
    const int exponent = std::max(std::ilogb(magnitude), -14);
    // nearbyint rounds ties to even. A carry into the next exponent is the right result.
    const int fraction = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    return sign | uint16_t((exponent + 14) * 1024 + fraction);
  }
};

inline float decode(Format format, uint16_t bits) {
  return format == Format::kBf16 ? Bf16::decode(bits) : Fp16::decode(bits);
}

inline uint16_t encode(Format format, float value) {
  return format == Format::kBf16 ? Bf16::encode(value) : Fp16::encode(value);
}

}  // namespace emulator
