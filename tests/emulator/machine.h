// A GPU on the host: the threads of a launch are fibers of one thread, and what the hardware does beside them (TMA,
// wgmma) is done whenever the machine pleases between the moment it is asked for and the moment somebody has waited for
// it. A seed decides who runs next, so that a launch can be repeated exactly, and other seeds try other orders.
//
// Whatever is accessed must have been ordered with who accessed it before: by barriers, by waits for the units, by
// fences and atomic operations. Clocks tell (clocks.h), so that a missing wait shows also where the seed happens to
// give the right order. A launch that cannot go on, or does what the hardware would punish, ends with a text that says
// where.
#pragma once

#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "async_units.h"
#include "faults.h"
#include "instructions.h"
#include "state.h"

namespace emulator {

constexpr int kMaxFruitlessRounds = 200000;  // of polling, in which nothing else happens
constexpr Time kTimesOfCta = 1 << 20;        // how often one of its parties can be told of

// How keen the asynchronous units are. Lazy ones work only when no thread can go on, and always the same unit first, so
// that another one is as late as it can be.
enum class Pace { kEager, kLazy, kMixed };

class Machine {
 public:
  static Machine& running() { return *running_; }
  static bool runs() { return running_ != nullptr; }

  // Lets the caller say whose turn it is: after turns[i] comes turns[i + 1], and after the last one the first, an index
  // into the CTAs that have not ended, modulo their number. A turn ends behind every atomic operation and fence.
  void take_turns(std::vector<uint8_t> turns) { turns_ = std::move(turns); }

  // Runs `body` on every thread of the launch. Returns what went wrong, or nothing.
  std::string run(const Launch& launch, std::function<void()> body) {
    const auto& [grid, cluster, block, shared_bytes, seed, fitting, watched, num_watched] = launch;
    const unsigned resident = std::max(fitting, cluster);
    watched_.assign(watched, watched + num_watched);
    slots_.assign(resident, 0);
    running_ = this;
    cluster_ = cluster;
    if (grid % cluster != 0) return "the grid is no multiple of the cluster";
    body_ = std::move(body);
    gridDim.x = grid;
    blockDim.x = block;
    random_.seed(seed);
    pace_ = Pace(seed % 3);
    std::array<Unit, 3> all = {Unit::kLoads, Unit::kStores, Unit::kProducts};
    for (uint64_t i = 0; i < seed / 3 % 6; ++i) std::next_permutation(all.begin(), all.end());
    units_ = all;
    const FaultHandler faults([](const char* fault) {
      if (running_->thread_ != nullptr) running_->fail(fault);
    });
    unsigned next = 0;
    int fruitless = 0;
    while (error_.empty()) {
      while (ctas_.size() + cluster <= resident && next < grid) {
        for (unsigned i = 0; i < cluster; ++i) ctas_.push_back(start(next++, block, shared_bytes));
      }
      if (ctas_.empty()) break;
      if (!advance() && error_.empty()) fail_machine("nobody can go on");
      fruitless = progressed_ ? 0 : fruitless + 1;
      if (fruitless > kMaxFruitlessRounds) fail_machine("somebody polls for what never comes");
      retire();
    }
    running_ = nullptr;
    return error_;
  }

  // -- called by the running thread -----------------------------------------------------------------------------------

  Thread& thread() { return *thread_; }
  Cta& cta() { return *thread_->cta; }
  int warpgroup() { return thread_->index / kWarpgroupLanes; }

  // Ends the launch. Does not return when a thread runs.
  void fail(const std::string& error) {
    std::ostringstream text;
    if (thread_ != nullptr) text << "CTA " << thread_->cta->index << ", thread " << thread_->index << ": ";
    text << error;
    if (error_.empty()) error_ = text.str();
    if (thread_ != nullptr) {
      thread_->ended = true;
      leave();
    }
  }

  void check(bool holds, const char* rule) {
    if (!holds) fail(rule);
  }

  // `at`: where in shared memory it is, if that tells.
  void wait(const char* what, std::function<bool()> wakes, const void* at = nullptr) {
    if (wakes()) return;
    thread_->waits_for = what;
    thread_->waits_at = at;
    thread_->wakes = std::move(wakes);
    leave();
  }

