// Takes the place of csrc/kernels/core/ptx.cuh on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "copies.h"
#include "enums.h"
#include "floats.h"
#include "platform.h"

namespace fa {

// ex2.approx.ftz: results below the normal numbers are 0.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.f : y;
}

inline float log2_approx(float x) { return std::log2(x); }
inline float tanh_approx(float x) { return std::tanh(x); }
inline void hold_until_known(float) {}

inline uint8_t* dynamic_shared_memory() { return emulator::machine().cta().shared; }

inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[] = {a, b, c, d};
  emulator::meet(~0u, emulator::Collective::kStoreMatrices, address, 0, words);
}

inline void load_matrices(uint32_t address, uint32_t* words) {
  emulator::meet(~0u, emulator::Collective::kLoadMatrices, address);
  std::copy_n(emulator::machine().thread().words, 4, words);
}

inline void reduce_add(float* to, float4 values) {
  emulator::machine().check(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a vector reduction is aligned to 16 bytes");
  const float parts[] = {values.x, values.y, values.z, values.w};
  for (int i = 0; i < 4; ++i) to[i] += parts[i];
}

inline void bulk_reduce_add(float* to, uint32_t from, int bytes) {
  emulator::reduce_add(to, reinterpret_cast<float*>(emulator::machine().shared_pointer(from, bytes)), bytes);
}

inline void wait_bulk_groups_done() { emulator::wait_stores(0, emulator::StoreStage::kDone); }
inline void fence_proxies() { emulator::machine().fence_async(); }
inline int load_acquire(const int32_t* address) { return *address; }
inline void increment_release(int32_t* address) { ++*address; }

inline int cluster_rank() { return emulator::machine().cluster_rank(); }
inline void sync_cluster() { emulator::machine().sync_cluster(); }

inline void bulk_copy_to(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  emulator::copy_to_rank(rank, to, from, bytes, barrier);
}

template <Dtype kDtype>
using Format = std::conditional_t<kDtype == Dtype::kBf16, emulator::Bf16, emulator::Fp16>;

template <Dtype kDtype>
uint32_t pack(float low, float high) {
  return Format<kDtype>::encode(low) | uint32_t(Format<kDtype>::encode(high)) << 16;
}

template <Dtype kDtype>
float2 unpack(uint32_t packed) {
  return {Format<kDtype>::decode(uint16_t(packed)), Format<kDtype>::decode(uint16_t(packed >> 16))};
}

}  // namespace fa
