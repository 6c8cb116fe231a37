// Makes a device's context current for a scope, and puts things back.
#pragma once

#include <cuda.h>

namespace fa {

// Most devices one process can use; their state is kept in fixed tables, read without a lock.
constexpr int kMaxDevices = 64;

// While it lives, the calling thread's current context is one of `ordinal`. A context of that device that is
// current already (the caller's own, say) stays; otherwise the primary context is pushed, and popped at the
// end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int ordinal);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool pushed_ = false;
};

// While it lives, calls that load code are allowed on this thread although a stream is being captured.
class RelaxedCaptureGuard {
 public:
  RelaxedCaptureGuard();
  ~RelaxedCaptureGuard();
  RelaxedCaptureGuard(const RelaxedCaptureGuard&) = delete;
  RelaxedCaptureGuard& operator=(const RelaxedCaptureGuard&) = delete;

 private:
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;
};

}  // namespace fa
