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
#include <utility>
#include <vector>

#include "async_units.h"
#include "faults.h"
#include "instructions.h"
#include "order.h"
#include "state.h"

namespace emulator {

constexpr int kMaxFruitlessRounds = 200000;  // of polling, in which nothing else happens

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
    order_.begin({watched, watched + num_watched}, resident);
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

  bool has_thread() const { return thread_ != nullptr; }
  Thread& thread() { return *thread_; }
  Cta& cta() { return *thread_->cta; }
  int warpgroup() { return thread_->index / kWarpgroupLanes; }

  Order& order() { return order_; }

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

  uint32_t shared_address(const void* pointer) { return cta().shared_address(pointer); }

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

  void sync_cluster() {
    Thread& self = *thread_;
    self.meets_cluster = true;
    wait("the cluster", [this, &self] {
      complete_cluster_meeting(self.cta->index / cluster_);
      return !self.meets_cluster;
    });
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
    for (unsigned i = 0; i < block; ++i) {
      Thread& thread = cta->threads[i];
      thread.cta = cta.get();
      thread.index = int(i);
      getcontext(&thread.entry);
      thread.entry.uc_stack.ss_sp = thread.stack.get();
      thread.entry.uc_stack.ss_size = kStackBytes;
      makecontext(&thread.entry, [] { running_->thread_main(); }, 0);
    }
    order_.enter(*cta);
    return cta;
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
    for_each_thread([&](Thread& thread) { order_.release(thread, all); });
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
  Order order_{ctas_, [this](const std::string& error) { fail(error); }};
  Thread* thread_ = nullptr;  // that runs; null while the machine does
  jmp_buf machine_;
  unsigned cluster_ = 1;
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
