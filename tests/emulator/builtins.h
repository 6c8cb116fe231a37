// What CUDA C++ adds to the language, as far as the kernels use it.
#pragma once

#include <strings.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "instructions.h"

#define FA_DEVICE inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(threads, ctas)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

// A value of 32 bits through a collective of the warp.
template <class Value>
Value exchange(unsigned mask, Collective collective, Value value, int argument) {
  static_assert(sizeof(Value) == 4);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = meet(mask, collective, bits, uint32_t(argument));
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulator

template <class Value>
Value __shfl_sync(unsigned mask, Value value, int source) {
  return emulator::exchange(mask, emulator::Collective::kShuffle, value, source);
}

template <class Value>
Value __shfl_up_sync(unsigned mask, Value value, int distance) {
  return emulator::exchange(mask, emulator::Collective::kShuffleUp, value, distance);
}

template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  return emulator::exchange(mask, emulator::Collective::kShuffleXor, value, lanes);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::meet(mask, emulator::Collective::kBallot, uint32_t(predicate));
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

inline void __syncwarp() { emulator::meet(~0u, emulator::Collective::kSync, 0); }

inline int __ffs(int value) { return ffs(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(unsigned(value)); }

inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline void __syncthreads() { emulator::sync_named_barrier(0, blockDim.x); }

inline int atomicAdd(int* address, int value) { return emulator::atomic_add(address, value); }
inline int atomicExch(int* address, int value) { return emulator::atomic_exchange(address, value); }
inline void __threadfence() { emulator::fence_memory(); }
inline void __nanosleep(unsigned) { emulator::poll(); }
