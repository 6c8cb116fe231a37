// The order in which a launch's tiles are handed out.
#pragma once

#include "enums.h"
#include "platform.h"

namespace fa {

struct TilePosition {
  int m_block;
  int head;  // index of a (head, value pass) pair, or of a (batch, head, value pass) triple
};

// How many heads are worked on together: `heads` in each section, and at least `least_last` in the last one, which gets
// what is left.
struct Sections {
  int heads;
  int least_last;
};

// The `place`-th of a head's tiles to be handed out.
struct HeadTile {
  int place;
  int head;
};

// Section by section; in a section first the first tiles of all heads, then the second ones, and so on.
FA_HOST_DEVICE HeadTile head_tile(int index, int tiles_per_head, int num_heads, Sections sections) {
  const int last_section = max_of(0, num_heads - max_of(1, sections.least_last)) / sections.heads;
  const int section = min_of(last_section, index / (sections.heads * tiles_per_head));
  const int first_head = section * sections.heads;
  const int heads = section < last_section ? sections.heads : num_heads - first_head;
  const int rest = index - first_head * tiles_per_head;
  return {rest / heads, first_head + rest % heads};
}

// Of the forward pass. Full tiles cost the same: neighbours share keys, so query blocks vary fastest. Causal tiles grow
// with their query block, and local ones until their window is full: the longest come first, over a section of heads
// whose keys and values stay in the L2 cache. The last section is large enough that the launch ends with short tiles.
template <Mask kMask>
FA_HOST_DEVICE TilePosition tile_position(int index, int num_m_blocks, int num_heads, Sections sections) {
  if constexpr (kMask == Mask::kFull) return {index % num_m_blocks, index / num_m_blocks};
  const HeadTile tile = head_tile(index, num_m_blocks, num_heads, sections);
  return {num_m_blocks - 1 - tile.place, tile.head};
}

}  // namespace fa
