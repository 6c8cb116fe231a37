// How the stand-in driver runs a kernel of a library built from generated source.
#pragma once

#include <utility>

#include "builtins.h"

namespace emulator {

template <class Params>
const char* run(void (*kernel)(const Params), const Launch& launch, const Params& params) {
  const std::pair<void (*)(const Params), const Params*> call = {kernel, &params};
  const char* const error = run_launch(
      launch,
      [](const void* context) {
        const auto& [device_code, arguments] = *static_cast<decltype(&call)>(context);
        device_code(*arguments);
      },
      &call);
  // The next launch with the counter, a replay of the same graph perhaps, begins with it.
  const auto* const counter = params.tile_counter;
  const bool resets = counter == nullptr || (counter->taken == 0 && counter->finished == 0);
  return *error != 0 || resets ? error : "the tile counter is not zero after the launch";
}

}  // namespace emulator

// Behind the generated source of a kernel: the function that the driver looks up, and the size of its parameters.
#define EMULATED_KERNEL(symbol, Params)                                                        \
  extern "C" const char* symbol##_launch(const emulator::Launch* launch, const void* params) { \
    return emulator::run<Params>(symbol, *launch, *static_cast<const Params*>(params));        \
  }                                                                                            \
  extern "C" const size_t symbol##_params_bytes = sizeof(Params);
