// Faults of device code, which end a launch rather than the process.
#pragma once

#include <signal.h>
#include <string.h>

#include <iterator>

namespace emulator {

constexpr int kFaults[] = {SIGSEGV, SIGFPE, SIGABRT};  // memory, division by zero, failed check of the host's library

class FaultHandler {
 public:
  // `end_launch` is told what happened, and does not return if device code was running. Otherwise the process ends.
  explicit FaultHandler(void (*end_launch)(const char*)) {
    end_launch_ = end_launch;
    struct sigaction on_fault = {};
    on_fault.sa_handler = [](int fault) {
      end_launch_(strsignal(fault));
      signal(fault, SIG_DFL);
      raise(fault);
    };
    on_fault.sa_flags = SA_NODEFER;  // the handler is left by a jump, which would leave the signal blocked
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &on_fault, &previous_[i]);
  }
  ~FaultHandler() {
    for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &previous_[i], nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  inline static void (*end_launch_)(const char*) = nullptr;
  struct sigaction previous_[std::size(kFaults)];
};

}  // namespace emulator
