// Holds every access of a launch against those before it: ends the launch if nothing orders them.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "accesses.h"
#include "launch.h"
#include "state.h"

namespace emulator {

constexpr Time kTimesOfCta = 1 << 20;  // how often one of its parties can be told of

class Order {
 public:
  using Ctas = std::vector<std::unique_ptr<Cta>>;
  using Fail = std::function<void(const std::string&)>;

  // `ctas`: those that run.
  Order(const Ctas& ctas, Fail fail) : ctas_(ctas), fail_(std::move(fail)) {}

  // For a launch on a machine that so many CTAs fit on.
  void begin(std::vector<MemoryRange> watched, unsigned fitting);

  // Makes a CTA's threads and units parties, in the place of those of a CTA that has ended.
  void enter(Cta& cta);

  // -- who knows what -------------------------------------------------------------------------------------------------

  static Visitor visitor(const Thread& thread, Proxy proxy = Proxy::kOrdinary) {
    return {thread.party, thread.knows[thread.party], thread.knows, proxy};
  }

  // What the thread has done so far is known to whoever learns from `clock`.
  void release(Thread& thread, Clock& clock);
  // What the thread does from now on is not known to whoever has learned from it.
  void tick(Thread& thread);
  // What releases at an address of memory have passed on.
  Clock& passed_on(const void* address) { return passed_on_[address]; }

  // What the thread has written before, of shared memory, or what it has initialised: others may see it.
  static void fence_async(Thread& thread);
  static void fence_barrier_init(Thread& thread);

  // -- accesses -------------------------------------------------------------------------------------------------------

  // By an ordinary load or store.
  void visit(Thread& thread, const void* pointer, int bytes, Access access);
  void visit_shared(Thread& thread, Cta& cta, uint32_t address, int bytes, Access access);
  // By whoever that is. Memory that is not watched may be accessed at will.
  void visit_shared(const Visitor& visitor, Cta& cta, uint32_t address, int bytes, Access access);
  void visit_memory(const Visitor& visitor, const void* memory, int bytes, Access access);
  // Leaves no trace. `what`: in which place, at which address or byte, if the launch must end.
  void demand(const Place& place, const Visitor& visitor, Access access, const char* what, uint64_t at);

 private:
  void visit_registers(const Thread& thread, const uint8_t* at, Access access);
  Cta* owner(const uint8_t* pointer) const;
  std::string name(uint32_t party) const;

  const Ctas& ctas_;
  const Fail fail_;
  std::vector<MemoryRange> watched_;
  std::vector<Time> entered_;  // CTAs that each place has had
  Places places_;
  std::unordered_map<const void*, Clock> passed_on_;
};

}  // namespace emulator
