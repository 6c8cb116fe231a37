// The order in which a launch's tiles are handed out.
#pragma once

#include "enums.h"
#include "platform.h"

namespace fa {

struct TilePosition {
  int m_block;
  int head;  // index of a (head, value pass) pair, or of a (batch, head, value pass) triple
};

// Full and local tiles cost the same: neighbours share keys, so query blocks vary fastest. Causal tiles grow with
// their query block: the longest come first, over a section of heads whose keys and values stay in the L2 cache.
template <Mask kMask>
FA_HOST_DEVICE TilePosition tile_position(int index, int num_m_blocks, int num_heads, int heads_per_section) {
  if constexpr (kMask != Mask::kCausal) return {index % num_m_blocks, index / num_m_blocks};
  const int section = index / (heads_per_section * num_m_blocks);
  const int first_head = section * heads_per_section;
  const int heads = min_of(heads_per_section, num_heads - first_head);
  const int rest = index - first_head * num_m_blocks;
  return {num_m_blocks - 1 - rest / heads, first_head + rest % heads};
}

}  // namespace fa
