// Stand-in for CUTLASS's header: tensor map descriptors.
#pragma once

namespace cute {

struct TmaDescriptor {};
inline void prefetch_tma_descriptor(const TmaDescriptor*) {}

}  // namespace cute
