// Barriers: mbarriers in shared memory, named barriers, and the pool of registers that setmaxnreg waits for.
#pragma once

#include "collectives.h"

namespace emulator {

// The 64 bits of an mbarrier, in a format of our own.
struct MBarrier {
  static constexpr uint16_t kMark = 0xBA44;

  uint16_t mark;
  int16_t expected, pending;  // arrivals
  int16_t half_state;         // bit 0: parity of the phase under way; above: bytes to come, in units of 16

  int parity() const { return half_state & 1; }
  int units() const { return half_state >> 1; }
  void set(int parity, int units) { half_state = int16_t(units * 2 + parity); }
};
static_assert(sizeof(MBarrier) == 8);

inline MBarrier& mbarrier(const void* address) {
  // Barriers are handed around as pointers to const.
  MBarrier& barrier = *static_cast<MBarrier*>(const_cast<void*>(address));
  if (barrier.mark != MBarrier::kMark) machine().fail("an mbarrier that was not initialised");
  return barrier;
}

inline void init_mbarrier(const void* address, uint32_t arrivals) {
  MBarrier& barrier = *static_cast<MBarrier*>(const_cast<void*>(address));
  barrier = {MBarrier::kMark, int16_t(arrivals), int16_t(arrivals), 0};
}

inline void complete_phase_if_due(MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.units() != 0) return;
  barrier.pending = barrier.expected;
  barrier.set(barrier.parity() ^ 1, 0);
}

inline void expect_bytes(const void* address, int bytes) {
  MBarrier& barrier = mbarrier(address);
  machine().check(bytes % kUnit == 0, "a transaction that is no multiple of 16 bytes");
  barrier.set(barrier.parity(), barrier.units() + bytes / kUnit);
}

inline void arrive_mbarrier(const void* address) {
  MBarrier& barrier = mbarrier(address);
  if (--barrier.pending < 0) machine().fail("more arrivals at an mbarrier than its phase expects");
  complete_phase_if_due(barrier);
}

inline void complete_bytes(const void* address, int bytes) {
  MBarrier& barrier = mbarrier(address);
  barrier.set(barrier.parity(), barrier.units() - bytes / kUnit);
  complete_phase_if_due(barrier);
}

// Until the phase of that parity is complete.
inline void wait_mbarrier(const void* address, uint32_t parity) {
  MBarrier* const barrier = &mbarrier(address);
  machine().wait("an mbarrier", [barrier, parity] { return uint32_t(barrier->parity()) != parity; }, barrier);
}

inline unsigned join_named_barrier(uint32_t id, uint32_t threads) {
  machine().check(id < kNamedBarriers, "a named barrier past the 15th");
  NamedBarrier& barrier = machine().cta().named[id];
  if (barrier.arrived == 0) barrier.expected = int(threads);
  machine().check(barrier.expected == int(threads), "threads disagree on a named barrier's size");
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  return generation;
}

inline void sync_named_barrier(uint32_t id, uint32_t threads) {
  const unsigned generation = join_named_barrier(id, threads);
  NamedBarrier* const barrier = &machine().cta().named[id];
  static const char* const kNames[kNamedBarriers] = {
      "__syncthreads",    "named barrier 1",  "named barrier 2",  "named barrier 3",
      "named barrier 4",  "named barrier 5",  "named barrier 6",  "named barrier 7",
      "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
      "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15"};
  machine().wait(kNames[id], [barrier, generation] { return barrier->generation != generation; });
}

// setmaxnreg: registers move between the warps of a CTA, within what it was launched with.
inline void set_registers(int registers) {
  Cta* const cta = &machine().cta();
  const int warp = machine().thread().index / kWarpLanes;
  if (machine().thread().index % kWarpLanes == 0) {
    const int wanted = (registers - cta->registers[warp]) * kWarpLanes;
    machine().wait("registers", [cta, wanted] { return cta->free_registers >= wanted; });
    cta->free_registers -= wanted;
    cta->registers[warp] = registers;
  }
  meet(~0u, Collective::kSync, 0);
}

}  // namespace emulator

inline void __syncthreads() { emulator::sync_named_barrier(0, blockDim.x); }
