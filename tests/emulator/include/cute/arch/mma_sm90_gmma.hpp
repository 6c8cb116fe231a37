// Stand-in for CUTLASS's header: products of a warpgroup.
#pragma once

#include "../../../instructions.h"
#include "copy_sm90.hpp"

namespace cute {

inline void warpgroup_arrive() {}
inline void warpgroup_commit_batch() { emulator::commit_products(); }

template <int kPending>
void warpgroup_wait() {
  emulator::wait_products(kPending);
}

template <class Register>
void warpgroup_fence_operand(Register&) {}

namespace SM90::GMMA {

using Major = emulator::Major;
enum class ScaleOut { Zero, One };

// The accumulator's registers as they are passed one by one, and what becomes of them.
struct Accumulator {
  float* first = nullptr;
  int count = 0;
  bool adds = true;

  void operator()(float& value) {
    if (first == nullptr) first = &value;
    emulator::check(&value == first + count, "accumulators must be neighbours in one array");
    ++count;
  }
  void operator()(ScaleOut scale) { adds = scale == ScaleOut::One; }
};

template <emulator::Format kFormat, int kColumns, Major kMajorA, Major kMajorB, class... Arguments>
void multiply(uint64_t a, const uint32_t* a_words, uint64_t b, Arguments&&... arguments) {
  Accumulator accumulator;
  (accumulator(arguments), ...);
  emulator::check(accumulator.count == kColumns / 2, "a wgmma with another number of accumulators");
  emulator::multiply({kFormat, kColumns, kMajorA, kMajorB, a, b, accumulator.adds}, a_words, accumulator.first);
}

template <emulator::Format kFormat, int kColumns, Major kMajorA, Major kMajorB>
struct SharedShared {
  template <class... Arguments>
  static void fma(uint64_t a, uint64_t b, Arguments&&... arguments) {
    multiply<kFormat, kColumns, kMajorA, kMajorB>(a, nullptr, b, arguments...);
  }
};

template <emulator::Format kFormat, int kColumns, Major kMajorA, Major kMajorB>
struct RegistersShared {
  template <class... Arguments>
  static void fma(const uint32_t& a0, const uint32_t& a1, const uint32_t& a2, const uint32_t& a3, uint64_t b,
                  Arguments&&... arguments) {
    emulator::check(&a1 == &a0 + 1 && &a2 == &a0 + 2 && &a3 == &a0 + 3, "a fragment is one array");
    multiply<kFormat, kColumns, kMajorA, kMajorB>(0, &a0, b, arguments...);
  }
};

#define EMULATED_MMA(n)                                                                                 \
  template <Major kMajorA, Major kMajorB>                                                               \
  using MMA_64x##n##x16_F32BF16BF16_SS = SharedShared<emulator::Format::kBf16, n, kMajorA, kMajorB>;    \
  template <Major kMajorA, Major kMajorB>                                                               \
  using MMA_64x##n##x16_F32F16F16_SS = SharedShared<emulator::Format::kFp16, n, kMajorA, kMajorB>;      \
  template <Major kMajorA, Major kMajorB>                                                               \
  using MMA_64x##n##x16_F32BF16BF16_RS = RegistersShared<emulator::Format::kBf16, n, kMajorA, kMajorB>; \
  template <Major kMajorA, Major kMajorB>                                                               \
  using MMA_64x##n##x16_F32F16F16_RS = RegistersShared<emulator::Format::kFp16, n, kMajorA, kMajorB>;

EMULATED_MMA(8)
EMULATED_MMA(16)
EMULATED_MMA(24)
EMULATED_MMA(32)
EMULATED_MMA(40)
EMULATED_MMA(48)
EMULATED_MMA(56)
EMULATED_MMA(64)
EMULATED_MMA(72)
EMULATED_MMA(80)
EMULATED_MMA(88)
EMULATED_MMA(96)
EMULATED_MMA(104)
EMULATED_MMA(112)
EMULATED_MMA(120)
EMULATED_MMA(128)
EMULATED_MMA(136)
EMULATED_MMA(144)
EMULATED_MMA(152)
EMULATED_MMA(160)
EMULATED_MMA(168)
EMULATED_MMA(176)
EMULATED_MMA(184)
EMULATED_MMA(192)
EMULATED_MMA(200)
EMULATED_MMA(208)
EMULATED_MMA(216)
EMULATED_MMA(224)
EMULATED_MMA(232)
EMULATED_MMA(240)
EMULATED_MMA(248)
EMULATED_MMA(256)
#undef EMULATED_MMA

}  // namespace SM90::GMMA
}  // namespace cute
