#include "driver.h"

#include <dlfcn.h>

#include "check.h"

namespace fa {
namespace {

constexpr const char* kLibraryName = "libcuda.so.1";

#define FA_STRINGIZE(name) #name
#define FA_EXPAND_AND_STRINGIZE(name) FA_STRINGIZE(name)

void* lookup(void* library, const char* symbol) {
  void* address = dlsym(library, symbol);
  FA_CHECK(address != nullptr, UnsupportedDeviceError) << "the CUDA driver (" << kLibraryName << ") has no " << symbol
                                                       << ": it is too old; CUDA 12.4 or newer is required";
  return address;
}

Driver open_driver() {
  void* library = dlopen(kLibraryName, RTLD_NOW | RTLD_LOCAL);
  FA_CHECK(library != nullptr, UnsupportedDeviceError)
      << "the CUDA driver cannot be opened (" << dlerror() << "); CUDA tensors need a machine with an NVIDIA driver";
  Driver driver;
#define FA_LOOK_UP_DRIVER_FUNCTION(name) \
  driver.name = reinterpret_cast<decltype(driver.name)>(lookup(library, FA_EXPAND_AND_STRINGIZE(name)));
  FA_FOR_EACH_DRIVER_FUNCTION(FA_LOOK_UP_DRIVER_FUNCTION)
#undef FA_LOOK_UP_DRIVER_FUNCTION
  CUresult result = driver.cuInit(0);
  if (result != CUDA_SUCCESS) {
    const char* name = "unknown error";
    driver.cuGetErrorName(result, &name);
    TVM_FFI_THROW(UnsupportedDeviceError) << "the CUDA driver cannot be initialised: cuInit returned " << name;
  }
  return driver;
}

}  // namespace

const Driver& driver() {
  static const Driver instance = open_driver();
  return instance;
}

std::string describe(CUresult result) {
  const char* name = nullptr;
  const char* text = nullptr;
  driver().cuGetErrorName(result, &name);
  driver().cuGetErrorString(result, &text);
  return std::string(name != nullptr ? name : "unknown CUDA error") + " (" + (text != nullptr ? text : "") + ")";
}

void check_driver(CUresult result, const char* action) {
  FA_CHECK(result == CUDA_SUCCESS, RuntimeError) << action << " failed: " << describe(result);
}

CUdevice device_handle(int ordinal) {
  CUdevice device;
  CUresult result = driver().cuDeviceGet(&device, ordinal);
  if (result == CUDA_SUCCESS) return device;
  int count = 0;
  check_driver(driver().cuDeviceGetCount(&count), "cuDeviceGetCount");
  TVM_FFI_THROW(ValueError) << "device " << ordinal << " does not exist; this machine has " << count
                            << " CUDA device(s)";
  return device;
}

int device_attribute(int ordinal, CUdevice_attribute attribute) {
  int value = 0;
  check_driver(driver().cuDeviceGetAttribute(&value, attribute, device_handle(ordinal)), "cuDeviceGetAttribute");
  return value;
}

}  // namespace fa
