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
    CUdevice device = device_handle(ordinal);
    check_driver(driver().cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
    slot.store(context, std::memory_order_release);
  }
  return context;
}

bool current_context_is_on(int ordinal) {
  CUcontext context = nullptr;
  check_driver(driver().cuCtxGetCurrent(&context), "cuCtxGetCurrent");
  if (context == nullptr) return false;
  CUdevice device;
  check_driver(driver().cuCtxGetDevice(&device), "cuCtxGetDevice");
  return device == device_handle(ordinal);
}

}  // namespace

DeviceGuard::DeviceGuard(int ordinal) {
  FA_CHECK(0 <= ordinal && ordinal < kMaxDevices, ValueError)
      << "device " << ordinal << " is not supported; supported is 0 to " << kMaxDevices - 1;
  if (current_context_is_on(ordinal)) return;
  check_driver(driver().cuCtxPushCurrent(primary_context(ordinal)), "cuCtxPushCurrent");
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
