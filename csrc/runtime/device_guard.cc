#include "device_guard.h"

#include <array>
#include <atomic>
#include <mutex>

#include "check.h"
#include "driver.h"

namespace fa {
namespace {

// Retained once per device and kept until the process ends, as every CUDA library keeps it.
CUcontext primary_context(int ordinal) {
  static std::array<std::atomic<CUcontext>, kMaxDevices> contexts{};
  static std::mutex mutex;
  std::atomic<CUcontext>& slot = contexts[ordinal];
  CUcontext context = slot.load(std::memory_order_acquire);
  if (context != nullptr) return context;
  std::lock_guard<std::mutex> lock(mutex);
  context = slot.load(std::memory_order_relaxed);
  if (context == nullptr) {
    RelaxedCaptureGuard relaxed;
    CUdevice device = device_handle(ordinal);
    check_driver(driver().cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    slot.store(context, std::memory_order_release);
  }
  return context;
}

bool is_on(CUcontext current, int ordinal) {
  if (current == nullptr) return false;
  CUdevice device;
  check_driver(driver().cuCtxGetDevice(&device), "cuCtxGetDevice");
  return device == device_handle(ordinal);
}

}  // namespace

DeviceGuard::DeviceGuard(int ordinal) {
  FA_CHECK(0 <= ordinal && ordinal < kMaxDevices, ValueError)
      << "device " << ordinal << " is not supported; supported is 0 to " << kMaxDevices - 1;
  CUcontext current = nullptr;
  check_driver(driver().cuCtxGetCurrent(&current), "cuCtxGetCurrent");
  // Nearly always: every library that shares tensors works in the primary context.
  CUcontext primary = primary_context(ordinal);
  if (current == primary || is_on(current, ordinal)) return;
  check_driver(driver().cuCtxPushCurrent(primary), "cuCtxPushCurrent");
  pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (!pushed_) return;
  CUcontext context;
  driver().cuCtxPopCurrent(&context);
}

RelaxedCaptureGuard::RelaxedCaptureGuard() {
  check_driver(driver().cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
}

RelaxedCaptureGuard::~RelaxedCaptureGuard() { driver().cuThreadExchangeStreamCaptureMode(&mode_); }

}  // namespace fa
