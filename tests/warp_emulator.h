// Device code on the host: CTAs of one warp each, whose lanes are fibers of one thread.
//
// Lanes meet at the warp-wide functions. CTAs take turns in an order that the caller gives, and a turn ends behind
// every atomic operation and fence, so that the order says exactly how the CTAs' accesses to memory interleave.
// To be included before the device headers.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <strings.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#define FA_DEVICE inline

struct EmulatedIndex {
  unsigned x;
};
inline EmulatedIndex threadIdx, blockIdx, gridDim;

namespace emulator {

constexpr int kLanes = 32;
constexpr int kStackBytes = 64 * 1024;
constexpr int kMaxCollectives = 1000000;               // of a launch; far above what the tests' problems take
constexpr int kFaults[] = {SIGSEGV, SIGFPE, SIGABRT};  // memory, division by zero, overflow under -ftrapv

enum class State { kReady, kAtMemory, kAtCollective, kEnded };
enum class Collective { kShuffle, kShuffleUp, kBallot };

struct Lane {
  State state = State::kReady;
  bool started = false;
  Collective collective;
  int value, argument;  // what the lane brings to the collective
  int result;           // and what it takes away
  ucontext_t entry;
  jmp_buf resume_point;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};  // not cleared, which would take most of a launch's time
};

class Grid {
 public:
  // Runs `body` on every lane. The turn after turns[i] is turns[i + 1], and after the last one the first: an index into
  // the CTAs that have not ended, modulo their number. Returns what went wrong, or nothing.
  std::string run(int num_ctas, const std::vector<uint8_t>& turns, std::function<void()> body) {
    body_ = std::move(body);
    gridDim.x = num_ctas;
    running_ = this;
    prepare(num_ctas * kLanes);
    struct sigaction on_fault = {}, previous[std::size(kFaults)];
    on_fault.sa_handler = [](int fault) { running_->fail_or_die(fault); };
    on_fault.sa_flags = SA_NODEFER;  // the handler is left by a jump, which would leave the signal blocked
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &on_fault, &previous[i]);

    std::vector<int> unfinished(num_ctas);
    for (int cta = 0; cta < num_ctas; ++cta) unfinished[cta] = cta;
    for (size_t turn = 0; !unfinished.empty() && error_.empty(); ++turn) {
      const auto cta = unfinished.begin() + turns[turn % turns.size()] % unfinished.size();
      if (step(*cta)) unfinished.erase(cta);
    }
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &previous[i], nullptr);
    return error_;
  }

  // The functions below are called by the running lane.

  // Ends the launch. Does not return.
  void fail(const std::string& error) {
    error_ = "CTA " + std::to_string(blockIdx.x) + ", lane " + std::to_string(threadIdx.x) + ": " + error;
    leave(State::kEnded);
  }

  void end_turn() { leave(State::kAtMemory); }

  int meet(unsigned mask, Collective collective, int value, int argument = 0) {
    if (mask != ~0u) fail("a collective of less than a warp");
    Lane& lane = *lane_;
    lane.collective = collective;
    lane.value = value;
    lane.argument = argument;
    leave(State::kAtCollective);
    return lane.result;
  }

  static Grid& running() { return *running_; }

 private:
  void prepare(int num_lanes) {
    lanes_ = std::vector<Lane>(num_lanes);
    for (Lane& lane : lanes_) {
      getcontext(&lane.entry);
      lane.entry.uc_stack.ss_sp = lane.stack.get();
      lane.entry.uc_stack.ss_size = kStackBytes;
      makecontext(&lane.entry, [] { running_->lane_main(); }, 0);
    }
  }

  void lane_main() {
    body_();
    leave(State::kEnded);
  }

  // From the driver to a lane, and back. Contexts only start fibers: each later switch by them would be a system call.
  void resume(int cta, int index) {
    lane_ = &lanes_[cta * kLanes + index];
    blockIdx.x = cta;
    threadIdx.x = index;
    if (_setjmp(driver_) == 0) {
      if (lane_->started) _longjmp(lane_->resume_point, 1);
      lane_->started = true;
      setcontext(&lane_->entry);
    }
    lane_ = nullptr;
  }

  void leave(State state) {
    lane_->state = state;
    if (_setjmp(lane_->resume_point) == 0) _longjmp(driver_, 1);
  }

  void fail_or_die(int fault) {
    if (lane_ != nullptr) fail(strsignal(fault));
    signal(fault, SIG_DFL);  // the emulator's own
    raise(fault);
  }

  // One turn of a CTA. Returns whether it has ended.
  bool step(int cta) {
    Lane* const lanes = &lanes_[cta * kLanes];
    const auto count = [&](State state) {
      return std::count_if(lanes, lanes + kLanes, [&](const Lane& lane) { return lane.state == state; });
    };
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i].state == State::kAtMemory) lanes[i].state = State::kReady;
    }
    for (;;) {
      for (int i = 0; i < kLanes; ++i) {
        if (lanes[i].state == State::kReady) resume(cta, i);
        if (!error_.empty()) return false;
      }
      if (count(State::kEnded) == kLanes) return true;
      if (count(State::kAtMemory) > 0) return false;
      if (count(State::kAtCollective) < kLanes || !complete(lanes)) {
        error_ = "CTA " + std::to_string(cta) + ": the lanes part ways, or never end";
        return false;
      }
    }
  }

  // Returns whether all lanes came to the same collective.
  bool complete(Lane* lanes) {
    if (++num_collectives_ > kMaxCollectives) return false;
    unsigned ballot = 0;
    for (int i = 0; i < kLanes; ++i) {
      if (lanes[i].collective != lanes[0].collective) return false;
      ballot |= unsigned(lanes[i].value != 0) << i;
    }
    for (int i = 0; i < kLanes; ++i) {
      const int argument = lanes[i].argument;
      const int source =
          lanes[0].collective == Collective::kShuffle ? argument % kLanes : (i < argument ? i : i - argument);
      lanes[i].result = lanes[0].collective == Collective::kBallot ? int(ballot) : lanes[source].value;
      lanes[i].state = State::kReady;
    }
    return true;
  }

  inline static Grid* running_ = nullptr;

  std::function<void()> body_;
  std::vector<Lane> lanes_;
  Lane* lane_ = nullptr;  // the one that runs; null while the driver does
  jmp_buf driver_;
  std::string error_;
  int num_collectives_ = 0;
};

}  // namespace emulator

inline int __shfl_sync(unsigned mask, int value, int source) {
  return emulator::Grid::running().meet(mask, emulator::Collective::kShuffle, value, source);
}

inline int __shfl_up_sync(unsigned mask, int value, int distance) {
  return emulator::Grid::running().meet(mask, emulator::Collective::kShuffleUp, value, distance);
}

inline int __shfl_xor_sync(unsigned mask, int value, int distance) {
  return emulator::Grid::running().meet(mask, emulator::Collective::kShuffle, value, int(threadIdx.x) ^ distance);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return unsigned(emulator::Grid::running().meet(mask, emulator::Collective::kBallot, predicate));
}

inline int __ffs(int value) { return ffs(value); }

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  emulator::Grid::running().end_turn();
  return before;
}

inline void __threadfence() { emulator::Grid::running().end_turn(); }
