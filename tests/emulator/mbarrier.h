// mbarriers: their state in shared memory, and the order that they make.
#pragma once

#include <string>

#include "machine.h"

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

// A barrier as whoever uses it sees it. Its initialisation must have come to them: by the asynchronous proxy and from
// other CTAs only with a fence.
class MBarrierUse {
 public:
  MBarrierUse(Cta& cta, uint32_t address, const Visitor& visitor)
      : state_(*reinterpret_cast<MBarrier*>(machine().shared_pointer(cta, address, sizeof(MBarrier)))),
        order_(cta.mbarriers[address]),
        cta_(cta) {
    if (state_.mark != MBarrier::kMark) machine().fail("an mbarrier that was not initialised");
    machine().order().demand(order_.initialised, visitor, Access::kRead, "the mbarrier at byte",
                             address - kSharedWindow);
  }

  void expect(int bytes) {
    machine().check(bytes % kUnit == 0, "a transaction that is no multiple of 16 bytes");
    state_.set(state_.parity(), state_.units() + bytes / kUnit);
  }

  void arrive(Thread& thread) {
    machine().order().release(thread, order_.arrived);
    if (--state_.pending < 0) machine().fail("more arrivals at an mbarrier than its phase expects");
    complete_phase_if_due();
  }

  void complete_bytes(int bytes) {
    state_.set(state_.parity(), state_.units() - bytes / kUnit);
    complete_phase_if_due();
  }

  // Until the phase of that parity is complete.
  void wait(uint32_t parity) {
    MBarrier* const state = &state_;
    machine().wait("an mbarrier", [state, parity] { return uint32_t(state->parity()) != parity; }, state);
    machine().thread().knows.join(order_.completed);
  }

  // Who copies something, that is known with the phase under way.
  Visitor copier(const Clock& knows) const {
    return {order_.party, cta_.origin + order_.phases + 1, knows, Proxy::kAsynchronous};
  }

 private:
  void complete_phase_if_due() {
    if (state_.pending != 0 || state_.units() != 0) return;
    state_.pending = state_.expected;
    state_.set(state_.parity() ^ 1, 0);
    order_.completed.join(order_.arrived);
    order_.completed.advance(order_.party, cta_.origin + ++order_.phases);
    order_.arrived.clear();
  }

  MBarrier& state_;
  MBarrierOrder& order_;
  Cta& cta_;
};

}  // namespace emulator
