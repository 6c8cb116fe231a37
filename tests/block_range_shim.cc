// The kernels' block ranges, for the CPU tests.
#include "core/block_range.h"

namespace {

template <fa::Mask kMask, int kBlockN>
fa::BlockRange blocks(const int* arguments) {
  const fa::Visibility<kMask> visibility = {arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  return visibility.template blocks<kBlockN>(arguments[0], arguments[6]);
}

template <int kBlockN>
fa::BlockRange blocks(fa::Mask mask, const int* arguments) {
  return mask == fa::Mask::kFull     ? blocks<fa::Mask::kFull, kBlockN>(arguments)
         : mask == fa::Mask::kCausal ? blocks<fa::Mask::kCausal, kBlockN>(arguments)
                                     : blocks<fa::Mask::kLocal, kBlockN>(arguments);
}

template <fa::Mask kMask, int kBlockM, int kBlockN>
fa::BlockRange query_blocks(const int* arguments) {
  const fa::Visibility<kMask> visibility = {arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  return visibility.template query_blocks<kBlockM, kBlockN>(arguments[0]);
}

template <int kBlockM, int kBlockN>
fa::BlockRange query_blocks(fa::Mask mask, const int* arguments) {
  return mask == fa::Mask::kFull     ? query_blocks<fa::Mask::kFull, kBlockM, kBlockN>(arguments)
         : mask == fa::Mask::kCausal ? query_blocks<fa::Mask::kCausal, kBlockM, kBlockN>(arguments)
                                     : query_blocks<fa::Mask::kLocal, kBlockM, kBlockN>(arguments);
}

template <fa::Mask kMask>
fa::KeyRange rows(const int* arguments) {
  const fa::Visibility<kMask> visibility = {arguments[1], arguments[2], arguments[3], arguments[4], arguments[5]};
  return visibility.rows(arguments[0]);
}

}  // namespace

// `tile`: an index into COMPILED_TILES of tests/cpu/test_block_range.py, of which the keys count. `arguments`: m_block,
// len_q, len_k, window_left, window_right, attention_chunk, block_m.
extern "C" void block_range(fa::Mask mask, int tile, const int* arguments, fa::BlockRange* result) {
  constexpr fa::BlockRange (*kTiles[])(fa::Mask, const int*) = {blocks<3>, blocks<16>, blocks<80>, blocks<176>,
                                                                blocks<128>};
  *result = kTiles[tile](mask, arguments);
}

// The same for query blocks, but both sides of the tile count; `arguments` begin with n_block, and have no block_m.
extern "C" void query_block_range(fa::Mask mask, int tile, const int* arguments, fa::BlockRange* result) {
  constexpr fa::BlockRange (*kTiles[])(fa::Mask, const int*) = {
      query_blocks<4, 3>, query_blocks<8, 16>, query_blocks<64, 80>, query_blocks<128, 176>, query_blocks<192, 128>};
  *result = kTiles[tile](mask, arguments);
}

// `arguments`: key, len_q, len_k, window_left, window_right, attention_chunk.
extern "C" void key_rows(fa::Mask mask, const int* arguments, fa::KeyRange* result) {
  *result = mask == fa::Mask::kFull     ? rows<fa::Mask::kFull>(arguments)
            : mask == fa::Mask::kCausal ? rows<fa::Mask::kCausal>(arguments)
                                        : rows<fa::Mask::kLocal>(arguments);
}
