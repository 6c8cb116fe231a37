// The emulator's layouts beside CuTe's, for tests/cpu/test_layouts.py.
#include <cstddef>
#include <cstdint>

// Addresses of shared memory, for CuTe: here it begins at address 0.
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
inline size_t __cvta_generic_to_shared(const void* pointer) { return reinterpret_cast<size_t>(pointer); }

#include "emulator/layouts.h"

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using cute::_1, cute::_2, cute::_16, cute::Int;
namespace gmma = cute::SM90::GMMA;

namespace {

using Value = cute::half_t;

// Elements of a tile, all of its products' operands of depth 16, which are not where CuTe's layout has them.
// `Atom` tiles first the columns' direction, so that chunks of columns follow each other, as in core/wgmma.cuh.
template <gmma::Major kMajor, class Atom, int kSize>
int misplaced(uint64_t flipped) {
  constexpr int kDepth = 128;
  using Order = std::conditional_t<kMajor == gmma::Major::K, cute::Step<_1, _2>, cute::Step<_2, _1>>;
  const auto layout = cute::tile_to_shape(Atom{}, cute::Shape<Int<kSize>, Int<kDepth>>{}, Order{});
  const auto places = cute::as_position_independent_swizzle_layout(layout);
  const auto tile = cute::make_tensor(cute::make_smem_ptr(static_cast<Value*>(nullptr)), layout);
  constexpr auto kEmulated = kMajor == gmma::Major::K ? emulator::Major::K : emulator::Major::MN;
  int count = 0;
  for (int slice = 0; slice < kDepth / 16; ++slice) {
    const auto operand = cute::local_tile(tile, cute::Shape<Int<kSize>, _16>{}, cute::make_coord(0, slice));
    const emulator::OperandTile emulated(gmma::make_gmma_desc<kMajor>(operand).desc_ ^ flipped);
    for (int index = 0; index < kSize; ++index) {
      for (int depth = 0; depth < 16; ++depth) {
        const auto place = places(index, slice * 16 + depth) * sizeof(Value);
        count += emulated.address(kEmulated, index, depth) != place;
      }
    }
  }
  return count;
}

// Of operands with 64 rows of A or columns of B, and with 256.
template <gmma::Major kMajor, class Atom>
int misplaced_operands(uint64_t flipped) {
  return misplaced<kMajor, Atom, 64>(flipped) + misplaced<kMajor, Atom, 256>(flipped);
}

// Elements of a fragment whose place (thread, number) -> (row, column) of `rows` rows is not CuTe's.
template <class Layout, class Emulated>
int misplaced(Layout layout, int rows, Emulated emulated) {
  int count = 0;
  const int threads = cute::size<0>(layout), elements = cute::size<1>(layout);
  for (int t = 0; t < threads; ++t) {
    for (int i = 0; i < elements; ++i) {
      const emulator::Element element = emulated(t, i);
      count += element.row + element.column * rows != int(layout(t, i));
    }
  }
  return count;
}

// Words of a lane of stmatrix.x4 or ldmatrix.x4: layouts of bits, of the lanes' rows and of their words.
template <class Rows, class Words>
int misplaced_words(Rows rows, Words words) {
  constexpr int kWordBits = 32, kByteBits = 8;
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const emulator::MatrixWord place = emulator::matrix_word(lane, word);
      count += int(rows(place.lane, place.byte * kByteBits)) != int(words(lane, word * kWordBits));
    }
  }
  return count;
}

using Sums = cute::MMA_Traits<cute::SM90_64x256x16_F32F16F16_SS<gmma::Major::K, gmma::Major::K>>;
using Factors = cute::MMA_Traits<cute::SM90_64x256x16_F32F16F16_RS<gmma::Major::K, gmma::Major::K>>;
using Warp = cute::MMA_Traits<cute::SM80_16x8x16_F32F16F16F32_TN>;
using Loads = cute::Copy_Traits<cute::SM75_U32x4_LDSM_N>;
using Stores = cute::Copy_Traits<cute::SM90_U32x4_STSM_N>;

}  // namespace

extern "C" {

// `flipped`: bits of the descriptor that are wrong.
int misplaced_k_128(uint64_t flipped) {
  return misplaced_operands<gmma::Major::K, gmma::Layout_K_SW128_Atom<Value>>(flipped);
}
int misplaced_k_64(uint64_t flipped) {
  return misplaced_operands<gmma::Major::K, gmma::Layout_K_SW64_Atom<Value>>(flipped);
}
int misplaced_mn_128(uint64_t flipped) {
  return misplaced_operands<gmma::Major::MN, gmma::Layout_MN_SW128_Atom<Value>>(flipped);
}
int misplaced_mn_64(uint64_t flipped) {
  return misplaced_operands<gmma::Major::MN, gmma::Layout_MN_SW64_Atom<Value>>(flipped);
}

int misplaced_accumulators() { return misplaced(Sums::CLayout{}, 64, emulator::register_element); }
int misplaced_first_operand() { return misplaced(Factors::ALayout{}, 64, emulator::register_element); }

int misplaced_warp_accumulators() { return misplaced(Warp::CLayout{}, 16, emulator::register_element); }
int misplaced_warp_first_operand() { return misplaced(Warp::ALayout{}, 16, emulator::register_element); }
// CuTe has its second operand's columns first.
int misplaced_warp_second_operand() {
  return misplaced(Warp::BLayout{}, 8, [](int lane, int i) {
    const auto [depth, column] = emulator::second_operand_element(lane, i);
    return emulator::Element{column, depth};
  });
}

int misplaced_loads() { return misplaced_words(Loads::SrcLayout{}, Loads::DstLayout{}); }
int misplaced_stores() { return misplaced_words(Stores::DstLayout{}, Stores::SrcLayout{}); }
}
