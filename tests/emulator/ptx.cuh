// Takes the place of csrc/kernels/core/ptx.cuh on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "enums.h"
#include "floats.h"
#include "instructions.h"
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
inline void begin_register(float&) {}

inline uint8_t* dynamic_shared_memory() { return emulator::shared_memory(); }

inline void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  const uint32_t words[] = {a, b, c, d};
  emulator::meet(~0u, emulator::Collective::kStoreMatrices, address, 0, words);
}

inline void load_matrices(uint32_t address, uint32_t* words) {
  emulator::meet(~0u, emulator::Collective::kLoadMatrices, address);
  const uint32_t* const loaded = emulator::words();
  for (int i = 0; i < 4; ++i) words[i] = loaded[i];
}

inline void reduce_add(float* to, float4 values) {
  const float parts[] = {values.x, values.y, values.z, values.w};
  emulator::reduce_add(to, parts, 4);
}

inline void bulk_reduce_add(float* to, uint32_t from, int bytes) {
  emulator::reduce_add_bulk(to, emulator::shared_pointer(from, bytes), bytes);
}

inline void wait_bulk_groups_done() { emulator::wait_stores(0, emulator::StoreStage::kDone); }
inline void fence_proxies() { emulator::fence_proxies(); }
inline int load_acquire(const int32_t* address) { return emulator::load_acquire(address); }
inline void increment_release(int32_t* address) { emulator::add_release(address, 1); }

inline int cluster_rank() { return emulator::cluster_rank(); }
inline void sync_cluster() { emulator::sync_cluster(); }

inline void bulk_copy_to(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  emulator::copy_to_rank(rank, to, from, bytes, barrier);
}

template <Dtype kDtype>
constexpr emulator::Format kFormat = kDtype == Dtype::kBf16 ? emulator::Format::kBf16 : emulator::Format::kFp16;

template <Dtype kDtype>
uint32_t pack(float low, float high) {
  return emulator::encode(kFormat<kDtype>, low) | uint32_t(emulator::encode(kFormat<kDtype>, high)) << 16;
}

template <Dtype kDtype>
float2 unpack(uint32_t packed) {
  return {emulator::decode(kFormat<kDtype>, uint16_t(packed)),
          emulator::decode(kFormat<kDtype>, uint16_t(packed >> 16))};
}

}  // namespace fa
