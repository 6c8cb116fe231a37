// What the machine does for the thread that runs: all that device code, compiled for the host, sees of it.
//
// Device code is compiled apart from the machine, such that each of its loads and stores tells the machine of itself
// (`watch.cc`).
#pragma once

#include <cstddef>
#include <cstdint>

#include "launch.h"

struct EmulatedIndex {
  unsigned x;
};
extern EmulatedIndex threadIdx, blockIdx, gridDim, blockDim;

namespace emulator {

constexpr int kUnit = 16;  // bytes; what the copy engine moves multiples of

// Runs `body(context)` on every thread of the launch. Returns what went wrong, or nothing.
const char* run_launch(const Launch& launch, void (*body)(const void*), const void* context);

// Ends the launch, from a thread.
void fail(const char* error);
inline void check(bool holds, const char* rule) {
  if (!holds) fail(rule);
}

// Lets others run before memory is looked at again.
void poll();

// -- shared memory ----------------------------------------------------------------------------------------------------

uint8_t* shared_memory();
uint8_t* shared_pointer(uint32_t address, int bytes);
uint32_t shared_address(const void* pointer);
void fence_async();         // of shared memory
void fence_proxies();       // of all memory
void fence_barrier_init();  // of mbarriers

// -- warps ------------------------------------------------------------------------------------------------------------

enum class Collective {
  kShuffle,
  kShuffleUp,
  kShuffleXor,
  kBallot,
  kSync,
  kSetRegisters,
  kStoreMatrices,
  kLoadMatrices,
  kGather
};

// What a lane brings to a collective of its warp, `words` being 4, and what it takes away when all have come.
uint32_t meet(unsigned mask, Collective collective, uint32_t value, uint32_t argument = 0,
              const uint32_t* words = nullptr);

// The words that the thread brought to, or took from, its last collective.
const uint32_t* words();

enum class Format { kBf16, kFp16 };

// mma.m16n8k16: 4 words of `a`, 2 of `b`, 4 values of `d`.
void multiply_in_warp(Format format, float* const* d, const uint32_t* a, const uint32_t* b);

// -- barriers ---------------------------------------------------------------------------------------------------------

void init_mbarrier(const void* barrier, uint32_t arrivals);
void expect_bytes(const void* barrier, int bytes);
void arrive_mbarrier(const void* barrier);
void arrive_mbarrier(const void* barrier, int rank);       // of that rank of the cluster
void wait_mbarrier(const void* barrier, uint32_t parity);  // until the phase of that parity is complete
void arrive_named_barrier(uint32_t id, uint32_t threads);
void sync_named_barrier(uint32_t id, uint32_t threads);
void set_registers(int registers);

// -- clusters ---------------------------------------------------------------------------------------------------------

int cluster_rank();
void sync_cluster();

// -- the copy engine --------------------------------------------------------------------------------------------------

constexpr int kMapDims = 5;

void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims]);
// Into the same place of those ranks of the cluster whose bits are set: each has it when it comes.
void load_box(const void* map, const void* barrier, void* shared, const int32_t (&first)[kMapDims], uint32_t ranks);
void load_bytes(const void* memory, const void* barrier, void* shared, int bytes);
// From shared memory to that of another CTA of the cluster.
void copy_to_rank(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier);

void store_box(const void* map, const void* shared, const int32_t (&first)[kMapDims]);
void store_bulk(float* memory, const void* shared, int bytes);
void reduce_add_bulk(float* memory, const void* shared, int bytes);
void commit_stores();

enum class StoreStage { kRead, kDone };  // of shared memory; in memory

// Until all but the thread's last `pending` groups have come to that stage.
void wait_stores(int pending, StoreStage stage);

// -- products of a warpgroup ------------------------------------------------------------------------------------------

enum class Major { K, MN };

// One wgmma of depth 16, of 64 rows.
struct Multiplication {
  Format format;
  int columns;
  Major major_a, major_b;
  uint64_t a, b;  // matrix descriptors; `a` if it is in shared memory
  bool adds;
};

// `a_words`: the thread's fragment, or null; `d`: its accumulators. Both are looked at later, too.
void multiply(const Multiplication& what, const uint32_t* a_words, float* d);
void commit_products();
void wait_products(int pending);  // until at most so many groups are under way

// -- memory that all CTAs share ---------------------------------------------------------------------------------------

int atomic_add(int* address, int value);
int atomic_exchange(int* address, int value);
int load_acquire(const int* address);
void add_release(int* address, int value);
void reduce_add(float* memory, const float* values, int count);
void fence_memory();

}  // namespace emulator
