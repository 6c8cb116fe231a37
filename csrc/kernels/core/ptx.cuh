// Instructions that CUTLASS has no wrapper for.
#pragma once

#include <cstdint>

#include "enums.h"
#include "platform.h"

namespace fa {

FA_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

FA_DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The CTA's dynamic shared memory. Tiles need 1024-byte alignment: the swizzle pattern is a function of the address.
FA_DEVICE uint8_t* dynamic_shared_memory() {
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  return shared_memory;
}

// Four 8x8 matrices of 16-bit elements to shared memory: lane l gives the address of row l % 8 of matrix l / 8, and
// holds elements 2 (l % 4) and the next of row l / 4 of each.
FA_DEVICE void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// The other way round.
FA_DEVICE void load_matrices(uint32_t address, uint32_t* words) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

// Adds four floats to memory. `to`: aligned to 16 bytes.
FA_DEVICE void reduce_add(float* to, float4 values) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values.x), "f"(values.y),
               "f"(values.z), "f"(values.w)
               : "memory");
}

// Adds `bytes` bytes of floats in shared memory (address `from`) to memory. Of the current bulk group.
FA_DEVICE void bulk_reduce_add(float* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// Until the thread's bulk groups are done in memory; CUTLASS's wait is for the copy engine to have read shared memory.
FA_DEVICE void wait_bulk_groups_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Between accesses by ordinary instructions and by the copy engine, to any memory.
FA_DEVICE void fence_proxies() { asm volatile("fence.proxy.async;" ::: "memory"); }

FA_DEVICE int load_acquire(const int32_t* address) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

FA_DEVICE void increment_release(int32_t* address) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(address) : "memory");
}

// -- between the CTAs of a cluster, which all lay out shared memory alike ---------------------------------------

// Volatile, or the compiler would keep it in a register for good.
FA_DEVICE int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

// Waits for all threads of the cluster that have not exited, and makes what they wrote visible.
FA_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// `address`, of this CTA's shared memory, in rank `rank`.
FA_DEVICE uint32_t address_in(int rank, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// Copies shared memory from `from` to `to` of rank `rank`, and completes the bytes at its mbarrier `barrier`.
FA_DEVICE void bulk_copy_to(int rank, uint32_t to, uint32_t from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   address_in(rank, to)),
               "r"(from), "r"(bytes), "r"(address_in(rank, barrier))
               : "memory");
}

// -- scheduling ---------------------------------------------------------------------------------------------------

// What follows in program order is issued only when `sum`, which is never negative, is known. The compiler moves waits
// for products up, above arithmetic that does not depend on them, so that it would no longer run beside the products;
// it cannot move them above a branch.
FA_DEVICE void hold_until_known(float sum) {
  if (sum < 0.f) asm volatile("nanosleep.u32 1;" ::: "memory");
}

// `value` becomes anything, from here on. An uninitialised variable may share its register with whatever the compiler
// likes, long before; this one begins here.
FA_DEVICE void begin_register(float& value) { asm volatile("" : "=f"(value)::"memory"); }

// Two floats rounded to 16 bits, `low` in the low half.
template <Dtype kDtype>
FA_DEVICE uint32_t pack(float low, float high) {
  uint32_t packed;
  if constexpr (kDtype == Dtype::kBf16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The two 16-bit floats of a word, the low half first.
template <Dtype kDtype>
FA_DEVICE float2 unpack(uint32_t packed) {
  float2 values;
  if constexpr (kDtype == Dtype::kBf16) {
    values.x = __uint_as_float(packed << 16);
    values.y = __uint_as_float(packed & 0xFFFF0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(packed));
  }
  return values;
}

}  // namespace fa
