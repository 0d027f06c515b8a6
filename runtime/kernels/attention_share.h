// What the two halves of attention share: sizes, and threads.

#pragma once

#include "attention.h"
#include "scratch.h"

namespace moedge {

inline int64_t vectors_up(int64_t a) { return divide_up(a, kVector) * kVector; }

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
