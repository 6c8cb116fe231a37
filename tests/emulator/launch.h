// What a launch asks of the machine.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct MemoryRange {
  uintptr_t begin, end;
};

struct Launch {
  unsigned grid, cluster;  // CTAs, and how many of them are one cluster
  unsigned block;          // threads
  size_t shared_bytes;
  uint64_t seed;
  unsigned fitting;            // CTAs that fit on the machine at once
  const MemoryRange* watched;  // memory of all CTAs whose accesses are held against each other
  size_t num_watched;
};

}  // namespace emulator