  // Lets others run before memory is looked at again.
  void poll() {
    thread_->polls = true;
    leave();
  }

  uint8_t* shared_pointer(uint32_t address, size_t bytes) { return shared_pointer(cta(), address, bytes); }

  uint8_t* shared_pointer(Cta& cta, uint32_t address, size_t bytes) {
    const size_t offset = address - kSharedWindow;
    if (address < kSharedWindow || offset + bytes > cta.shared_bytes) {
      fail("shared address " + std::to_string(address) + " is outside of the CTA's " +
           std::to_string(cta.shared_bytes) + " bytes");
      return cta.shared;
    }
    return cta.shared + offset;
  }

  uint32_t shared_address(const void* pointer) { return shared_address(cta(), pointer); }

  static uint32_t shared_address(const Cta& cta, const void* pointer) {
    return uint32_t(static_cast<const uint8_t*>(pointer) - cta.shared) + kSharedWindow;
  }

  // -- clusters -------------------------------------------------------------------------------------------------------

  int cluster_rank() { return int(cta().index % cluster_); }

  // The CTA of that rank in `of`'s cluster, which must not have ended.
  Cta& in_rank(const Cta& of, int rank) {
    const unsigned index = of.index / cluster_ * cluster_ + unsigned(rank);
    for (auto& cta : ctas_) {
      if (cta->index == index && !cta->ended()) return *cta;
    }
    fail("access to the shared memory of a CTA that has ended, or is not of the cluster");
    return cta();
  }

  // What a pointer into the running CTA's shared memory would point to in that rank.
  template <class Value>
  Value* in_rank(int rank, Value* pointer) {
    uint8_t* const base = in_rank(cta(), rank).shared;
    return reinterpret_cast<Value*>(base + (reinterpret_cast<const uint8_t*>(pointer) - cta().shared));
  }

  void sync_cluster() {
    Thread& self = *thread_;
    self.meets_cluster = true;
    wait("the cluster", [this, &self] {
      complete_cluster_meeting(self.cta->index / cluster_);
      return !self.meets_cluster;
    });
  }

  // -- the order of accesses ------------------------------------------------------------------------------------------

  Visitor visitor(const Thread& thread, Proxy proxy = Proxy::kOrdinary) {
    return {thread.party, thread.knows[thread.party], thread.knows, proxy};
  }

  // What the thread has done so far is known to whoever learns from `clock`.
  void release(Thread& thread, Clock& clock) {
    clock.join(thread.knows);
    tick(thread);
  }

  // What the thread does from now on is not known to whoever has learned from it.
  void tick(Thread& thread) {
    const Time now = thread.knows[thread.party] + 1;
    if (now - thread.cta->origin >= kTimesOfCta) fail("a thread synchronises too often to keep count");
    thread.knows.advance(thread.party, now);
  }

  // `unfenced`: of the thread that writes by an ordinary instruction, which must fence before the asynchronous proxy
  // sees what it writes.
  void visit_shared(const Visitor& visitor, Cta& cta, uint32_t address, int bytes, Access access,
                    std::vector<Place*>* unfenced = nullptr) {
    const uint32_t offset = address - kSharedWindow;
    for (uint32_t i = offset / kPlaceBytes; i <= (offset + bytes - 1) / kPlaceBytes; ++i) {
      Place& place = cta.places[i];
      demand(place, visitor, access,
             [&] { return "shared address " + std::to_string(i * kPlaceBytes + kSharedWindow); });
      place.note(visitor, access, unfenced != nullptr ? kNever : visitor.time);
      if (unfenced != nullptr && access == Access::kWrite) unfenced->push_back(&place);
    }
  }

  void visit_shared(Thread& thread, Cta& cta, uint32_t address, int bytes, Access access) {
    visit_shared(visitor(thread), cta, address, bytes, access, &thread.unfenced);
  }

