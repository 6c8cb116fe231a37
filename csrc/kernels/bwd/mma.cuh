// What a consumer warpgroup does with a tile.
#pragma once

#include <type_traits>

#include "mma_columns.cuh"
#include "mma_keys.cuh"

namespace fa {

template <class Traits>
using KeyTileMma =
    std::conditional_t<Traits::kSplit == WarpgroupSplit::kKeys, KeySplitMma<Traits>, ColumnSplitMma<Traits>>;

}  // namespace fa
