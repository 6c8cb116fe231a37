// wgmma: products of a warpgroup, computed some time between their issue and the wait for them.
#pragma once

#include "floats.h"
#include "machine.h"

namespace emulator {

constexpr int kMmaRows = 64, kMmaDepth = 16, kMaxMmaColumns = 256;

enum class Major { K, MN };

// An operand in shared memory (PTX ISA, "Matrix descriptor format" and the canonical layouts).
class OperandTile {
 public:
  explicit OperandTile(uint64_t descriptor)
      : start_(field(descriptor, 0)), leading_(field(descriptor, 16)), stride_(field(descriptor, 32)) {
    constexpr int kWidths[] = {16, 128, 64, 32};
    width_ = kWidths[descriptor >> 62];
  }

  // Of element (index, depth).
  template <Major kMajor>
  uint32_t address(int index, int depth) const {
    uint32_t at;
    if constexpr (kMajor == Major::K) {
      at = start_ + index % 8 * width_ + index / 8 * stride_ + depth * 2;
    } else {
      const int columns = width_ / 2;
      at = start_ + index % columns * 2 + index / columns * leading_ + depth % 8 * width_ + depth / 8 * stride_;
    }
    // The swizzle exchanges units of 16 bytes, by the three bits from bit 7 on; narrow ones use fewer.
    return at ^ ((at >> 7 & (width_ / 16 - 1)) << 4);
  }

 private:
  static uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; }

  uint32_t start_, leading_, stride_;
  int width_;
};

template <class Format, Major kMajor, int kSize>
void load_operand(Cta& cta, uint64_t descriptor, float (&values)[kMmaDepth][kSize], int size) {
  const OperandTile tile(descriptor);
  for (int depth = 0; depth < kMmaDepth; ++depth) {
    for (int i = 0; i < size; ++i) {
      const uint32_t address = tile.address<kMajor>(i, depth);
      if (address % kUnit == 0) machine().check_visible(cta, address, 2);
      uint16_t bits;
      memcpy(&bits, machine().shared_pointer(cta, address, 2), 2);
      values[depth][i] = Format::decode(bits);
    }
  }
}

// Register 2 r + h of a thread holds columns 2 (lane % 4) + 8 h and the next of row lane / 4 + 8 r of its warp's 16.
template <class Format>
void load_fragment(const Product& product, float (&values)[kMmaDepth][kMmaRows]) {
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int word = 0; word < 4; ++word) {
      const int row = t / 32 * 16 + t % 32 / 4 + word % 2 * 8, column = t % 4 * 2 + word / 2 * 8;
      values[column][row] = Format::decode(uint16_t(product.a_words[t][word]));
      values[column + 1][row] = Format::decode(uint16_t(product.a_words[t][word] >> 16));
    }
  }
}

inline int accumulator_row(int t, int i) { return t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8; }
inline int accumulator_column(int t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

template <int kColumns>
void accumulate(Product& product, const float (&a)[kMmaDepth][kMmaRows], const float (&b)[kMmaDepth][kMaxMmaColumns],
                bool adds) {
  static float sums[kMmaRows][kColumns];
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int i = 0; i < kColumns / 2; ++i) {
      sums[accumulator_row(t, i)][accumulator_column(t, i)] = adds ? product.d[t][i] : 0.f;
    }
  }
  for (int row = 0; row < kMmaRows; ++row) {
    for (int depth = 0; depth < kMmaDepth; ++depth) {
      const float factor = a[depth][row];
      for (int column = 0; column < kColumns; ++column) sums[row][column] += factor * b[depth][column];
    }
  }
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int i = 0; i < kColumns / 2; ++i) {
      product.d[t][i] = sums[accumulator_row(t, i)][accumulator_column(t, i)];
    }
  }
}

// The accumulator's registers as they are passed one by one, and what becomes of them.
struct AccumulatorArguments {
  float* first = nullptr;
  int count = 0;
  bool adds = true;

  void operator()(float& value) {
    if (first == nullptr) first = &value;
    machine().check(&value == first + count, "accumulators must be neighbours in one array");
    ++count;
  }
  template <class ScaleOut>
  void operator()(const ScaleOut& scale) {
    adds = scale == ScaleOut::One;
  }
};

inline Product& issue_product() {
  Cta& cta = machine().cta();
  Thread& thread = machine().thread();
  const int warpgroup = machine().warpgroup();
  std::deque<Product>& products = cta.products[warpgroup];
  const size_t position = thread.products++ - cta.products_done[warpgroup];
  if (position == products.size()) products.emplace_back();
  ++products[position].issued;
  return products[position];
}

template <class Format, int kColumns, Major kMajorA, Major kMajorB, class... Arguments>
void multiply(uint64_t a, const uint32_t* a_words, uint64_t b, Arguments&&... arguments) {
  AccumulatorArguments accumulator;
  (accumulator(arguments), ...);
  machine().check(accumulator.count == kColumns / 2, "a wgmma with another number of accumulators");
  Product& product = issue_product();
  const int t = machine().thread().index % kWarpgroupLanes;
  const bool in_registers = a_words != nullptr, adds = accumulator.adds;
  machine().check(product.issued == 1 || (product.a == a && product.b == b), "threads disagree on a wgmma's operands");
  product.a = a;
  product.b = b;
  product.a_words[t] = a_words;
  product.d[t] = accumulator.first;
  product.compute = [in_registers, adds](Cta& cta, Product& ready) {
    static float left[kMmaDepth][kMmaRows], right[kMmaDepth][kMaxMmaColumns];
    if (in_registers) {
      load_fragment<Format>(ready, left);
    } else {
      load_operand<Format, kMajorA>(cta, ready.a, left, kMmaRows);
    }
    load_operand<Format, kMajorB>(cta, ready.b, right, kColumns);
    accumulate<kColumns>(ready, left, right, adds);
  };
}

inline void commit_products() { machine().thread().product_groups.push_back(machine().thread().products); }

// Until at most `pending` groups are under way.
inline void wait_products(size_t pending) {
  const auto& groups = machine().thread().product_groups;
  if (groups.size() <= pending) return;
  const size_t wanted = groups[groups.size() - 1 - pending];
  const size_t* const done = &machine().cta().products_done[machine().warpgroup()];
  machine().wait("products", [done, wanted] { return *done >= wanted; });
}

}  // namespace emulator