  void visit_memory(const Visitor& visitor, const void* memory, int bytes, Access access) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
    const auto holds = [begin](const MemoryRange& range) { return range.begin <= begin && begin < range.end; };
    if (std::none_of(watched_.begin(), watched_.end(), holds)) return;
    for (uintptr_t at = begin / kPlaceBytes * kPlaceBytes; at < begin + bytes; at += kPlaceBytes) {
      Place& place = places_.at(at);
      demand(place, visitor, access, [&] { return "memory"; });
      place.note(visitor, access, visitor.time);
    }
  }

  // By an ordinary instruction of the running thread.
  void visit(const void* pointer, int bytes, Access access) {
    if (thread_ == nullptr) return;
    const uint8_t* const at = static_cast<const uint8_t*>(pointer);
    const auto* const stack = reinterpret_cast<const uint8_t*>(thread_->stack.get());
    if (stack <= at && at < stack + kStackBytes) return visit_registers(at, access);
    if (Cta* const cta = owner(at)) {
      visit_shared(*thread_, *cta, shared_address(*cta, at), bytes, access);
    } else {
      visit_memory(visitor(*thread_), at, bytes, access);
    }
  }

  // What releases at an address of memory have passed on.
  Clock& passed_on(const void* address) { return passed_on_[address]; }

  // Of the running thread. Fragments may be read: the tensor cores only read them, too.
  void visit_registers(const uint8_t* at, Access access) {
    for (const HeldRegisters& held : thread_->held) {
      const uint8_t* const begin = static_cast<const uint8_t*>(held.begin);
      if (at < begin || begin + held.bytes <= at || (!held.accumulators && access == Access::kRead)) continue;
      fail(held.accumulators ? "accumulators used before their product was waited for"
                             : "a fragment written before its product was waited for");
    }
  }

  void fence_async() {
    show(thread_->unfenced, [](Place* place) -> Place& { return *place; });
  }

  void fence_barrier_init() {
    show(thread_->unfenced_barriers, [](MBarrierOrder* barrier) -> Place& { return barrier->initialised; });
  }

  // Of whose shared memory it is; null: of none's.
  Cta* owner(const void* pointer) {
    const uint8_t* const at = static_cast<const uint8_t*>(pointer);
    for (auto& cta : ctas_) {
      if (cta->shared <= at && at < cta->shared + cta->shared_bytes) return cta.get();
    }
    return nullptr;
  }

  // Ends the launch if the visitor does not know of what was done to the place before.
  template <class Where>
  void demand(const Place& place, const Visitor& visitor, Access access, Where where) {
    Visit earlier;
    const Hazard hazard = place.hazard(visitor, access, earlier);
    if (hazard == Hazard::kNone) return;
    static const char* const kVerbs[] = {"reads", "adds to", "writes"};
    static const char* const kPast[] = {"read", "added to", "wrote"};
    const char* const missing =
        hazard == Hazard::kUnfenced ? " without a fence of proxies after" : " not ordered after";
    fail(party_name(visitor.party) + " " + kVerbs[int(access)] + " " + where() + "," + missing + " " +
         party_name(earlier.party) + ", which " + kPast[int(earlier.access)] + " it");
  }

 private:
  std::unique_ptr<Cta> start(unsigned index, unsigned block, size_t shared_bytes) {
    auto cta = std::make_unique<Cta>();
    cta->index = index;
    cta->shared_bytes = shared_bytes;
    cta->storage.resize(shared_bytes + 2048);
    const uintptr_t base = (reinterpret_cast<uintptr_t>(cta->storage.data()) + 1023) / 1024 * 1024;
    cta->shared = reinterpret_cast<uint8_t*>(base);
    memset(cta->shared, 0xFF, shared_bytes);  // NaN in all formats
    cta->places.resize(shared_bytes / kPlaceBytes + 1);
    const int num_warps = (block + kWarpLanes - 1) / kWarpLanes;
    cta->registers.assign(num_warps, kRegistersPerMultiprocessor / int(block) / 8 * 8);
    cta->products.resize((block + kWarpgroupLanes - 1) / kWarpgroupLanes);
    cta->products_done.assign(cta->products.size(), 0);
    cta->threads = std::vector<Thread>(block);
    occupy_slot(*cta);
    for (unsigned i = 0; i < block; ++i) {
      Thread& thread = cta->threads[i];
      thread.cta = cta.get();
      thread.index = int(i);
      thread.party = cta->first_party + i;
      thread.knows.advance(thread.party, cta->origin + 1);
      getcontext(&thread.entry);
      thread.entry.uc_stack.ss_sp = thread.stack.get();
      thread.entry.uc_stack.ss_size = kStackBytes;
      makecontext(&thread.entry, [] { running_->thread_main(); }, 0);
    }
    return cta;
  }

