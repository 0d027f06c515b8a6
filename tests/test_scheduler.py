"""Many texts at once: each as it would be alone, fair, bounded, and free of the others' faults."""

from __future__ import annotations

import queue
import threading
import time

import fake_engine
import numpy as np
import pytest

from moedge.errors import EngineError, UsageError
from moedge.runtime.engine import load
from moedge.runtime.requests import make_request
from moedge.runtime.scheduler import Busy, Scheduler, step_in_turn

CHUNK = 8
LONG = np.random.default_rng(1).integers(0, 256, 50).tolist()
ENDLESS = {"context_end": "slide", "logit_bias": {fake_engine.EOS: -1e4}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("scheduler") / "bundle")
    with load(bundle, prefill_chunk=CHUNK) as engine:
        yield engine


class Consumer:
    """Collects what comes of a few texts."""

    def __init__(self, scheduler, prompts, seconds=float("inf"), **options):
        options = {"max_new_tokens": 12, **options}
        self.updates: queue.Queue = queue.Queue()
        self.texts = [""] * len(prompts)
        requests = [make_request(scheduler.engine, prompt, **options) for prompt in prompts]
        self.jobs = scheduler.submit(requests, lambda place, update: self.updates.put((place, update)), seconds=seconds)
        self.left = len(prompts)

    def next(self, timeout=20):
        place, update = self.updates.get(timeout=timeout)
        self.texts[place] += update.text
        self.left -= update.done
        return update

    def wait(self):
        while self.left:
            self.next()
        return self.texts


def alone(engine, prompt, **options):
    return "".join(engine.generate(prompt, **{"max_new_tokens": 12, **options}))


def test_every_text_is_what_it_is_alone(engine):
    random = np.random.default_rng(2)
    prompts = [random.integers(0, 256, size).tolist() for size in random.integers(1, 50, 30)]
    prompts += [[*LONG[:size], 1] for size in range(10, 50, 5)]  # one beginning
    want = [alone(engine, prompt) for prompt in prompts]
    drawn = alone(engine, LONG, temperature=1.0, seed=3)
    engine.prefixes.clear()
    with Scheduler(engine, slots=5, queue=100) as scheduler:
        consumers = [Consumer(scheduler, [prompt]) for prompt in prompts]
        sampled = Consumer(scheduler, [LONG], temperature=1.0, seed=3)
        assert [consumer.wait()[0] for consumer in consumers] == want
        assert sampled.wait() == [drawn]
        assert any(consumer.jobs[0].reused_tokens for consumer in consumers)
        assert all(consumer.jobs[0].writer.finish_reason in ("length", "stop") for consumer in consumers)


def test_a_batched_step_can_take_the_place_of_steps_in_turn(engine):
    sizes = []

    def step(work):
        sizes.append(len(work))
        return step_in_turn(work)

    with Scheduler(engine, slots=3, stepper=step) as scheduler:
        Consumer(scheduler, [[1], [2], [3], [4]], logit_bias={fake_engine.EOS: -1e4}).wait()
    assert max(sizes) == 3 and sum(sizes) == 4 * 11


def test_a_long_prompt_delays_others_by_one_chunk_at_most(engine):
    events = []

    def step(work):
        events.append("step")
        time.sleep(0.005)
        return step_in_turn(work)

    with Scheduler(engine, slots=2, stepper=step) as scheduler:
        running = Consumer(scheduler, [[1]], max_new_tokens=60, logit_bias={fake_engine.EOS: -1e4})
        running.next()
        fill = scheduler._fill
        scheduler._fill = lambda slot, job: (events.append("chunk"), fill(slot, job))[1]
        Consumer(scheduler, [np.random.default_rng(77).integers(0, 256, 50).tolist()]).wait()
        running.wait()
    chunks = [place for place, event in enumerate(events) if event == "chunk"]
    assert len(chunks) == 7 and np.diff(chunks).tolist() == [2] * 6


