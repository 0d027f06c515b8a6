// What the two halves of attention share: sizes, and threads.

#pragma once

#include <unistd.h>

#include "attention.h"
#include "scratch.h"

namespace moedge {

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t vectors_up(int64_t a) { return divide_up(a, kVector) * kVector; }

// How many may work at once on `units`, each with memory of its own.
inline int64_t count_workers(int64_t units) {
  constexpr int64_t kMost = 64;
  static int64_t processors = 0;  // asked once: the C library opens a file each time
  int64_t known = __atomic_load_n(&processors, __ATOMIC_RELAXED);
  if (!known) __atomic_store_n(&processors, known = most(1, sysconf(_SC_NPROCESSORS_ONLN)), __ATOMIC_RELAXED);
  return most(1, least(least(units, kMost), known));
}

// Calls body(unit, worker) for every unit; a worker has one unit at a time.
template <typename Body>
void share(const Parallel& parallel, int64_t units, int64_t workers, const Body& body) {
  int64_t next = 0;
  parallel(least(workers, units), [&](int64_t worker) {
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
      if (unit >= units) return;
      body(unit, worker);
    }
  });
}

}  // namespace moedge
