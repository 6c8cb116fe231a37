// The CUDA driver, opened at first use, so that this library loads on machines without a GPU.
#pragma once

#include <cuda.h>

#include <string>

static_assert(CUDA_VERSION >= 12040, "cuda.h of CUDA 12.4 or newer is required");

namespace fa {

// cuda.h maps some names to a versioned symbol (cuCtxPushCurrent is cuCtxPushCurrent_v2); the macros below
// expand them, so that members and looked-up symbols carry the version which cuda.h declares.
#define FA_FOR_EACH_DRIVER_FUNCTION(DO) \
  DO(cuInit)                            \
  DO(cuDriverGetVersion)                \
  DO(cuGetErrorName)                    \
  DO(cuGetErrorString)                  \
  DO(cuDeviceGet)                       \
  DO(cuDeviceGetCount)                  \
  DO(cuDeviceGetAttribute)              \
  DO(cuDevicePrimaryCtxRetain)          \
  DO(cuCtxGetCurrent)                   \
  DO(cuCtxGetDevice)                    \
  DO(cuCtxPushCurrent)                  \
  DO(cuCtxPopCurrent)                   \
  DO(cuMemAlloc)                        \
  DO(cuMemsetD32Async)                  \
  DO(cuStreamCreate)                    \
  DO(cuStreamDestroy)                   \
  DO(cuStreamIsCapturing)               \
  DO(cuStreamSynchronize)               \
  DO(cuThreadExchangeStreamCaptureMode) \
  DO(cuLibraryLoadData)                 \
  DO(cuLibraryGetKernel)                \
  DO(cuKernelGetFunction)               \
  DO(cuKernelGetParamInfo)              \
  DO(cuKernelSetAttribute)              \
  DO(cuTensorMapEncodeTiled)            \
  DO(cuLaunchKernelEx)

struct Driver {
#define FA_DECLARE_DRIVER_FUNCTION(name) decltype(&::name) name;
  FA_FOR_EACH_DRIVER_FUNCTION(FA_DECLARE_DRIVER_FUNCTION)
#undef FA_DECLARE_DRIVER_FUNCTION
};

// The initialised driver. Throws UnsupportedDeviceError where there is none; a later call tries again.
const Driver& driver();

// Throws RuntimeError with the driver's own words unless `result` is success. `action`: "cuInit", ...
void check_driver(CUresult result, const char* action);

std::string describe(CUresult result);  // "CUDA_ERROR_INVALID_VALUE (invalid argument)"

// The driver's handle of a device ordinal; throws ValueError for one that does not exist.
CUdevice device_handle(int ordinal);

int device_attribute(int ordinal, CUdevice_attribute attribute);

}  // namespace fa
