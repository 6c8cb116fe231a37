// Where device code's loads and stores tell of themselves: the calls that the compiler inserts for its own check of
// threads (-fsanitize=thread), which here go to the machine.
#include <cstring>

#include "machine.h"

namespace {

void visit(const void* pointer, size_t bytes, emulator::Access access) {
  if (!emulator::Machine::runs()) return;
  emulator::Machine& machine = emulator::machine();
  if (machine.has_thread()) machine.order().visit(machine.thread(), pointer, int(bytes), access);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}

#define WATCHED(bytes)                                                                                   \
  void __tsan_read##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kRead); }             \
  void __tsan_write##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kWrite); }           \
  void __tsan_unaligned_read##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kRead); }   \
  void __tsan_unaligned_write##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kWrite); } \
  void __tsan_volatile_read##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kRead); }    \
  void __tsan_volatile_write##bytes(void* pointer) { visit(pointer, bytes, emulator::Access::kWrite); }

WATCHED(1)
WATCHED(2)
WATCHED(4)
WATCHED(8)
WATCHED(16)

void __tsan_read_range(void* pointer, size_t bytes) { visit(pointer, bytes, emulator::Access::kRead); }
void __tsan_write_range(void* pointer, size_t bytes) { visit(pointer, bytes, emulator::Access::kWrite); }

}  // extern "C"
