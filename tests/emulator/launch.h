// What a launch asks of the machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Launch {
  unsigned grid, block;
  unsigned resident;  // CTAs that fit on the machine at once
  size_t shared_bytes;
  uint64_t seed;
};

}  // namespace emulator
