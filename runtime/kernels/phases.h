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
  void (*run)(const void* body, int64_t first, int64_t end, int64_t worker, int64_t next);
  const void* body;
  const int64_t* counted = nullptr;
  bool streams = false;

  int64_t count() const { return counted ? *counted : units; }  // not before this phase begins
};

// body(first, end, worker) does the units from `first` to `end`; a worker is one thread at a time.
template <typename Body>
Phase phase(int64_t units, const Body& body) {
  return {units,
          [](const void* held, int64_t first, int64_t end, int64_t worker, int64_t) {
            (*static_cast<const Body*>(held))(first, end, worker);
          },
          &body};
}

// Of units that read: body(first, end, next) learns which unit this thread does then, whose beginning it can fetch; -1: none.
template <typename Body>
Phase stream(int64_t units, const Body& body, const int64_t* counted = nullptr) {
  return {units,
          [](const void* held, int64_t first, int64_t end, int64_t, int64_t next) {
            (*static_cast<const Body*>(held))(first, end, next);
          },
          &body, counted, true};
}

// The phases while they run. Each worker has an equal share of a phase's units, one behind the other, as every new place in
// memory is read slowly at its beginning. It takes half of what is left of them at a time, at last single units, and then
// half of what others have left from the end on, so that all end together, and so does what belongs to a worker that is not
// there. A thread waits only for units that a running thread has taken: tasks may run late, one after the other, or all on
// one thread.
class Region {
 public:
  Region(const Phase* phases, int64_t count, int64_t workers) : phases_(phases), count_(count), workers_(workers) {
    for (int64_t p = 0; p < count; ++p) {
      counters_[p].done = 0;
      for (int64_t w = 0; w < workers; ++w) counters_[p].shares[w].taken = 0;
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
  struct Share {
    alignas(64) uint64_t taken;  // units of it from its beginning on, in the lower half, and from its end
  };
  struct Counters {
    alignas(64) int64_t done;  // units that are finished
    Share shares[kMostWorkers];
  };
  struct Stretch {
    int64_t first, end;  // no unit: both 0
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // What a worker does next, of its own share or the next one's.
  Stretch claim(Counters& c, int64_t units, int64_t worker) const {
    for (int64_t i = 0; i < workers_; ++i) {
      const int64_t of = (worker + i) % workers_;
      const int64_t first = divide_up(units * of, workers_), end = divide_up(units * (of + 1), workers_);
      uint64_t taken = __atomic_load_n(&c.shares[of].taken, __ATOMIC_RELAXED);
      for (;;) {
        const int64_t front = taken & UINT32_MAX, back = taken >> 32, left = end - first - front - back;
        if (left <= 0) break;
        const int64_t some = workers_ == 1 ? left : divide_up(left, 2);
        const uint64_t more = static_cast<uint64_t>(some) << (i == 0 ? 0 : 32);
        if (!__atomic_compare_exchange_n(&c.shares[of].taken, &taken, taken + more, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
          continue;
        return i == 0 ? Stretch{first + front, first + front + some} : Stretch{end - back - some, end - back};
      }
    }
    return {0, 0};
  }

  void take(int64_t p, int64_t units, int64_t worker) {
    const Phase& phase = phases_[p];
    Counters& c = counters_[p];
    int64_t done = 0;
    Stretch next{};
    for (Stretch now = claim(c, units, worker); now.first < now.end; now = next) {
      done += now.end - now.first;
      if (phase.streams && now.first < now.end - 1) {  // the next one is claimed as late as its beginning can be fetched
        phase.run(phase.body, now.first, now.end - 1, worker, now.end - 1);
        now.first = now.end - 1;
      }
      if (phase.streams) next = claim(c, units, worker);
      phase.run(phase.body, now.first, now.end, worker, next.end ? next.first : -1);
      if (!phase.streams) next = claim(c, units, worker);
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
