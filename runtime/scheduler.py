"""Many texts at once over one engine: continuous batching by slots.

One worker thread owns all slots. Each slot has a cache of its own over the engine's one session. The worker goes in
rounds: a step for every text that decodes, then one chunk of one prompt, the prompts in turn; so a long prompt delays
the others by one chunk at most. Texts join and leave between steps. Whatever else runs, a text's tokens are those it
would have alone.

An engine that was loaded with lanes steps as many texts in one run (`step_in_lanes`); others one after the other
(`step_in_turn`).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .context import Context, step_together
from .requests import TextRequest, check_whole, window_tokens
from .writing import TextWriter

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger(__name__)

# A step for each (context, token): logits [vocab] each, valid until that context's next step, or why there are none;
# or all of them in one array [texts, vocab].
Stepper = Callable[[Sequence[tuple[Context, int]]], "NDArray[np.float32] | list[NDArray[np.float32] | Exception]"]

_LONGEST_WAIT = 60  # seconds that a refused client is told to wait at most


class Busy(EngineError):
    """The queue is full; `retry_after` is a guess, in seconds, of when it will not be."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} texts are waiting already; try again in {retry_after} s, or allow a longer queue")
        self.retry_after = retry_after


class Update(NamedTuple):
    """What a job's consumer is told: text that came, tokens there are by now, and whether it is over."""

    text: str
    tokens: int
    done: bool


class Observer(Protocol):
    """Is told what happens, in the worker's thread."""

    def stepped(self, texts: int) -> None: ...

    def token_came(self, job: Job, seconds: float) -> None: ...

    def finished(self, job: Job) -> None: ...


class Job:
    """One text, from the queue to its end.

    error: why it failed; None while it runs, and where it did not.
    writer: tokens, finish reason and log-probabilities so far. Finish reasons here are also "cancelled" and "deadline".
    reused_tokens: tokens of the prompt that needed no computing.
    """

    def __init__(
        self,
        request: TextRequest,
        writer: TextWriter,
        deliver: Callable[[int, Update], None],
        place: int,
        deadline: float,
    ) -> None:
        self.request = request
        self.writer = writer
        self.error: Exception | None = None
        self.reused_tokens = 0
        self.submitted = time.monotonic()
        self.last_token = self.submitted
        self.deadline = deadline
        self.cancelled = False
        self._deliver = deliver
        self._place = place

    def cancel(self) -> None:
        """End it before its next step; from any thread."""
        self.cancelled = True

    @property
    def stop_reason(self) -> str | None:
        """Why it must not go on, if so."""
        if self.cancelled:
            return "cancelled"
        return "deadline" if time.monotonic() >= self.deadline else None

    def tell(self, text: str, done: bool) -> None:
        """Pass on what came. A consumer that fails has gone."""
        try:
            self._deliver(self._place, Update(text, len(self.writer.tokens), done))
        except Exception:
            self.cancelled = True


class _Slot:
    def __init__(self) -> None:
        self.context: Context | None = None
        self.job: Job | None = None
        self.prompt: NDArray[np.int64] | None = None  # the last that was begun here
        self.filling = False  # the prompt (or what slid) is not computed yet

    @property
    def decodes(self) -> bool:
        """Whether its text takes part in steps."""
        return self.job is not None and not self.filling


