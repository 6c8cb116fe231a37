// wgmma: products of a warpgroup, computed some time between their issue and the wait for them.
#include "floats.h"
#include "layouts.h"
#include "machine.h"

namespace emulator {

namespace {

constexpr int kMmaRows = 64, kMmaDepth = 16, kMaxMmaColumns = 256, kFragmentWords = 4;

// Values of an operand, by depth.
template <int kSize>
using Operand = float[kMmaDepth][kSize];

// The elements of a unit of 16 bytes are neighbours in depth, or in the other direction.
template <int kSize>
void load_operand(Cta& cta, const Visitor& visitor, Format format, Major major, uint64_t descriptor,
                  Operand<kSize>& values, int size) {
  constexpr int kUnitElements = kUnit / 2;
  const OperandTile tile(descriptor);
  const bool in_depth = major == Major::K;
  const int index_step = in_depth ? 1 : kUnitElements, depth_step = in_depth ? kUnitElements : 1;
  for (int depth = 0; depth < kMmaDepth; depth += depth_step) {
    for (int index = 0; index < size; index += index_step) {
      const uint32_t address = tile.address(major, index, depth);
      const uint8_t* const unit = machine().shared_pointer(cta, address, kUnit);
      machine().order().visit_shared(visitor, cta, address, kUnit, Access::kRead);
      for (int i = 0; i < kUnitElements; ++i) {
        uint16_t bits;
        memcpy(&bits, unit + i * 2, 2);
        values[in_depth ? depth + i : depth][in_depth ? index : index + i] = decode(format, bits);
      }
    }
  }
}

void load_fragment(const Product& product, Operand<kMmaRows>& values) {
  const Format format = product.what.format;
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int i = 0; i < 2 * kFragmentWords; ++i) {
      const auto [row, depth] = register_element(t, i);
      values[depth][row] = decode(format, uint16_t(product.a_words[t][i / 2] >> i % 2 * 16));
    }
  }
}

void accumulate(Product& product, const Operand<kMmaRows>& a, const Operand<kMaxMmaColumns>& b) {
  static float sums[kMmaRows][kMaxMmaColumns];
  const int columns = product.what.columns;
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int i = 0; i < columns / 2; ++i) {
      const auto [row, column] = register_element(t, i);
      sums[row][column] = product.what.adds ? product.d[t][i] : 0.f;
    }
  }
  for (int row = 0; row < kMmaRows; ++row) {
    for (int depth = 0; depth < kMmaDepth; ++depth) {
      const float factor = a[depth][row];
      for (int column = 0; column < columns; ++column) sums[row][column] += factor * b[depth][column];
    }
  }
  for (int t = 0; t < kWarpgroupLanes; ++t) {
    for (int i = 0; i < columns / 2; ++i) {
      const auto [row, column] = register_element(t, i);
      product.d[t][i] = sums[row][column];
    }
  }
}

void compute(Cta& cta, int warpgroup, Product& product) {
  static Operand<kMmaRows> left;
  static Operand<kMaxMmaColumns> right;
  const Multiplication& what = product.what;
  const Visitor visitor = {cta.products_party(warpgroup), product.number, product.knows, Proxy::kAsynchronous};
  if (product.a_words[0] != nullptr) {
    load_fragment(product, left);
  } else {
    load_operand(cta, visitor, what.format, what.major_a, what.a, left, kMmaRows);
  }
  load_operand(cta, visitor, what.format, what.major_b, what.b, right, what.columns);
  accumulate(product, left, right);
}

}  // namespace

// In the order of issue within a warpgroup.
bool multiply_one(Cta& cta, Random& random) {
  const size_t first = random() % cta.products.size();
  for (size_t i = 0; i < cta.products.size(); ++i) {
    const size_t warpgroup = (first + i) % cta.products.size();
    std::deque<Product>& products = cta.products[warpgroup];
    if (products.empty() || products.front().issued < kWarpgroupLanes) continue;
    compute(cta, int(warpgroup), products.front());
    products.pop_front();
    ++cta.products_done[warpgroup];
    return true;
  }
  return false;
}

namespace {

// A product may begin when its warps have come, and so must know what they all know. Of a warp the first and the last
// lane speak for it.
void learn(Product& product, const Thread& thread) {
  const int lane = thread.index % kWarpLanes;
  if (product.issued == 1) {
    product.knows = thread.knows;
  } else if (lane == 0 || lane == kWarpLanes - 1) {
    product.knows.meet(thread.knows);
  }
}

void hold(Thread& thread, const void* begin, size_t bytes, bool accumulators, size_t product) {
  for (HeldRegisters& held : thread.held) {
    if (held.begin != begin || held.bytes != bytes || held.accumulators != accumulators) continue;
    held.last = product;
    return;
  }
  thread.held.push_back({begin, bytes, accumulators, product});
}

}  // namespace

void multiply(const Multiplication& what, const uint32_t* a_words, float* d) {
  Thread& thread = machine().thread();
  Cta& cta = *thread.cta;
  const int warpgroup = machine().warpgroup();
  std::deque<Product>& products = cta.products[warpgroup];
  const size_t number = thread.products++, position = number - cta.products_done[warpgroup];
  if (position == products.size()) products.emplace_back();
  Product& product = products[position];
  ++product.issued;
  const Multiplication& first = product.what;
  machine().check(product.issued == 1 || (first.a == what.a && first.b == what.b),
                  "threads disagree on a wgmma's operands");
  product.what = what;
  product.number = cta.origin + Time(number) + 1;
  const int t = thread.index % kWarpgroupLanes;
  product.a_words[t] = a_words;
  product.d[t] = d;
  learn(product, thread);
  machine().order().tick(thread);
  hold(thread, d, what.columns / 2 * sizeof(float), true, number);
  if (a_words != nullptr) hold(thread, a_words, kFragmentWords * sizeof(uint32_t), false, number);
}

void commit_products() { machine().thread().product_groups.push_back(machine().thread().products); }

void wait_products(int pending) {
  Thread& thread = machine().thread();
  const auto& groups = thread.product_groups;
  if (groups.size() <= size_t(pending)) return;
  const size_t wanted = groups[groups.size() - 1 - size_t(pending)];
  const size_t* const done = &thread.cta->products_done[machine().warpgroup()];
  machine().wait("products", [done, wanted] { return *done >= wanted; });
  thread.knows.advance(thread.cta->products_party(machine().warpgroup()), thread.cta->origin + Time(wanted));
  const auto is_done = [wanted](const HeldRegisters& held) { return held.last < wanted; };
  thread.held.erase(std::remove_if(thread.held.begin(), thread.held.end(), is_done), thread.held.end());
}

}  // namespace emulator
