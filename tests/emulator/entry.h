// How the stand-in driver runs a kernel of a library built from generated source.
#pragma once

#include <map>

#include "builtins.h"
#include "memory_barriers.h"

namespace emulator {

struct LaunchShape {
  unsigned grid, block, resident;  // resident: CTAs that fit on the machine at once
  size_t shared_bytes;
  uint64_t seed;
};

template <class Params>
const char* run(void (*kernel)(const Params), const LaunchShape& shape, const void* params) {
  static std::string error;
  Machine machine;
  error = machine.run(shape.grid, shape.block, shape.shared_bytes, shape.resident, shape.seed,
                      [&] { kernel(*static_cast<const Params*>(params)); });
  return error.c_str();
}

}  // namespace emulator

// Behind the generated source of a kernel: the function that the driver looks up, and the size of its parameters.
#define EMULATED_KERNEL(symbol, Params)                                                            \
  extern "C" const char* symbol##_launch(const emulator::LaunchShape* shape, const void* params) { \
    return emulator::run<Params>(symbol, *shape, params);                                          \
  }                                                                                                \
  extern "C" const size_t symbol##_params_bytes = sizeof(Params);