class Scheduler:
    """Runs texts in `slots` slots, with up to `queue` more waiting. Thread-safe. A context manager: its end cancels.

    Raises:
        UsageError: a number out of range.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        slots: int = 4,
        queue: int = 64,
        stepper: Stepper | None = None,
        observer: Observer | None = None,
        told: Callable[[], None] | None = None,
    ) -> None:
        """`told` is called in the worker's thread whenever consumers were, and nothing is to tell for a while.
        `observer` may be exchanged later."""
        check_whole("slots", slots)
        check_whole("queue", queue)
        self.engine = engine
        self.limit = queue
        self._eos = engine.eos_token_ids
        self._slots = [_Slot() for _ in range(slots)]
        self._waiting: deque[Job] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._order: list[_Slot] = []  # in which texts are stepped
        self._turn = 0  # the slot whose prompt is next
        self._mean_seconds = 1.0  # a text takes, lately
        lanes = engine.session.lanes
        self._step = stepper or (step_in_lanes if lanes > 1 else step_in_turn)
        self._together = slots if stepper is not None or lanes == 1 else lanes  # texts in one call of it
        self.observer = observer
        self._told = told or (lambda: None)
        self._thread = threading.Thread(target=self._run, name="moedge-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def slots(self) -> int:
        """Texts that can run at once."""
        return len(self._slots)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Texts in slots."""
        return sum(slot.job is not None for slot in self._slots)

    @property
    def open(self) -> bool:
        """Whether texts are taken."""
        return not self._closing and self._thread.is_alive()

    def submit(
        self,
        requests: Sequence[TextRequest],
        deliver: Callable[[int, Update], None],
        *,
        seconds: float = math.inf,
    ) -> list[Job]:
        """Put texts into the queue, all or none. Requests that share one prompt array have it computed once.

        deliver: called in the worker's thread with the request's place and what came; must be quick.
        seconds: after which a text ends with what it has ("deadline").

        Raises:
            Busy: the queue has no room for them. UsageError: an empty stop text.
            EngineError: the scheduler is closed.
        """
        deadline = time.monotonic() + seconds
        jobs = []
        for place, request in enumerate(requests):
            writer = TextWriter(request, self.engine.tokenizer, self._eos)
            jobs.append(Job(request, writer, deliver, place, deadline))
        with self._wake:
            if not self.open:
                raise EngineError("the scheduler is closed and takes no more texts")
            free = len(self._slots) - self.running
            if len(self._waiting) + len(jobs) > self.limit + free:
                raise Busy(len(self._waiting), self._retry_after())
            self._waiting.extend(jobs)
            self._wake.notify()
        return jobs

    def end_within(self, seconds: float) -> None:
        """Take no more texts; what is not over in `seconds` ends with what it has ("deadline")."""
        with self._wake:
            self._closing = True
            for job in self._jobs():
                job.deadline = min(job.deadline, time.monotonic() + seconds)
            self._wake.notify()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more texts, let those there are go on for `drain_s` seconds, then cancel what is left."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(drain_s)
        with self._wake:
            for job in self._jobs():
                job.cancel()
            self._wake.notify()
        self._thread.join()
        for slot in self._slots:
            if slot.context is not None:
                slot.context.session.close()
                slot.context = None

    def _jobs(self) -> list[Job]:
        """All that wait or run; the lock is held."""
        return [*self._waiting, *(job for slot in self._slots if (job := slot.job) is not None)]

    def _retry_after(self) -> int:
        seconds = self._mean_seconds * (len(self._waiting) + 1) / len(self._slots)
        return max(1, min(_LONGEST_WAIT, math.ceil(seconds)))

    # What follows runs in the worker's thread alone.

    def _run(self) -> None:
        while True:
            with self._wake:
                self._admit()
                if not self.running:
                    self._told()
                    if self._closing and not self._waiting:
                        return
                    self._wake.wait()
                    continue
            try:
                self._round()
            except Exception as error:  # a bug; the texts to come are not to suffer from it
                for slot in self._slots:
                    if slot.job is not None:
                        self._fail(slot, error)

    def _round(self) -> None:
        for slot in self._slots:
            reason = slot.job.stop_reason if slot.job is not None else None
            if reason is not None:
                self._end(slot, reason)
        self._decode()
        self._told()
        self._fill_one()
        self._told()

    def _admit(self) -> None:
        """Move texts from the queue to free slots; those that nobody waits for any more leave it."""
        if not self._waiting:
            return
        dead = [job for job in self._waiting if job.stop_reason is not None]
        for job in dead:
            self._waiting.remove(job)
            self._finish(job, job.writer.end(job.stop_reason or "deadline"))
        for slot in self._slots:
            if slot.job is None and self._waiting:
                slot.job, slot.filling = self._waiting.popleft(), True
                slot.prompt = None

    def _decode(self) -> None:
        """One step for every text that decodes."""
        ready = self._in_order()
        if ready and self.observer is not None:
            self.observer.stepped(len(ready))
        for start in range(0, len(ready), self._together):
            group = ready[start : start + self._together]  # a copy: texts end while it is gone through
            work = [(slot.context, slot.job.writer.tokens[-1]) for slot in group if slot.context and slot.job]
            found = self._step(work)
            # For all at once: numpy takes longer to begin than to look through a row.
            best = found.argmax(axis=1).tolist() if isinstance(found, np.ndarray) else [None] * len(group)
            for slot, logits, likeliest in zip(group, found, best, strict=True):
                if isinstance(logits, Exception):
                    self._fail(slot, logits)
                else:
                    self._take(slot, logits, likeliest)

    def _in_order(self) -> list[_Slot]:
        """The slots whose texts decode, each where it was in the last round: an engine binds a cache to its place, and
        only the last moves where one went."""
        order = self._order
        for place in reversed(range(len(order))):
            if not order[place].decodes:
                order[place] = order[-1]
                order.pop()
        if len(order) < self.running:
            order += [slot for slot in self._slots if slot.decodes and slot not in order]
        return order

    def _fill_one(self) -> None:
        """One chunk of one prompt, the slots in turn."""
        count = len(self._slots)
        for offset in range(count):
            slot = self._slots[(self._turn + offset) % count]
            if slot.job is not None and slot.filling and not self._waits_for_twin(slot):
                self._turn = (self._turn + offset + 1) % count
                try:
                    logits = self._fill(slot, slot.job)
                except Exception as error:
                    self._fail(slot, error)
                    return
                if logits is not None:
                    slot.filling = False
                    self._take(slot, logits)
                return

    def _fill(self, slot: _Slot, job: Job) -> NDArray[np.float32] | None:
        """A chunk of the slot's prompt; the logits after its last token once they are there."""
        if slot.context is None:
            slot.context = self.engine.new_context()
        if slot.prompt is None:
            twin, again = self._twin(slot), False
            if twin is not None and twin.context is not None and twin.context.after_prompt is not None:
                slot.context.adopt(twin.context)
                again = True
            slot.prompt = job.request.prompt
            job.reused_tokens = slot.context.start(slot.prompt, again=again)
        # Streams keep their pace, and prompts take turns.
        return slot.context.advance(in_turn=self.running > 1)

    def _twin(self, slot: _Slot) -> _Slot | None:
        """A slot that was given the very same prompt, and has begun or even computed it."""
        prompt = slot.job.request.prompt if slot.job is not None else None
        return next((other for other in self._slots if other is not slot and other.prompt is prompt), None)

    def _waits_for_twin(self, slot: _Slot) -> bool:
        """Whether the same prompt is being computed in another slot, so that waiting is all there is to do."""
        if slot.prompt is not None:
            return False
        twin = self._twin(slot)
        return twin is not None and twin.job is not None and twin.filling

    def _take(self, slot: _Slot, logits: NDArray[np.float32], best: int | None = None) -> None:
        """The next token of a slot's text, and what follows from it; `best`: the place of the largest logit."""
        job, context = slot.job, slot.context
        assert job is not None and context is not None
        try:
            text = job.writer.take(logits, best)
        except Exception as error:
            self._fail(slot, error)
            return
        now = time.monotonic()
        if self.observer is not None:
            self.observer.token_came(job, now - job.last_token)
        job.last_token = now
        writer = job.writer
        if writer.finish_reason is None and context.session.length >= context.session.capacity:
            if job.request.slide:
                window = [*context.tokens, writer.tokens[-1]][-window_tokens(context.session.capacity) :]
                slot.prompt, slot.filling = np.array(window, np.int64), True
                context.start(slot.prompt)
            elif writer.limit is None:
                text += writer.end("length")
            else:
                job.tell(text + writer.end("length"), False)
                self._fail(slot, self.engine.no_room(job.request, len(writer.tokens), writer.limit))
                return
        if writer.finish_reason is not None:
            slot.job = None
            self._finish(job, text)
        elif text:
            job.tell(text, False)

    def _end(self, slot: _Slot, reason: str) -> None:
        job = slot.job
        assert job is not None
        slot.job = None
        self._finish(job, job.writer.end(reason))

    def _fail(self, slot: _Slot, error: Exception) -> None:
        """End a text by its error; the slot starts over with an empty context, made anew when it is needed."""
        job, context = slot.job, slot.context
        assert job is not None
        slot.job = slot.context = slot.prompt = None
        if context is not None:
            context.session.close()
        if not isinstance(error, (EngineError, MemoryError)):
            log.error("a text failed", exc_info=error)
        job.error = error
        job.writer.finish_reason = "error"
        self._finish(job, "")

    def _finish(self, job: Job, text: str) -> None:
        taken = time.monotonic() - job.submitted
        self._mean_seconds += 0.2 * (taken - self._mean_seconds)
        if self.observer is not None:
            self.observer.finished(job)
        job.tell(text, True)


def step_in_lanes(
    work: Sequence[tuple[Context, int]],
) -> NDArray[np.float32] | list[NDArray[np.float32] | Exception]:
    """A step for each (context, token), in one run; where that fails one after the other, to see whose fault it was."""
    try:
        return step_together(work)
    except EngineError as error:
        return step_in_turn(work) if len(work) > 1 else [error]


def step_in_turn(work: Sequence[tuple[Context, int]]) -> list[NDArray[np.float32] | Exception]:
    """A step for each (context, token), one after the other."""
    found: list[NDArray[np.float32] | Exception] = []
    for context, token in work:
        try:
            found.append(context.step(token))
        except Exception as error:
            found.append(error)
    return found
