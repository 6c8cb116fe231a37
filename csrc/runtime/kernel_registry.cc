#include "kernel_registry.h"

#include <utility>

#include "driver.h"

namespace fa {
namespace {

// A kernel that was compiled against another parameter struct must not be launched with ours.
void check_params_size(const KernelTraits& traits, CUkernel kernel) {
  size_t offset = 0;
  size_t size = 0;
  check_driver(driver().cuKernelGetParamInfo(kernel, 0, &offset, &size), "cuKernelGetParamInfo");
  FA_CHECK(size == traits.params_bytes, RuntimeError)
      << traits.symbol << " takes " << size << " bytes of parameters, this runtime passes " << traits.params_bytes
      << "; kernel and runtime come from different versions of the package, rebuild both";
}

std::string dotted(int release) { return std::to_string(release / 1000) + '.' + std::to_string(release % 1000 / 10); }

// To follow a driver's refusal of a cubin: its own words do not tell a kernel that is too new for it from a broken one.
std::string compare_releases(int nvcc_release) {
  int driver_release = 0;
  driver().cuDriverGetVersion(&driver_release);
  std::string nvcc = nvcc_release > 0 ? "nvcc " + dotted(nvcc_release) : "an nvcc of unknown release";
  std::string text = ". The driver is of CUDA " + dotted(driver_release) + ", the kernel was compiled by " + nvcc;
  if (0 < nvcc_release && nvcc_release <= driver_release) return text;
  return text + ": if that is too new for the driver, install a newer driver, or set FLASH_ATTN_3_NVCC to an nvcc of " +
         "release " + dotted(driver_release) + " or older (and install the package again, if it brought the kernel)";
}

}  // namespace

CUlibrary load_library(const std::string& name, const char* cubin, int nvcc_release) {
  RelaxedCaptureGuard relaxed;
  CUlibrary library;
  CUresult result = driver().cuLibraryLoadData(&library, cubin, nullptr, nullptr, 0, nullptr, nullptr, 0);
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError)
      << "the cubin of " << name << " cannot be loaded: " << describe(result) << compare_releases(nvcc_release);
  return library;
}

Kernel::Kernel(KernelTraits traits, CUlibrary library) : traits_(std::move(traits)) {
  RelaxedCaptureGuard relaxed;
  CUresult result = driver().cuLibraryGetKernel(&kernel_, library, traits_.symbol.c_str());
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError)
      << "the cubin holds no kernel named " << traits_.symbol << ": " << describe(result);
  check_params_size(traits_, kernel_);
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
      << device_attribute(ordinal, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
      << compare_releases(traits_.nvcc_release);
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError)
      << "loading " << traits_.symbol << " failed: " << describe(result) << compare_releases(traits_.nvcc_release);
  check_driver(driver().cuKernelSetAttribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                             static_cast<int>(traits_.smem_bytes), kernel_, device_handle(ordinal)),
               "cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES)");
  prepared_devices_.fetch_or(bit, std::memory_order_release);
}

void Kernel::launch(uint32_t num_ctas, const void* params, CUstream stream) const {
  CUlaunchAttribute cluster{};
  cluster.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  cluster.value.clusterDim = {traits_.cluster_size, 1, 1};
  CUlaunchConfig config{};
  config.gridDimX = num_ctas;
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = traits_.num_threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = traits_.smem_bytes;
  config.hStream = stream;
  config.attrs = &cluster;
  config.numAttrs = traits_.cluster_size > 1 ? 1 : 0;
  void* arguments[] = {const_cast<void*>(params)};
  CUresult result = driver().cuLaunchKernelEx(&config, reinterpret_cast<CUfunction>(kernel_), arguments, nullptr);
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError) << "launching " << traits_.symbol << " failed: " << describe(result);
}

}  // namespace fa
