// Where the elements of matrices lie, in shared memory and in registers (PTX ISA, "Matrix descriptor format", "Matrix
// Fragments" and the canonical layouts). tests/cpu/test_layouts.py compares all this with what CuTe says.
#pragma once

#include <cstdint>

#include "instructions.h"

namespace emulator {

// Tiles with a swizzle of `width` bytes, as the copy engine writes and wgmma reads them, exchange units of 16 bytes by
// the three bits from bit 7 of the address on; narrow ones use fewer.
inline uint32_t swizzled(uint32_t address, int width) {
  return address ^ ((address >> 7 & uint32_t(width / kUnit - 1)) << 4);
}

// An operand of wgmma in shared memory.
class OperandTile {
 public:
  explicit OperandTile(uint64_t descriptor)
      : start_(field(descriptor, 0)), leading_(field(descriptor, 16)), stride_(field(descriptor, 32)) {
    constexpr int kWidths[] = {16, 128, 64, 32};
    width_ = kWidths[descriptor >> 62];
  }

  // Of element (index, depth).
  uint32_t address(Major major, int index, int depth) const {
    uint32_t at;
    if (major == Major::K) {
      at = start_ + index % 8 * width_ + index / 8 * stride_ + depth * 2;
    } else {
      const int columns = width_ / 2;
      at = start_ + index % columns * 2 + index / columns * leading_ + depth % 8 * width_ + depth / 8 * stride_;
    }
    return swizzled(at, width_);
  }

 private:
  static uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; }

  uint32_t start_, leading_, stride_;
  int width_;
};

struct Element {
  int row, column;
};

// Element `i` of thread `t`: of a warpgroup's accumulator and of its operand in registers, where two neighbours share a
// register; of a warp, the same of mma.m16n8k16.
inline Element register_element(int t, int i) {
  return {t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8, i / 4 * 8 + t % 4 * 2 + i % 2};
}

// Of the second operand of mma.m16n8k16, whose rows are the depth.
inline Element second_operand_element(int lane, int i) { return {i / 2 * 8 + lane % 4 * 2 + i % 2, lane / 4}; }

// Whose row of an 8x8 matrix, and from which of its bytes on, a lane's word `word` is in stmatrix.x4 and ldmatrix.x4.
struct MatrixWord {
  int lane, byte;
};
inline MatrixWord matrix_word(int lane, int word) { return {word * 8 + lane / 4, lane % 4 * 4}; }

}  // namespace emulator
