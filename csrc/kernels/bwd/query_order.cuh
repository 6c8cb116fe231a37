// In which order a tile works on the blocks of queries that see its keys.
#pragma once

#include <type_traits>

#include "smem.cuh"

namespace fa {

// A full block needs no mask.
enum class BlockKind { kFull, kEdge };

// step(m_block) for each block in [begin, end), the last queries first: under a causal mask all blocks of keys see
// those, so that nobody waits long for the first block of keys, or the one before, to add to dq. Of the first queries
// the next blocks of keys see nothing.
template <class Step>
FA_DEVICE void for_each_query_block(int begin, int end, Step step) {
#pragma unroll 1
  for (int m_block = end - 1; m_block >= begin; --m_block) step(m_block);
}

// In the same order, step(kind, m_block), where decltype(kind)::value is the block's BlockKind: a loop for each kind.
template <class Traits, class Step>
FA_DEVICE void for_each_query_block_by_kind(const BlockRange& blocks, Step step) {
  const std::integral_constant<BlockKind, BlockKind::kFull> full;
  const std::integral_constant<BlockKind, BlockKind::kEdge> edge;
  const auto run = [&](auto kind, int begin, int end) {
    for_each_query_block(begin, end, [&](int m_block) { step(kind, m_block); });
  };
  run(edge, blocks.full_end, blocks.end);
  run(full, blocks.full_begin, blocks.full_end);
  if constexpr (Traits::kMask != Mask::kFull) run(edge, blocks.begin, blocks.full_begin);
}

}  // namespace fa
