// Memory that all CTAs share: atomic operations, and the order that they and fences make.
#include "machine.h"

namespace emulator {
namespace {

// Atomic operations may come in any order among themselves. One that releases, or follows a fence, passes on what the
// thread knew; one that acquires, or precedes a fence, learns it.
int replace(int* address, int (*next)(int before, int value), int value) {
  Thread& thread = machine().thread();
  machine().order().visit_memory(machine().order().visitor(thread), address, sizeof(int), Access::kAdd);
  Clock& passed_on = machine().order().passed_on(address);
  thread.seen.join(passed_on);
  passed_on.join(thread.fenced);
  const int before = *address;
  *address = next(before, value);
  machine().poll();
  return before;
}

}  // namespace

int atomic_add(int* address, int value) {
  return replace(address, [](int before, int more) { return before + more; }, value);
}

int atomic_exchange(int* address, int value) {
  return replace(address, [](int, int next) { return next; }, value);
}

void fence_memory() {
  Thread& thread = machine().thread();
  thread.knows.join(thread.seen);
  thread.seen.clear();
  machine().order().release(thread, thread.fenced);
  machine().poll();
}

int load_acquire(const int* address) {
  Thread& thread = machine().thread();
  machine().order().visit_memory(machine().order().visitor(thread), address, sizeof(int), Access::kAdd);
  thread.knows.join(machine().order().passed_on(address));
  thread.acquires = true;
  return *address;
}

void add_release(int* address, int value) {
  Thread& thread = machine().thread();
  machine().order().visit_memory(machine().order().visitor(thread), address, sizeof(int), Access::kAdd);
  machine().order().release(thread, machine().order().passed_on(address));
  *address += value;
}

void reduce_add(float* memory, const float* values, int count) {
  machine().check(reinterpret_cast<uintptr_t>(memory) % (count * sizeof(float)) == 0,
                  "a vector reduction is aligned to its size");
  machine().order().visit_memory(machine().order().visitor(machine().thread()), memory, count * int(sizeof(float)),
                                 Access::kAdd);
  for (int i = 0; i < count; ++i) memory[i] += values[i];
}

}  // namespace emulator
