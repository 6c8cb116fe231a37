#include "order.h"

#include <algorithm>

namespace emulator {
namespace {

std::string name_in(const Cta& cta, uint32_t party) {
  if (party < cta.products_party(0)) return "thread " + std::to_string(party - cta.first_party);
  if (party < cta.mbarrier_party(0)) return "a product of warpgroup " + std::to_string(party - cta.products_party(0));
  for (const auto& [address, barrier] : cta.mbarriers) {
    if (barrier.party == party) return "a copy for the mbarrier at byte " + std::to_string(address - kSharedWindow);
  }
  for (const Thread& thread : cta.threads) {
    if (thread.storer != int(party - cta.reads_party(0)) / 2) continue;
    return "a store of thread " + std::to_string(thread.index);
  }
  return "nobody";
}

}  // namespace

void Order::begin(std::vector<MemoryRange> watched, unsigned fitting) {
  watched_ = std::move(watched);
  entered_.assign(fitting, 0);
}

void Order::enter(Cta& cta) {
  const auto occupied = [this](int slot) {
    return std::any_of(ctas_.begin(), ctas_.end(), [slot](const auto& other) { return other->slot == slot; });
  };
  cta.slot = 0;
  while (occupied(cta.slot)) ++cta.slot;
  cta.first_party = uint32_t(cta.slot) * (cta.end_party() - cta.first_party);
  if (entered_[cta.slot] == kNever / kTimesOfCta) fail_("more CTAs than times are left for");
  cta.origin = entered_[cta.slot]++ * kTimesOfCta;
  for (Thread& thread : cta.threads) {
    thread.party = cta.first_party + uint32_t(thread.index);
    thread.knows.advance(thread.party, cta.origin + 1);
  }
}

void Order::release(Thread& thread, Clock& clock) {
  clock.join(thread.knows);
  tick(thread);
}

void Order::tick(Thread& thread) {
  const Time now = thread.knows[thread.party] + 1;
  if (now - thread.cta->origin >= kTimesOfCta) fail_("a thread synchronises too often to keep count");
  thread.knows.advance(thread.party, now);
}

void Order::fence_async(Thread& thread) {
  for (Place* const place : thread.unfenced) place->show(thread.party, thread.knows[thread.party]);
  thread.unfenced.clear();
}

void Order::fence_barrier_init(Thread& thread) {
  for (MBarrierOrder* const barrier : thread.unfenced_barriers) {
    barrier->initialised.show(thread.party, thread.knows[thread.party]);
  }
  thread.unfenced_barriers.clear();
}

void Order::visit(Thread& thread, const void* pointer, int bytes, Access access) {
  const auto* const at = static_cast<const uint8_t*>(pointer);
  const auto* const stack = reinterpret_cast<const uint8_t*>(thread.stack.get());
  if (stack <= at && at < stack + kStackBytes) return visit_registers(thread, at, access);
  if (Cta* const cta = owner(at)) {
    visit_shared(thread, *cta, cta->shared_address(at), bytes, access);
  } else {
    visit_memory(visitor(thread), at, bytes, access);
  }
}

void Order::visit_shared(Thread& thread, Cta& cta, uint32_t address, int bytes, Access access) {
  visit_shared(visitor(thread), cta, address, bytes, access);
  if (access != Access::kWrite) return;
  for_each_place(cta, address, bytes, [&thread](Place& place) { thread.unfenced.push_back(&place); });
}

void Order::visit_shared(const Visitor& visitor, Cta& cta, uint32_t address, int bytes, Access access) {
  // Writes by ordinary instructions are seen by the asynchronous proxy only behind a fence.
  const Time visible = visitor.proxy == Proxy::kOrdinary ? kNever : visitor.time;
  for_each_place(cta, address, bytes, [&](Place& place) {
    demand(place, visitor, access, "shared address", address);
    place.note(visitor, access, visible);
  });
}

void Order::visit_memory(const Visitor& visitor, const void* memory, int bytes, Access access) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const auto holds = [begin](const MemoryRange& range) { return range.begin <= begin && begin < range.end; };
  if (std::none_of(watched_.begin(), watched_.end(), holds)) return;
  for (uintptr_t at = begin / kPlaceBytes * kPlaceBytes; at < begin + bytes; at += kPlaceBytes) {
    Place& place = places_.at(at);
    demand(place, visitor, access, "memory at", at);
    place.note(visitor, access, visitor.time);
  }
}

void Order::demand(const Place& place, const Visitor& visitor, Access access, const char* what, uint64_t at) {
  Visit earlier;
  const Hazard hazard = place.hazard(visitor, access, earlier);
  if (hazard == Hazard::kNone) return;
  static const char* const kVerbs[] = {"reads", "adds to", "writes"};
  static const char* const kPast[] = {"read", "added to", "wrote"};
  const char* const missing = hazard == Hazard::kUnfenced ? " without a fence of proxies after" : " not ordered after";
  fail_(name(visitor.party) + " " + kVerbs[int(access)] + " " + what + " " + std::to_string(at) + "," + missing + " " +
        name(earlier.party) + ", which " + kPast[int(earlier.access)] + " it");
}

// Fragments may be read: the tensor cores only read them, too.
void Order::visit_registers(const Thread& thread, const uint8_t* at, Access access) {
  for (const HeldRegisters& held : thread.held) {
    const auto* const begin = static_cast<const uint8_t*>(held.begin);
    if (at < begin || begin + held.bytes <= at || (!held.accumulators && access == Access::kRead)) continue;
    fail_(held.accumulators ? "accumulators used before their product was waited for"
                            : "a fragment written before its product was waited for");
  }
}

// Of whose shared memory it is; null: of none's.
Cta* Order::owner(const uint8_t* pointer) const {
  for (const auto& cta : ctas_) {
    if (cta->shared <= pointer && pointer < cta->shared + cta->shared_bytes) return cta.get();
  }
  return nullptr;
}

std::string Order::name(uint32_t party) const {
  for (const auto& cta : ctas_) {
    if (party < cta->first_party || cta->end_party() <= party) continue;
    return name_in(*cta, party) + " of CTA " + std::to_string(cta->index);
  }
  return "a CTA that has ended";
}

}  // namespace emulator
