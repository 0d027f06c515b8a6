"""The runs of a benchmark: prompts one after the other, then steps that take a token of every sequence.

Times are taken around the engine's own steps, sampling included, text excluded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Progress
from ..errors import EngineError, UsageError
from .energy import EnergyMeter
from .engine import Engine
from .sampling import Sampler, Sampling
from .sessions import Session

SEED = 0
SCENARIOS = ("single-stream", "offline")


@dataclass
class Samples:
    """Raw times in seconds: of all sequences' prompts for each repeat, and of each step after them, by repeat."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[list[float]] = field(default_factory=list)
    wall_s: float = 0.0  # from the first query to the last answer, warm-up excluded

    def to_json(self) -> dict[str, Any]:
        return {
            "ttft_ms": [1e3 * value for value in self.ttft_s],
            "itl_ms": [[1e3 * value for value in row] for row in self.itl_s],
            "wall_s": self.wall_s,
        }


@dataclass(frozen=True)
class Case:
    """What is run: `batch` sequences, each a prompt behind `context` tokens that are in its cache already.

    Raises:
        UsageError: a count out of range, or an unknown scenario.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeat: int
    scenario: str | None = None
    context: int = 0

    def __post_init__(self) -> None:
        least_of = {"prompt_tokens": 1, "new_tokens": 2, "batch": 1, "repeat": 1, "context": 0}
        for name, least in least_of.items():  # one new token comes with the prompt
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")
        if self.scenario not in (None, *SCENARIOS):
            raise UsageError(f"scenario is {self.scenario!r}; it must be one of {', '.join(SCENARIOS)}")
        if self.scenario == "single-stream" and self.batch > 1:
            raise UsageError(f"single-stream is one sequence at a time, not {self.batch}; use --batch 1, or offline")

    @property
    def tokens(self) -> int:
        """What each sequence needs room for: the last new token needs none."""
        return self.context + self.prompt_tokens + self.new_tokens - 1


def measure(
    engine: Engine, meter: EnergyMeter, case: Case, what: str, progress: Progress | None
) -> tuple[Samples, float | None]:
    """The times of `repeat` runs after one to warm up, and the energy of the new tokens in joules."""
    random = np.random.default_rng(SEED)
    runs = case.repeat + 1
    size = (runs, case.batch, case.context + case.prompt_tokens)
    prompts = random.integers(0, engine.info.vocab_size, size)
    if case.scenario is None:
        prompts[1:] = prompts[0]
    own = engine.begin()
    others = [own.another() for _ in range(case.batch - 1)]
    samples = Samples()
    energy: list[float | None] = []
    began = 0.0
    try:
        for run in range(runs):
            if progress is not None:
                progress(what, run, runs)
            if run == 1:
                began = time.perf_counter()
            ttft, itl, joules = run_once(engine, [own, *others], prompts[run], case, meter)
            if run:  # the first warms up: pages, caches, the memory arena
                samples.ttft_s.append(ttft)
                samples.itl_s.append(itl)
                energy.append(joules)
        samples.wall_s = time.perf_counter() - began
    finally:
        for session in others:
            session.close()
    if progress is not None:
        progress(what, runs, runs)
    known = [value for value in energy if value is not None]
    return samples, sum(known) if len(known) == case.repeat else None


def run_once(
    engine: Engine, sessions: list[Session], prompts: NDArray[np.int64], case: Case, meter: EnergyMeter | None = None
) -> tuple[float, list[float], float | None]:
    """Seconds for all prompts, for each step after them, and joules for the steps."""
    sampler = Sampler(Sampling())
    for session, prompt in zip(sessions, prompts, strict=True):
        session.truncate(0)
        if case.context:
            engine.prefill(prompt[: case.context], session)
    tokens = np.zeros(len(sessions), np.int64)
    began = time.perf_counter()
    for lane, (session, prompt) in enumerate(zip(sessions, prompts, strict=True)):
        tokens[lane] = sampler.choose(engine.prefill(prompt[case.context :], session))
    ttft = time.perf_counter() - began
    if meter is not None:
        meter.start()
    times = []
    last = time.perf_counter()
    row, others = np.zeros(1, np.int64), sessions[1:]
    for _ in range(case.new_tokens - 1):
        logits = sessions[0].step_together(others, tokens) if others else sessions[0].step(tokens, row)
        for lane, one in enumerate(logits):
            tokens[lane] = sampler.choose(one)
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return ttft, times, meter.joules() if meter is not None else None


def check_fits(engine: Engine, case: Case) -> None:
    """Raises EngineError where the engine cannot run the case, and says what to ask for instead."""
    rebuild = f"moedge build {engine.bundle.path} --profile {engine.profile}"
    lanes = engine.session.lanes
    if case.batch > lanes:
        raise EngineError(
            f"engine '{engine.profile}' steps {lanes} sequences together at most and cannot run {case.batch}; use "
            f"--batch {lanes}, or build it for more: {rebuild} --max-batch {case.batch}"
        )
    capacity = engine.session.capacity
    if case.tokens > capacity:
        context = f"{case.context} tokens of context, " if case.context else ""
        raise EngineError(
            f"context is full: {context}{case.prompt_tokens} prompt and {case.new_tokens} new tokens need room for "
            f"{case.tokens}, engine '{engine.profile}' has {capacity}; use a smaller --prompt-tokens or --new-tokens, "
            f"or build it for more: {rebuild} --max-seq-len {case.tokens}"
        )
