// Barriers: mbarriers in shared memory, named barriers, and the pool of registers that setmaxnreg waits for.
#include <utility>

#include "machine.h"
#include "mbarrier.h"

namespace emulator {
namespace {

// By the running thread, in the shared memory of its CTA.
MBarrierUse mbarrier(const void* address) {
  Cta& cta = machine().cta();
  return {cta, machine().shared_address(address), machine().order().visitor(machine().thread())};
}

unsigned join_named_barrier(uint32_t id, uint32_t threads) {
  machine().check(id < kNamedBarriers, "a named barrier past the 15th");
  NamedBarrier& barrier = machine().cta().named[id];
  if (barrier.arrived == 0) barrier.expected = int(threads);
  machine().check(barrier.expected == int(threads), "threads disagree on a named barrier's size");
  machine().order().release(machine().thread(), barrier.gathered);
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    barrier.completed = std::exchange(barrier.gathered, {});
  }
  return generation;
}

}  // namespace

void init_mbarrier(const void* address, uint32_t arrivals) {
  Cta& cta = machine().cta();
  Thread& thread = machine().thread();
  // Barriers are handed around as pointers to const.
  *static_cast<MBarrier*>(const_cast<void*>(address)) = {MBarrier::kMark, int16_t(arrivals), int16_t(arrivals), 0};
  machine().check(cta.mbarriers.size() < kMaxMBarriers, "more mbarriers than the emulator counts");
  const uint32_t party = cta.mbarrier_party(cta.mbarriers.size());
  MBarrierOrder& order = cta.mbarriers[machine().shared_address(address)];
  order.party = party;
  order.initialised.note(machine().order().visitor(thread), Access::kWrite, kNever);
  thread.unfenced_barriers.push_back(&order);
}

void expect_bytes(const void* address, int bytes) { mbarrier(address).expect(bytes); }
void arrive_mbarrier(const void* address) { mbarrier(address).arrive(machine().thread()); }
void wait_mbarrier(const void* address, uint32_t parity) { mbarrier(address).wait(parity); }

void arrive_mbarrier(const void* address, int rank) {
  Thread& thread = machine().thread();
  Cta& there = machine().in_rank(machine().cta(), rank);
  const Proxy proxy = &there == thread.cta ? Proxy::kOrdinary : Proxy::kAsynchronous;
  MBarrierUse(there, machine().shared_address(address), machine().order().visitor(thread, proxy)).arrive(thread);
}

void arrive_named_barrier(uint32_t id, uint32_t threads) { join_named_barrier(id, threads); }

void sync_named_barrier(uint32_t id, uint32_t threads) {
  const unsigned generation = join_named_barrier(id, threads);
  NamedBarrier* const barrier = &machine().cta().named[id];
  static const char* const kNames[kNamedBarriers] = {
      "__syncthreads",    "named barrier 1",  "named barrier 2",  "named barrier 3",
      "named barrier 4",  "named barrier 5",  "named barrier 6",  "named barrier 7",
      "named barrier 8",  "named barrier 9",  "named barrier 10", "named barrier 11",
      "named barrier 12", "named barrier 13", "named barrier 14", "named barrier 15"};
  machine().wait(kNames[id], [barrier, generation] { return barrier->generation != generation; });
  machine().thread().knows.join(barrier->completed);
}

// setmaxnreg: registers move between the warps of a CTA, within what it was launched with.
void set_registers(int registers) {
  Cta* const cta = &machine().cta();
  const int warp = machine().thread().index / kWarpLanes;
  if (machine().thread().index % kWarpLanes == 0) {
    const int wanted = (registers - cta->registers[warp]) * kWarpLanes;
    machine().wait("registers", [cta, wanted] { return cta->free_registers >= wanted; });
    cta->free_registers -= wanted;
    cta->registers[warp] = registers;
  }
  meet(~0u, Collective::kSetRegisters, 0);
}

}  // namespace emulator
