// Loaded kernels, and what the runtime must know of each to launch it.
#pragma once

#include <cuda.h>

#include <atomic>
#include <cstdint>
#include <string>

#include "device_guard.h"
#include "tensor_map.h"

namespace fa {

// What is fixed when a kernel is compiled.
struct KernelTraits {
  std::string symbol;
  uint32_t num_threads;     // of a CTA
  uint32_t smem_bytes;      // dynamic shared memory of a CTA
  int32_t promoted_floats;  // of ForwardParams::promoted_out, for each CTA
  uint32_t cluster_size;
  bool programmatic_launch;  // may start before the kernel ahead of it in the stream has ended
  TensorMapBox q_box;
  TensorMapBox k_box;
  TensorMapBox v_box;
  TensorMapBox o_box;
};

class Kernel {
 public:
  // Hands the cubin to the driver, which copies it and loads it into a device's context at first use.
  Kernel(KernelTraits traits, const char* cubin);

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

// Handles count from 0. Kernels are never unloaded: a captured graph may hold them until the process ends.
int64_t register_kernel(KernelTraits traits, const char* cubin);

// Throws ValueError for a handle that register_kernel did not return.
const Kernel& find_kernel(int64_t handle);

}  // namespace fa
