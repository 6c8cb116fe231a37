// A stand-in for libcuda.so.1 with one Hopper GPU, whose kernels run in the emulator. Its memory is the host's, a
// launch has ended when it returns, and a "cubin" is the path of a library built from a kernel's source.
#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../tensor_map_rules.h"
#include "launch.h"
#include "tensor_map.h"

namespace {

struct EmulatedKernel {
  std::string symbol;
  const char* (*launch)(const emulator::Launch*, const void*);
  size_t params_bytes;
  unsigned allowed_shared_bytes;
};

unsigned num_sms = 3;
uint64_t seed = 0;
std::vector<emulator::MemoryRange> allocated, watched;
std::string last_error;
CUcontext current = nullptr;
CUcontext const kContext = reinterpret_cast<CUcontext>(0x100);

constexpr int kMaxSharedBytes = 227 * 1024, kSharedBytesUnasked = 48 * 1024;
constexpr unsigned kMaxThreads = 1024, kMaxClusterSize = 8;

}  // namespace

extern "C" {

// -- what the tests call ---------------------------------------------------------------------------------------------

void emulator_configure(unsigned sms, uint64_t first_seed) {
  num_sms = sms;
  seed = first_seed;
}

// Of the launches from now on, beside what the driver has allocated.
void emulator_watch(const uintptr_t* begins, const uintptr_t* ends, size_t count) {
  watched = allocated;
  for (size_t i = 0; i < count; ++i) watched.push_back({begins[i], ends[i]});
}

const char* emulator_last_error() { return last_error.c_str(); }

// -- the driver ------------------------------------------------------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult, const char** name) {
  *name = "emulated";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char** text) {
  *text = last_error.c_str();
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = 0;
  if (attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) *value = int(num_sms);
  if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = 9;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = kContext;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return current == nullptr ? CUDA_ERROR_INVALID_CONTEXT : CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext* context) {
  *context = current;
  current = nullptr;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode*) { return CUDA_SUCCESS; }

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* stream, unsigned) {
  *stream = nullptr;
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream) { return CUDA_SUCCESS; }
CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr* memory, size_t size) {
  *memory = reinterpret_cast<CUdeviceptr>(aligned_alloc(256, (size + 255) / 256 * 256));
  if (*memory == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  allocated.push_back({*memory, *memory + size});
  return CUDA_SUCCESS;
}

CUresult cuMemsetD32Async(CUdeviceptr memory, unsigned value, size_t count, CUstream) {
  unsigned* words = reinterpret_cast<unsigned*>(memory);
  for (size_t i = 0; i < count; ++i) words[i] = value;
  return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* path, CUjit_option*, void**, unsigned, CUlibraryOption*,
                           void**, unsigned) {
  *library = static_cast<CUlibrary>(dlopen(static_cast<const char*>(path), RTLD_NOW | RTLD_LOCAL));
  if (*library != nullptr) return CUDA_SUCCESS;
  last_error = dlerror();
  return CUDA_ERROR_INVALID_IMAGE;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* symbol) {
  const std::string name = symbol;
  void* const launch = dlsym(library, (name + "_launch").c_str());
  const void* const params_bytes = dlsym(library, (name + "_params_bytes").c_str());
  if (launch == nullptr || params_bytes == nullptr) return CUDA_ERROR_NOT_FOUND;
  *kernel =
      reinterpret_cast<CUkernel>(new EmulatedKernel{name, reinterpret_cast<decltype(EmulatedKernel::launch)>(launch),
                                                    *static_cast<const size_t*>(params_bytes), kSharedBytesUnasked});
  return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
  *function = reinterpret_cast<CUfunction>(kernel);
  return CUDA_SUCCESS;
}

CUresult cuKernelGetParamInfo(CUkernel kernel, size_t, size_t* offset, size_t* size) {
  *offset = 0;
  *size = reinterpret_cast<const EmulatedKernel*>(kernel)->params_bytes;
  return CUDA_SUCCESS;
}

CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value > kMaxSharedBytes) return CUDA_ERROR_INVALID_VALUE;
  reinterpret_cast<EmulatedKernel*>(kernel)->allowed_shared_bytes = unsigned(value);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* address,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (!is_legal_map(map, rank, address, sizes, strides, box, element_strides)) return CUDA_ERROR_INVALID_VALUE;
  // Others mean what the emulator does not know.
  if (rank != emulator::kMapDims || std::count(element_strides, element_strides + rank, 1u) != rank) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  emulator::TensorMap decoded = {};
  decoded.mark = emulator::TensorMap::kMark;
  decoded.base = reinterpret_cast<uintptr_t>(address);
  for (int dim = 0; dim < emulator::kMapDims; ++dim) {
    decoded.sizes[dim] = sizes[dim];
    decoded.box[dim] = uint16_t(box[dim]);
    if (dim > 0) decoded.strides[dim - 1] = strides[dim - 1];
  }
  decoded.swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_128B ? 128 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64 : 0;
  if (decoded.swizzle_bytes != box[0] * emulator::kMapElementBytes) return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  memcpy(map, &decoded, sizeof decoded);
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  const EmulatedKernel& kernel = *reinterpret_cast<const EmulatedKernel*>(function);
  unsigned cluster = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) cluster = config->attrs[i].value.clusterDim.x;
  }
  if (config->gridDimX == 0 || config->blockDimX > kMaxThreads || cluster > kMaxClusterSize ||
      config->sharedMemBytes > kernel.allowed_shared_bytes) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const emulator::Launch launch = {config->gridDimX, cluster, config->blockDimX, config->sharedMemBytes,
                                   seed++,           num_sms, watched.data(),    watched.size()};
  last_error = kernel.launch(&launch, arguments[0]);
  if (last_error.empty()) return CUDA_SUCCESS;
  last_error = kernel.symbol + ", seed " + std::to_string(launch.seed) + ": " + last_error;
  return CUDA_ERROR_LAUNCH_FAILED;
}

}  // extern "C"