  // Gives a CTA a place among those that run, and its parties numbers and times behind those of who was there before.
  void occupy_slot(Cta& cta) {
    const auto occupied = [this](int slot) {
      return std::any_of(ctas_.begin(), ctas_.end(), [slot](const auto& other) { return other->slot == slot; });
    };
    cta.slot = 0;
    while (occupied(cta.slot)) ++cta.slot;
    cta.first_party = 0;
    cta.first_party = uint32_t(cta.slot) * cta.reads_party(kMaxStorers);
    if (slots_[cta.slot] == kNever / kTimesOfCta) fail_machine("more CTAs than times are left for");
    cta.origin = slots_[cta.slot]++ * kTimesOfCta;
  }

  std::string party_name(uint32_t party) {
    for (const auto& cta : ctas_) {
      if (party < cta->first_party || cta->reads_party(kMaxStorers) <= party) continue;
      return party_name(*cta, party) + " of CTA " + std::to_string(cta->index);
    }
    return "a CTA that has ended";
  }

  static std::string party_name(const Cta& cta, uint32_t party) {
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

  // The running thread's fence, for what it has written.
  template <class Written, class PlaceOf>
  void show(std::vector<Written*>& unfenced, PlaceOf place_of) {
    for (Written* const written : unfenced) place_of(written).show(thread_->party, thread_->knows[thread_->party]);
    unfenced.clear();
  }

  void thread_main() {
    body_();
    thread_->ended = true;
    leave();
  }

  // From the machine to a thread, and back. Contexts only start fibers: each later switch by them would be a system
  // call.
  void resume(Thread& thread) {
    thread_ = &thread;
    blockIdx.x = thread.cta->index;
    threadIdx.x = unsigned(thread.index);
    if (_setjmp(machine_) == 0) {
      if (thread.started) _longjmp(thread.resume_point, 1);
      thread.started = true;
      setcontext(&thread.entry);
    }
    thread_ = nullptr;
  }

  void leave() {
    if (_setjmp(thread_->resume_point) == 0) _longjmp(machine_, 1);
  }

  // One turn: a warp until none of its lanes can go on, or one asynchronous operation. Returns whether there was
  // either.
  bool advance() {
    progressed_ = false;
    const bool units_first = pace_ == Pace::kEager || (pace_ == Pace::kMixed && random_() % 2 == 0);
    if (units_first && advance_units()) return true;
    bool polled = false;
    const size_t first_cta = (turns_.empty() ? random_() : turns_[turn_++ % turns_.size()]) % ctas_.size();
    for (size_t i = 0; i < ctas_.size(); ++i) {
      Cta& cta = *ctas_[(first_cta + i) % ctas_.size()];
      const size_t num_warps = cta.registers.size(), first_warp = random_() % num_warps;
      for (size_t j = 0; j < num_warps; ++j) {
        if (run_warp(cta, (first_warp + j) % num_warps, polled)) return true;
        if (!error_.empty()) return false;
      }
      if (polled && !turns_.empty()) return true;
    }
    return advance_units() || polled;
  }

  // Runs the lanes of a warp until none can go on; one that polls goes on in the next turn. Returns whether any did
  // more than that; `polled`: whether any polled.
  bool run_warp(Cta& cta, size_t warp, bool& polled) {
    const auto begin = cta.threads.begin() + warp * kWarpLanes;
    const auto end = begin + std::min<size_t>(kWarpLanes, cta.threads.end() - begin);
    for (auto thread = begin; thread != end; ++thread) thread->polls = false;
    bool ran = false;
    for (bool again = true; again;) {
      again = false;
      for (auto thread = begin; thread != end; ++thread) {
        if (thread->ended || thread->polls || (thread->wakes && !thread->wakes())) continue;
        thread->wakes = nullptr;
        resume(*thread);
        if (!error_.empty()) return false;
        polled |= thread->polls;
        again |= !thread->polls;
      }
      ran |= again;
    }
    progressed_ |= ran;
    return ran;
  }

  // One operation of an asynchronous unit.
  bool advance_units() {
    if (pace_ != Pace::kLazy) std::shuffle(units_.begin(), units_.end(), random_);
    const size_t first_cta = random_() % ctas_.size();
    for (Unit unit : units_) {
      for (size_t i = 0; i < ctas_.size(); ++i) {
        if (!advance_unit(unit, *ctas_[(first_cta + i) % ctas_.size()], random_)) continue;
        progressed_ = true;
        return true;
      }
    }
    return false;
  }

  // Ends CTAs whose threads have ended. Whoever still needs their shared memory has been forgotten.
  void retire() {
    for (size_t i = 0; i < ctas_.size();) {
      Cta& cta = *ctas_[i];
      if (!cta.ended()) {
        ++i;
        continue;
      }
      const auto& stores = cta.stores;
      const bool unread = std::any_of(stores.begin(), stores.end(), [](const Store& store) { return !store.read; });
      const bool multiplies = std::any_of(cta.products.begin(), cta.products.end(),
                                          [](const std::deque<Product>& products) { return !products.empty(); });
      if (!cta.loads.empty() || unread || multiplies)
        return fail_machine("a CTA ends before its loads, products or stores");
      while (!cta.stores.empty()) store_one(cta, random_);
      ctas_.erase(ctas_.begin() + i);
    }
  }

  // Lets the threads of a cluster go on if all that have not ended have come.
  void complete_cluster_meeting(unsigned cluster) {
    for (auto& cta : ctas_) {
      if (cta->index / cluster_ != cluster) continue;
      for (const Thread& thread : cta->threads) {
        if (!thread.ended && !thread.meets_cluster) return;
      }
    }
    Clock all;
    const auto for_each_thread = [&](auto visit) {
      for (auto& cta : ctas_) {
        if (cta->index / cluster_ != cluster) continue;
        for (Thread& thread : cta->threads) {
          if (thread.meets_cluster) visit(thread);
        }
      }
    };
    for_each_thread([&](Thread& thread) { release(thread, all); });
    for_each_thread([&](Thread& thread) { thread.knows.join(all), thread.meets_cluster = false; });
  }

  void fail_machine(const std::string& what) {
    std::ostringstream text;
    text << what << ".";
    for (const auto& cta : ctas_) {
      std::string last;
      for (const Thread& thread : cta->threads) {
        if (thread.ended) continue;
        std::string now = thread.polls ? "a value in memory" : thread.waits_for;
        if (!thread.polls && thread.waits_at != nullptr) {
          now += " at byte " + std::to_string(static_cast<const uint8_t*>(thread.waits_at) - cta->shared);
        }
        if (now != last)
          text << " CTA " << cta->index << " from thread " << thread.index << ": waits for " << now << ".";
        last = now;
      }
    }
    if (error_.empty()) error_ = text.str();
  }

  inline static Machine* running_ = nullptr;

  std::function<void()> body_;
  std::vector<std::unique_ptr<Cta>> ctas_;  // resident
  Thread* thread_ = nullptr;                // that runs; null while the machine does
  jmp_buf machine_;
  unsigned cluster_ = 1;
  std::vector<Time> slots_;  // CTAs that each has had
  std::vector<MemoryRange> watched_;
  Places places_;
  std::unordered_map<const void*, Clock> passed_on_;
  Random random_;
  Pace pace_ = Pace::kMixed;
  std::array<Unit, 3> units_;
  bool progressed_ = false;
  std::vector<uint8_t> turns_;
  size_t turn_ = 0;
  std::string error_;
};

inline Machine& machine() { return Machine::running(); }

}  // namespace emulator
