// Copies by TMA.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "pipeline.cuh"
#include "seqlen.h"

namespace fa {

using CacheHint = cute::TMA::CacheHintSm90;

// One box of a sequence's rows from `map_row` on (params.h), to the same place in each of the kShares CTAs of the
// cluster that share it, completing the barrier `full` in each.
template <int kShares>
FA_DEVICE void load_box(const CUtensorMap& map, uint64_t* full, CacheHint hint, uint8_t* to, int column, int head,
                        int map_row, const Sequence& sequence) {
  if constexpr (kShares == 1) {
    cute::SM90_TMA_LOAD_5D::copy(&map, full, static_cast<uint64_t>(hint), to, column, head, map_row,
                                 sequence.map_origin(), sequence.batch);
  } else {
    cute::SM90_TMA_LOAD_MULTICAST_5D::copy(&map, full, (1 << kShares) - 1, static_cast<uint64_t>(hint), to, column,
                                           head, map_row, sequence.map_origin(), sequence.batch);
  }
}

}  // namespace fa
