// Qualifiers that let index arithmetic compile for the GPU and, in tests, for the host.
#pragma once

#if defined(__CUDACC__)
#define FA_DEVICE __device__ __forceinline__
#define FA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FA_HOST_DEVICE inline
#endif

namespace fa {

// Of a >= 0 and b > 0.
FA_HOST_DEVICE constexpr int ceil_div(int a, int b) { return int((unsigned(a) + unsigned(b) - 1) / unsigned(b)); }
FA_HOST_DEVICE constexpr int min_of(int a, int b) { return a < b ? a : b; }
FA_HOST_DEVICE constexpr int max_of(int a, int b) { return a < b ? b : a; }

}  // namespace fa