def test_who_hands_updates_on_is_called_once_for_all_texts_of_a_round(engine):
    waiting, batches = [], []

    def told():
        if waiting:
            batches.append(len(waiting))
            waiting.clear()

    request = make_request(engine, [1], max_new_tokens=20, logit_bias={65: 1e4})
    with Scheduler(engine, slots=3, told=told) as scheduler:
        scheduler.submit([request] * 3, lambda place, update: waiting.append(update))
        while scheduler.running or scheduler.waiting:
            time.sleep(0.01)
    assert not waiting, "nothing stays behind"
    assert sum(batches) == 3 * 20 and max(batches) == 3


def test_prompts_are_computed_in_turn(engine):
    with Scheduler(engine, slots=2) as scheduler:
        both = Consumer(scheduler, [LONG[::-1], [5, 6]], max_new_tokens=1)
        first = both.updates.get(timeout=20)
    assert first[0] == 1, "the short prompt does not wait for the whole of the long one"


def test_texts_of_one_prompt_have_it_computed_once(engine):
    request = make_request(engine, LONG, max_new_tokens=4)
    engine.prefixes.clear()
    done = threading.Semaphore(0)
    with Scheduler(engine, slots=3) as scheduler:
        jobs = scheduler.submit([request] * 3, lambda place, update: update.done and done.release())
        for _ in jobs:
            assert done.acquire(timeout=20)
    assert sorted(job.reused_tokens for job in jobs) == [0, 50, 50]
    assert [job.writer.tokens for job in jobs] == [jobs[0].writer.tokens] * 3
    want = engine.generate(LONG, max_new_tokens=4)
    list(want)
    assert jobs[0].writer.tokens == want.tokens


def test_who_goes_away_frees_the_slot_within_one_step(engine):
    with Scheduler(engine, slots=1) as scheduler:
        gone = Consumer(scheduler, [[1]], max_new_tokens=100_000, **ENDLESS)
        gone.next()
        waiting = Consumer(scheduler, [[2]])
        also_gone = Consumer(scheduler, [[3]])
        also_gone.jobs[0].cancel()
        steps = []
        decode = scheduler._step
        scheduler._step = lambda work: (steps.append(gone.jobs[0].cancelled), decode(work))[1]
        gone.jobs[0].cancel()
        waiting.wait()
        gone.wait(), also_gone.wait()
        assert gone.jobs[0].writer.finish_reason == also_gone.jobs[0].writer.finish_reason == "cancelled"
        assert also_gone.jobs[0].writer.tokens == []


def test_a_consumer_that_fails_has_gone(engine):
    def failing(place, update):
        raise RuntimeError("closed")

    with Scheduler(engine, slots=1) as scheduler:
        request = make_request(engine, [1], max_new_tokens=100_000, **ENDLESS)
        (job,) = scheduler.submit([request], failing)
        assert Consumer(scheduler, [[2]]).wait() == [alone(engine, [2])]
        assert job.writer.finish_reason == "cancelled"


def test_deadlines_hold_in_the_queue_and_in_a_slot(engine):
    with Scheduler(engine, slots=1) as scheduler:
        running = Consumer(scheduler, [[1]], seconds=0.3, max_new_tokens=100_000, **ENDLESS)
        waiting = Consumer(scheduler, [[2]], seconds=0.05)
        waiting.wait()
        running.wait()
        assert running.jobs[0].writer.finish_reason == waiting.jobs[0].writer.finish_reason == "deadline"
        assert running.jobs[0].writer.tokens and not waiting.jobs[0].writer.tokens


def test_the_queue_is_bounded(engine):
    with Scheduler(engine, slots=1, queue=2) as scheduler:
        running = Consumer(scheduler, [[1]], max_new_tokens=100_000, **ENDLESS)
        running.next()
        Consumer(scheduler, [[2]])
        with pytest.raises(Busy, match="1 texts are waiting already; try again in [0-9]+ s, or allow") as caught:
            Consumer(scheduler, [[3], [4]])
        assert 1 <= caught.value.retry_after <= 60
        Consumer(scheduler, [[3]])
        assert (scheduler.waiting, scheduler.running, scheduler.slots) == (2, 1, 1)


