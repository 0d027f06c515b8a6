// The phases of runtime/kernels/phases.h on pools of every kind, each unit done once and after what it waits for.
//
// Compiled and run by scripts/check_kernels.py and tests/test_phases.py, also under the thread sanitizer.

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "../runtime/kernels/phases.h"

using namespace moedge;

namespace {

// Tasks one after the other on this thread, in order or from the last one on.
void serially(void*, void (*body)(void*, size_t), size_t total, void* data) {
  for (size_t i = 0; i < total; ++i) body(data, i);
}

void backwards(void*, void (*body)(void*, size_t), size_t total, void* data) {
  for (size_t i = total; i-- > 0;) body(data, i);
}

// On `threads` threads of which the first is this one; the others come late, each later than the one before.
struct Pool {
  int64_t threads, late;
  void (*body)(void*, size_t);
  size_t total;
  void* data;
  size_t next;

  void take_tasks() {
    for (size_t i; (i = __atomic_fetch_add(&next, size_t{1}, __ATOMIC_RELAXED)) < total;) body(data, i);
  }
};

struct Thread {
  Pool* pool;
  int64_t number;
  pthread_t handle;
};

void on_threads(void* self, void (*body)(void*, size_t), size_t total, void* data) {
  Pool* pool = static_cast<Pool*>(self);
  pool->body = body;
  pool->total = total;
  pool->data = data;
  pool->next = 0;
  Thread others[16];
  for (int64_t i = 1; i < pool->threads; ++i) {
    others[i] = {pool, i, {}};
    const auto main = [](void* given) -> void* {
      Thread* own = static_cast<Thread*>(given);
      for (int64_t turn = 0; turn < own->number * own->pool->late; ++turn) sched_yield();
      own->pool->take_tasks();
      return nullptr;
    };
    if (pthread_create(&others[i].handle, nullptr, main, others + i)) abort();
  }
  pool->take_tasks();
  for (int64_t i = 1; i < pool->threads; ++i) pthread_join(others[i].handle, nullptr);
}

// What a thread was told in its phase's last call that it does next.
thread_local int64_t told_phase = -1, told_unit = -1;

// Phases of these many units: a unit counts how often it was done, and adds up what the phase before it wrote. The second
// and third are streams, each of whose calls begins where the one before it said.
int64_t run_once(const Parallel& parallel, int64_t workers, const int64_t* units) {
  constexpr int64_t kMost = 64;
  int64_t values[4][kMost] = {}, times[4][kMost] = {}, counted = -1;
  const auto body_of = [&](int64_t p) {
    return [&, p](int64_t first, int64_t end, int64_t worker) {
      if (worker < 0 || worker >= workers || first >= end) abort();
      if (p == (units[0] ? 0 : 1) && first == 0) counted = units[2];  // the third's, which is told no more than a bound
      for (int64_t unit = first; unit < end; ++unit) {
        ++times[p][unit];
        values[p][unit] = unit + 1;
        for (int64_t i = 0; p > 0 && i < units[p - 1]; ++i) values[p][unit] += values[p - 1][i];
      }
    };
  };
  const auto stream_of = [&](int64_t p) {
    return [&, p, run = body_of(p)](int64_t first, int64_t end, int64_t next) {
      if (told_phase == p && told_unit != first) abort();
      told_phase = next < 0 ? -1 : p;
      told_unit = next;
      if (next >= units[p]) abort();
      run(first, end, 0);
    };
  };
  const auto first = body_of(0), last = body_of(3);
  const auto second = stream_of(1), third = stream_of(2);
  const Phase phases[] = {phase(units[0], first), stream(units[1], second), stream(kMost, third, &counted),
                          phase(units[3], last)};
  Region region(phases, 4, workers);
  parallel(workers, [&](int64_t worker) { region.work(worker); });
  if (told_phase >= 0) return 1;  // of the pool's threads, all but this one are gone
  int64_t before = 0;
  for (int64_t p = 0; p < 4; ++p) {
    int64_t sum = 0;
    for (int64_t unit = 0; unit < units[p]; ++unit) {
      if (times[p][unit] != 1 || values[p][unit] != unit + 1 + before) return 1;
      sum += values[p][unit];
    }
    before = sum;
  }
  return 0;
}

int64_t run_all(const Parallel& parallel) {
  constexpr int64_t kUnits[][4] = {{1, 33, 2, 1}, {5, 1, 64, 3}, {1, 1, 1, 1}, {7, 0, 40, 16}, {0, 64, 1, 64}};
  int64_t wrong = 0;
  for (const auto& units : kUnits)
    for (int64_t workers : {1, 2, 3, 8}) wrong += run_once(parallel, workers, units);
  return wrong;
}

}  // namespace

int main(int count, char** arguments) {
  const int64_t rounds = count > 1 ? atoi(arguments[1]) : 20;
  int64_t wrong = run_all({serially, nullptr}) + run_all({backwards, nullptr});
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t threads : {1, 2, 3, 8})
      for (int64_t late : {0, 3}) {
        Pool pool{threads, late, nullptr, 0, nullptr, 0};
        wrong += run_all({on_threads, &pool});
      }
  printf("phases %s\n", wrong ? "wrong" : "right");
  return wrong != 0;
}
