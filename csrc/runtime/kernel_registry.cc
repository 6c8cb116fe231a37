#include "kernel_registry.h"

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <utility>
#include <vector>

#include "check.h"
#include "driver.h"
#include "kernels/params.h"

namespace fa {
namespace {

struct Registry {
  std::shared_mutex mutex;
  std::vector<std::unique_ptr<const Kernel>> kernels;
};

// Never destroyed: at exit the driver may be gone before static destructors run.
Registry& registry() {
  static Registry& instance = *new Registry;
  return instance;
}

// A kernel that was compiled against another ForwardParams must not be launched with ours.
void check_params_size(const std::string& symbol, CUkernel kernel) {
  size_t offset = 0;
  size_t size = 0;
  check_driver(driver().cuKernelGetParamInfo(kernel, 0, &offset, &size), "cuKernelGetParamInfo");
  FA_CHECK(size == sizeof(ForwardParams), RuntimeError)
      << symbol << " takes " << size << " bytes of parameters, this runtime passes " << sizeof(ForwardParams)
      << "; kernel and runtime come from different versions of the package, rebuild both";
}

}  // namespace

Kernel::Kernel(KernelTraits traits, const char* cubin) : traits_(std::move(traits)) {
  RelaxedCaptureGuard relaxed;
  CUlibrary library;
  CUresult result = driver().cuLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError)
      << "the cubin of " << traits_.symbol << " cannot be loaded: " << describe(result);
  result = driver().cuLibraryGetKernel(&kernel_, library, traits_.symbol.c_str());
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError)
      << "the cubin holds no kernel named " << traits_.symbol << ": " << describe(result);
  check_params_size(traits_.symbol, kernel_);
}

void Kernel::prepare(int ordinal) const {
  uint64_t bit = uint64_t{1} << ordinal;
  if (prepared_devices_.load(std::memory_order_acquire) & bit) return;
  RelaxedCaptureGuard relaxed;
  CUfunction function;
  CUresult result = driver().cuKernelGetFunction(&function, kernel_);
  FA_CHECK(result != CUDA_ERROR_NO_BINARY_FOR_GPU, UnsupportedDeviceError)
      << traits_.symbol << " was not compiled for device " << ordinal << ", of compute capability "
      << device_attribute(ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) << '.'
      << device_attribute(ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  check_driver(result, "cuKernelGetFunction");
  check_driver(driver().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                             static_cast<int>(traits_.smem_bytes), kernel_, device_handle(ordinal)),
               "cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)");
  prepared_devices_.fetch_or(bit, std::memory_order_release);
}

void Kernel::launch(uint32_t num_ctas, const void* params, CUstream stream) const {
  CUlaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (traits_.cluster_size > 1) {
    CUlaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {traits_.cluster_size, 1, 1};
  }
  if (traits_.programmatic_launch) {
    CUlaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  CUlaunchConfig config{};
  config.gridDimX = num_ctas;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = traits_.num_threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = traits_.smem_bytes;
  config.hStream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  void* arguments[] = {const_cast<void*>(params)};
  CUresult result = driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel_), arguments, nullptr);
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError) << "launching " << traits_.symbol << " failed: " << describe(result);
}

int64_t register_kernel(KernelTraits traits, const char* cubin) {
  auto kernel = std::make_unique<const Kernel>(std::move(traits), cubin);
  Registry& all = registry();
  std::unique_lock<std::shared_mutex> lock(all.mutex);
  all.kernels.push_back(std::move(kernel));
  return static_cast<int64_t>(all.kernels.size()) - 1;
}

const Kernel& find_kernel(int64_t handle) {
  Registry& all = registry();
  std::shared_lock<std::shared_mutex> lock(all.mutex);
  int64_t count = static_cast<int64_t>(all.kernels.size());
  FA_CHECK(0 <= handle && handle < count, ValueError)
      << "handle is " << handle << "; supported are the handles of the " << count << " loaded kernel(s)";
  return *all.kernels[static_cast<size_t>(handle)];
}

}  // namespace fa