def test_numbers_out_of_range(engine):
    for wrong in ({"slots": 0}, {"queue": 0}):
        with pytest.raises(UsageError, match="is 0; it must be a whole number, 1 or more"):
            Scheduler(engine, **wrong)


def test_memory_refused_while_a_slot_is_made_fails_that_text_alone(engine, monkeypatch):
    with Scheduler(engine, slots=2) as scheduler:
        running = Consumer(scheduler, [[1]], max_new_tokens=1_000_000, **ENDLESS)
        running.next()
        make, refusals = engine.new_context, [EngineError("a cache of 9 MiB does not fit the memory"), MemoryError()]

        def refuse():
            if refusals:
                raise refusals.pop()
            return make()

        monkeypatch.setattr(engine, "new_context", refuse)
        for kind in (MemoryError, EngineError):
            refused = Consumer(scheduler, [[2]])
            refused.wait()
            assert isinstance(refused.jobs[0].error, kind)
        assert Consumer(scheduler, [[2]]).wait() == [alone(engine, [2])]
        assert not running.jobs[0].writer.finish_reason


def test_a_step_that_fails_ends_its_own_text_alone(engine):
    broken = []

    def step(work):
        return [
            ValueError("a bug") if token == 66 and not broken.append(1) else logits
            for (_, token), logits in zip(work, step_in_turn(work), strict=True)
        ]

    with Scheduler(engine, slots=3, stepper=step) as scheduler:
        good = Consumer(scheduler, [[1], [2]], logit_bias={65: 1e4})
        bad = Consumer(scheduler, [[1]], logit_bias={66: 1e4})
        bad.wait()
        assert isinstance(bad.jobs[0].error, ValueError) and good.wait() == ["A" * 12] * 2
        assert Consumer(scheduler, [[1]]).wait() == [alone(engine, [1])]


def test_the_contexts_end(engine):
    with Scheduler(engine, slots=2) as scheduler:
        options = {"logit_bias": {65: 1e4}, "max_new_tokens": None}
        (full,) = Consumer(scheduler, [[1]], **options).wait()
        over = Consumer(scheduler, [[1]], **{**options, "max_new_tokens": 65})
        assert full == over.wait()[0] == "A" * 64
        assert "context is full: 1 tokens of the prompt and 64 of the 65 new ones" in str(over.jobs[0].error)
        slid = Consumer(scheduler, [[1]], max_new_tokens=150, **ENDLESS)
        assert slid.wait() == [alone(engine, [1], max_new_tokens=150, **ENDLESS)]


def test_closing_lets_texts_end_as_long_as_it_is_told(engine):
    scheduler = Scheduler(engine, slots=1)
    short, second = Consumer(scheduler, [[1]]), Consumer(scheduler, [[2]])
    scheduler.close(drain_s=20)
    assert short.wait() == [alone(engine, [1])] and second.wait() == [alone(engine, [2])]
    scheduler = Scheduler(engine, slots=1)
    endless = Consumer(scheduler, [[1], [2]], max_new_tokens=10_000_000, **ENDLESS)
    endless.next()
    began = time.monotonic()
    scheduler.close()
    assert time.monotonic() - began < 5
    endless.wait()
    assert {job.writer.finish_reason for job in endless.jobs} == {"cancelled"}
    with pytest.raises(EngineError, match="the scheduler is closed and takes no more texts"):
        Consumer(scheduler, [[1]])


def test_texts_from_many_threads(engine):
    want = {first: alone(engine, [first, 3]) for first in range(40)}
    wrong = []

    def work(start):
        for first in range(start, 40, 8):
            (text,) = Consumer(scheduler, [[first, 3]]).wait()
            if text != want[first]:
                wrong.append(first)

    with Scheduler(engine, slots=4) as scheduler:
        threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
