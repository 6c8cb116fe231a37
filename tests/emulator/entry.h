// How the stand-in driver runs a kernel of a library built from generated source.
#pragma once

#include "builtins.h"
#include "memory_barriers.h"

namespace emulator {

template <class Params>
const char* run(void (*kernel)(const Params), const Launch& launch, const void* arguments) {
  static std::string error;
  Machine machine;
  const Params& params = *static_cast<const Params*>(arguments);
  error = machine.run(launch, [&] { kernel(params); });
  // The next launch with the counter, a replay of the same graph perhaps, begins with it.
  const auto* const counter = params.tile_counter;
  if (error.empty() && counter != nullptr && (counter->taken != 0 || counter->finished != 0)) {
    error = "the tile counter is not zero after the launch";
  }
  return error.c_str();
}

}  // namespace emulator

// Behind the generated source of a kernel: the function that the driver looks up, and the size of its parameters.
#define EMULATED_KERNEL(symbol, Params)                                                        \
  extern "C" const char* symbol##_launch(const emulator::Launch* launch, const void* params) { \
    return emulator::run<Params>(symbol, *launch, params);                                     \
  }                                                                                            \
  extern "C" const size_t symbol##_params_bytes = sizeof(Params);
