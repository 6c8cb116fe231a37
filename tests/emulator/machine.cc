// The machine, and how device code reaches it.
#include "machine.h"

#include <string>

#include "instructions.h"

EmulatedIndex threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

const char* run_launch(const Launch& launch, void (*body)(const void*), const void* context) {
  static std::string error;
  Machine machine;
  error = machine.run(launch, [=] { body(context); });
  return error.c_str();
}

void fail(const char* error) { machine().fail(error); }
void poll() { machine().poll(); }

uint8_t* shared_memory() { return machine().cta().shared; }
uint8_t* shared_pointer(uint32_t address, int bytes) { return machine().shared_pointer(address, bytes); }
uint32_t shared_address(const void* pointer) { return machine().shared_address(pointer); }
void fence_async() { Order::fence_async(machine().thread()); }
void fence_proxies() {
  fence_async();
  machine().thread().acquires = false;
}

void fence_barrier_init() { Order::fence_barrier_init(machine().thread()); }

const uint32_t* words() { return machine().thread().words; }

int cluster_rank() { return machine().cluster_rank(); }
void sync_cluster() { machine().sync_cluster(); }

}  // namespace emulator
