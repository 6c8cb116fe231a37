#include "tile_counters.h"

#include <array>
#include <atomic>
#include <mutex>

#include "check.h"
#include "device_guard.h"
#include "driver.h"

namespace fa {
namespace {

// A stream holds about a thousand pending launches and a device runs 128 streams at once.
constexpr uint32_t kRingSize = 1 << 18;
// Counters that captured launches share out before more are allocated.
constexpr uint32_t kCaptureBlock = 1 << 12;

// Zeroed device memory that lives until the process ends. A stream of its own, since other streams may be
// captured.
TileCounter* allocate_counters(size_t count) {
  RelaxedCaptureGuard relaxed;
  CUdeviceptr memory = 0;
  check_driver(driver().cuMemAlloc(&memory, count * sizeof(TileCounter)), "cuMemAlloc (tile counters)");
  CUstream stream = nullptr;
  check_driver(driver().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  check_driver(driver().cuMemsetD32Async(memory, 0, count * sizeof(TileCounter) / sizeof(int32_t), stream),
               "cuMemsetD32Async");
  check_driver(driver().cuStreamSynchronize(stream), "cuStreamSynchronize");
  check_driver(driver().cuStreamDestroy(stream), "cuStreamDestroy");
  return reinterpret_cast<TileCounter*>(memory);
}

class DeviceCounters {
 public:
  TileCounter* next_in_ring() {
    TileCounter* ring = ring_.load(std::memory_order_acquire);
    if (ring == nullptr) ring = create_ring();
    return ring + launches_.fetch_add(1, std::memory_order_relaxed) % kRingSize;
  }

  TileCounter* next_for_capture() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (capture_left_ == 0) {
      capture_next_ = allocate_counters(kCaptureBlock);
      capture_left_ = kCaptureBlock;
    }
    --capture_left_;
    return capture_next_++;
  }

 private:
  TileCounter* create_ring() {
    std::lock_guard<std::mutex> lock(mutex_);
    TileCounter* ring = ring_.load(std::memory_order_relaxed);
    if (ring == nullptr) {
      ring = allocate_counters(kRingSize);
      ring_.store(ring, std::memory_order_release);
    }
    return ring;
  }

  std::mutex mutex_;
  std::atomic<TileCounter*> ring_{nullptr};
  std::atomic<uint32_t> launches_{0};
  TileCounter* capture_next_ = nullptr;
  uint32_t capture_left_ = 0;
};

}  // namespace

TileCounter* next_tile_counter(int ordinal, CUstream stream) {
  // Never destroyed: at exit the driver may be gone before static destructors run.
  static auto& devices = *new std::array<DeviceCounters, kMaxDevices>;
  CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
  check_driver(driver().cuStreamIsCapturing(stream, &status), "cuStreamIsCapturing");
  DeviceCounters& counters = devices[ordinal];
  return status == CU_STREAM_CAPTURE_STATUS_NONE ? counters.next_in_ring() : counters.next_for_capture();
}

}  // namespace fa
