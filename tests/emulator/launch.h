// What a launch asks of the machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Launch {
  unsigned grid, cluster;  // CTAs, and how many of them are one cluster
  unsigned block;          // threads
  size_t shared_bytes;
  uint64_t seed;
  unsigned fitting;  // CTAs that fit on the machine at once
};

}  // namespace emulator
