// Loaded kernels, and what the runtime must know of each to launch it.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "check.h"
#include "device_guard.h"

namespace fa {

// What is fixed when a kernel is compiled.
struct KernelTraits {
  std::string symbol;
  uint32_t num_threads;  // of a CTA
  uint32_t smem_bytes;   // dynamic shared memory of a CTA
  size_t params_bytes;   // the size of its only parameter, in this runtime
  int nvcc_release;      // that compiled it, as CUDA counts them: 13000 is 13.0. 0: unknown
  uint32_t cluster_size = 1;
};

// Hands a cubin to the driver, which copies it and loads it into a device's context at first use. `name` and
// `nvcc_release`, as in KernelTraits, are for errors.
CUlibrary load_library(const std::string& name, const char* cubin, int nvcc_release);

class Kernel {
 public:
  // Throws RuntimeError if the library has no such kernel, or one with other parameters.
  Kernel(KernelTraits traits, CUlibrary library);

  const KernelTraits& traits() const { return traits_; }

  // Allows the kernel its shared memory on this device and loads it there; does so once for each device.
  // The device's context must be current.
  void prepare(int ordinal) const;

  // Enqueues the kernel on `stream` of the current context. `params` is copied before this returns.
  void launch(uint32_t num_ctas, const void* params, CUstream stream) const;

 private:
  KernelTraits traits_;
  CUkernel kernel_;
  mutable std::atomic<uint64_t> prepared_devices_{0};  // one bit for each device
  static_assert(kMaxDevices <= 64, "one bit for each device");
};

// The loaded kernels of one family, by handles that count from 0. They are never unloaded: a captured graph may hold
// them until the process ends.
template <class Loaded>
class Registry {
 public:
  // Never destroyed: at exit the driver may be gone before static destructors run.
  static Registry& instance() {
    static Registry& registry = *new Registry;
    return registry;
  }

  int64_t add(std::unique_ptr<const Loaded> loaded) {
    std::unique_lock<std::shared_mutex> lock(mutex_);
    all_.push_back(std::move(loaded));
    return static_cast<int64_t>(all_.size()) - 1;
  }

  // Throws ValueError for a handle that add() did not return.
  const Loaded& find(int64_t handle) {
    std::shared_lock<std::shared_mutex> lock(mutex_);
    int64_t count = static_cast<int64_t>(all_.size());
    FA_CHECK(0 <= handle && handle < count, ValueError)
        << "handle is " << handle << "; supported are the handles of the " << count << " loaded kernel(s)";
    return *all_[static_cast<size_t>(handle)];
  }

 private:
  std::shared_mutex mutex_;
  std::vector<std::unique_ptr<const Loaded>> all_;
};

}  // namespace fa
