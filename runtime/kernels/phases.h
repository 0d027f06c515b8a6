// Steps of an op that wait for each other, in one parallel region: a region's beginning and end cost as much as reading
// 100 KB of weights.

#pragma once

#include <sched.h>
#include <unistd.h>

#include <initializer_list>

#include "kernels.h"

namespace moedge {

constexpr int64_t kMostWorkers = 64, kMostPhases = 8;

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// How many may work at once on `units`.
inline int64_t count_workers(int64_t units) {
  static int64_t processors = 0;  // asked once: the C library opens a file each time
  int64_t known = __atomic_load_n(&processors, __ATOMIC_RELAXED);
  if (!known) __atomic_store_n(&processors, known = most(1, sysconf(_SC_NPROCESSORS_ONLN)), __ATOMIC_RELAXED);
  return most(1, least(least(units, kMostWorkers), known));
}

// `units` of work that begin when the phase before them is finished; at most so many where a phase before counts them.
struct Phase {
  int64_t units;
  void (*run)(const void* body, int64_t first, int64_t end, int64_t worker);
  const void* body;
  const int64_t* counted = nullptr;

  int64_t count() const { return counted ? *counted : units; }  // not before this phase begins
};

// body(first, end, worker) does the units from `first` to `end`; a worker is one thread at a time.
template <typename Body>
Phase phase(int64_t units, const Body& body) {
  return {units,
          [](const void* held, int64_t first, int64_t end, int64_t worker) {
            (*static_cast<const Body*>(held))(first, end, worker);
          },
          &body};
}
template <typename Body>
Phase counted_phase(int64_t most_units, const int64_t* counted, const Body& body) {
  Phase made = phase(most_units, body);
  made.counted = counted;
  return made;
}

// The phases while they run. Each worker begins a phase with a stretch of its own, three quarters of its share: every new
// place in memory is read slowly at its beginning. The units behind those go to whoever comes, long stretches first and
// single units last, so that all end together, and so does what belongs to a worker that is not there. A thread waits only
// for units that a running thread has taken: tasks may run late, one after the other, or all on one thread.
class Region {
 public:
  Region(const Phase* phases, int64_t count, int64_t workers) : phases_(phases), count_(count), workers_(workers) {
    for (int64_t p = 0; p < count; ++p) {
      counters_[p].done = 0;
      for (int64_t w = 0; w <= workers; ++w) counters_[p].taken[w] = 0;
    }
  }

  void work(int64_t worker) {
    for (int64_t p = 0; p < count_; ++p) {
      const int64_t units = phases_[p].count();
      take(p, units, worker);
      if (p + 1 == count_) return;
      for (int64_t spins = 1; __atomic_load_n(&counters_[p].done, __ATOMIC_ACQUIRE) < units; ++spins) {
        if (spins % 4096 == 0) sched_yield();  // whoever has the units may wait for this processor
        pause();
      }
    }
  }

 private:
  struct Counters {
    alignas(64) int64_t done;               // units that are finished
    alignas(64) int64_t taken[kMostWorkers + 1];  // of each worker's own stretch, and of the rest
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  void take(int64_t p, int64_t units, int64_t worker) {
    const Phase& phase = phases_[p];
    Counters& c = counters_[p];
    const int64_t share = units * 3 / (4 * workers_), few = units < workers_ ? 0 : 1;
    const int64_t own = workers_ == 1 ? units : most(share, few);
    int64_t done = 0;
    for (int64_t i = -2; i < workers_; ++i) {  // its own, the rest, then everybody's own
      const int64_t from = i == -2 ? worker : i == -1 ? workers_ : i;
      const int64_t start = from * own, limit = from == workers_ ? units - start : own;
      int64_t first = __atomic_load_n(c.taken + from, __ATOMIC_RELAXED);
      while (first < limit) {
        const int64_t some = (limit - first) / (2 * workers_), end = i == -2 ? limit : first + most(some, 1);
        if (!__atomic_compare_exchange_n(c.taken + from, &first, end, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) continue;
        phase.run(phase.body, start + first, start + end, worker);
        done += end - first;
        first = __atomic_load_n(c.taken + from, __ATOMIC_RELAXED);
      }
    }
    if (done) __atomic_fetch_add(&c.done, done, __ATOMIC_ACQ_REL);
  }

  const Phase* phases_;
  int64_t count_, workers_;
  Counters counters_[kMostPhases];
};

// Calls the phases' bodies on as many threads as have work; `workers`: on at most so many.
inline void run_phases(const Parallel& parallel, std::initializer_list<Phase> phases, int64_t workers = kMostWorkers) {
  int64_t most_units = 1;
  for (const Phase& each : phases) most_units = most(most_units, each.units);
  workers = least(workers, count_workers(most_units));
  Region region(phases.begin(), static_cast<int64_t>(phases.size()), workers);
  parallel(workers, [&](int64_t worker) { region.work(worker); });
}

}  // namespace moedge
