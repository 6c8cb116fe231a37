// Stand-in for CUTLASS's header: products of a warp.
#pragma once

#include "../../../instructions.h"

namespace cute {

template <emulator::Format kFormat>
struct WarpProduct {
  static void fma(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                  uint32_t b0, uint32_t b1, float c0, float c1, float c2, float c3) {
    d0 = c0, d1 = c1, d2 = c2, d3 = c3;
    float* const d[] = {&d0, &d1, &d2, &d3};
    const uint32_t a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
    emulator::multiply_in_warp(kFormat, d, a, b);
  }
};

using SM80_16x8x16_F32BF16BF16F32_TN = WarpProduct<emulator::Format::kBf16>;
using SM80_16x8x16_F32F16F16F32_TN = WarpProduct<emulator::Format::kFp16>;

}  // namespace cute
