// Stand-in for CUTLASS's header: setmaxnreg.
#pragma once

#include "../../../instructions.h"

namespace cutlass::arch {

template <int kRegisters>
void warpgroup_reg_alloc() {
  emulator::set_registers(kRegisters);
}

template <int kRegisters>
void warpgroup_reg_dealloc() {
  emulator::set_registers(kRegisters);
}

}  // namespace cutlass::arch
