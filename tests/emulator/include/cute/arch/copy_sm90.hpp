// Stand-in for CUTLASS's header: addresses in shared memory.
#pragma once

#include "copy_sm90_tma.hpp"

namespace cute {

inline uint32_t cast_smem_ptr_to_uint(const void* pointer) { return emulator::shared_address(pointer); }

}  // namespace cute
