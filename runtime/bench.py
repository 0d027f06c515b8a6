"""`moedge bench`: what one engine does on this machine, beside what the machine's memory would allow.

Single stream, batch 1. The prompt is random tokens (so that experts are visited as evenly as training left them), and
decoding goes on greedily from it. Times are taken around the engine's own steps, sampling included, text excluded.

Scenarios go by MLPerf Inference's names (Reddi et al., arXiv:1911.02549): single-stream sends a query when the last is
answered and is told by the 90th percentile of a query's time; offline has all queries at once and is told by its
throughput. Their queries are prompts that differ; they are as many as `repeat`, far fewer than MLPerf asks for.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle, Progress
from ..errors import EngineError, UsageError
from ..profiles.shape import bytes_per_token
from . import machine
from .energy import EnergyMeter, open_meter
from .engine import Engine, load
from .preflight import EngineInfo, choose_profile, read_engine
from .sampling import Sampler, Sampling

SCHEMA = 1
SEED = 0
PERCENTILES = (50, 90, 99)
SCENARIOS = ("single-stream", "offline")
SWEEP = (16, 64, 256, 1024, 4096, 16384)  # prompt lengths


@dataclass
class Samples:
    """Raw times in seconds: of the prompt for each repeat, and of each new token after the first, by repeat."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[list[float]] = field(default_factory=list)
    wall_s: float = 0.0  # from the first query to the last answer, warm-up excluded

    def to_json(self) -> dict[str, Any]:
        return {
            "ttft_ms": [1e3 * value for value in self.ttft_s],
            "itl_ms": [[1e3 * value for value in row] for row in self.itl_s],
        }


def bench(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None = None,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch: int = 1,
    repeat: int = 5,
    threads: int | None = None,
    samples: bool = False,
    scenario: str | None = None,
    breakdown: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an engine; the result as documented for `moedge bench --json`.

    One warm-up, then `repeat` runs of a prompt and `new_tokens` tokens. `samples` keeps the raw times. `scenario`:
    `single-stream` or `offline`. `breakdown` runs once more with the backend's profiler on, for times by operation.

    Raises:
        UsageError: a count out of range, or an unknown scenario. EngineError: what `moedge.load` raises, more tokens
        than the context holds, or a breakdown of a backend without a profiler.
    """
    case = Case(prompt_tokens, new_tokens, batch, repeat, scenario)
    (result,) = _bench_cases(bundle, profile, [case], threads, samples, progress)
    if breakdown:
        from .bench_breakdown import measure_breakdown

        if progress is not None:
            progress("profiling operations", 0, 1)
        result["breakdown"] = measure_breakdown(bundle, result["profile"], case, threads)
        if progress is not None:
            progress("profiling operations", 1, 1)
    return result


def bench_sweep(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None = None,
    *,
    lengths: Sequence[int] | None = None,
    new_tokens: int = 64,
    batch: int = 1,
    repeat: int = 5,
    threads: int | None = None,
    samples: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A result for each prompt length, of one loaded engine; decoding goes on behind it, at that context.

    lengths: default: 16, 64, 256 and so on, as far as the engine has room.

    Raises:
        UsageError, EngineError: as `bench`.
    """
    if lengths is None:
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        room = read_engine(opened, profile if profile is not None else choose_profile(opened)).max_seq_len
        lengths = [length for length in SWEEP if length + new_tokens - 1 <= room] or [max(1, room - new_tokens + 1)]
    cases = [Case(length, new_tokens, batch, repeat) for length in dict.fromkeys(lengths)]
    return _bench_cases(bundle, profile, cases, threads, samples, progress)


@dataclass(frozen=True)
class Case:
    """What is run.

    Raises:
        UsageError: a count out of range, or an unknown scenario.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    repeat: int
    scenario: str | None = None

    def __post_init__(self) -> None:
        for name, least in {"prompt_tokens": 1, "new_tokens": 2, "repeat": 1}.items():  # one new comes with the prompt
            value = getattr(self, name)
            if value < least:
                raise UsageError(f"{name} is {value}; it must be at least {least}")
        if self.scenario not in (None, *SCENARIOS):
            raise UsageError(f"scenario is {self.scenario!r}; it must be one of {', '.join(SCENARIOS)}")


def _bench_cases(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None,
    cases: Sequence[Case],
    threads: int | None,
    samples: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Load once, measure each case, then the memory's bandwidth; the results in the cases' order."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    peak_is_own = machine.reset_peak_memory()
    began = time.perf_counter()
    with load(opened, profile, threads=threads) as engine:
        load_s = time.perf_counter() - began
        used, info = engine.session.threads, engine.info
        for case in cases:
            _check_fits(engine, case.prompt_tokens, case.new_tokens, case.batch)
        meter = open_meter(on_gpu=info.compute_capability is not None)
        measured = []
        for case in cases:
            what = "measuring" if len(cases) == 1 else f"measuring {case.prompt_tokens} tokens"
            found, joules = _measure(engine, meter, case, what, progress)
            measured.append((case, found, joules, machine.peak_memory_bytes()))
        energy = {"energy_reason": meter.reason, "energy_source": meter.source}
        meter.close()
    if progress is not None:
        progress("measuring memory bandwidth", 0, 1)
    limit = machine.measure_bandwidth(used)
    if progress is not None:
        progress("measuring memory bandwidth", 1, 1)
    results = []
    for case, found, joules, peak in measured:
        result = _result(opened, info, case, found, joules, limit)
        result |= {"threads": used, "load_s": load_s, "peak_memory_bytes": peak}
        result["peak_memory_of"] = "the benchmark" if peak_is_own else "the whole process"
        result |= energy
        if samples:
            result["samples"] = found.to_json()
        results.append(result)
    return results


def _result(
    bundle: Bundle, info: EngineInfo, case: Case, measured: Samples, joules: float | None, limit: float
) -> dict[str, Any]:
    """The document of one case, by the contract's keys in their order."""
    itl = [value for row in measured.itl_s for value in row]
    tokens_per_s = 1 / statistics.fmean(itl)
    element = np.dtype(info.cache[0].dtype).itemsize if info.cache else 4
    context = case.prompt_tokens + case.new_tokens // 2
    read = bytes_per_token(bundle.manifest, context, case.batch, element)
    return {
        "schema": SCHEMA,
        "model": bundle.manifest.get("model", {}).get("name", bundle.path.name),
        "profile": info.profile,
        "backend": info.backend,
        "device": machine.cpu_name(),
        **_quantization(bundle),
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "threads": None,
        "repeat": case.repeat,
        "load_s": None,
        "ttft_ms": percentiles(measured.ttft_s),
        "itl_ms": percentiles(itl),
        "prefill_tokens_per_s": case.prompt_tokens / statistics.median(measured.ttft_s),
        "decode_tokens_per_s": tokens_per_s,
        "peak_memory_bytes": None,
        "bundle_bytes": sum(entry["bytes"] for entry in bundle.manifest["files"].values()),
        "bytes_per_token": read,
        "bandwidth_bytes_per_s": read * tokens_per_s,
        "bandwidth_limit_bytes_per_s": limit,
        "fraction_of_limit": read * tokens_per_s / limit,
        "energy_j_per_token": None if joules is None else joules / len(itl),
        "measured": True,
        **_circumstances(bundle, info.backend_version),
        "warm_up": 1,
        "spread": _spread(measured),
        "limit_note": _limit_note(bundle),
        **_scenario(case, measured),
    }


def _spread(measured: Samples) -> dict[str, Any]:
    """How far the repeats lie apart: the least and the most of each repeat's time to first token and median ITL."""
    medians = [statistics.median(row) for row in measured.itl_s]
    pairs = {"ttft_ms": measured.ttft_s, "itl_p50_ms": medians}
    return {name: {"min": 1e3 * min(values), "max": 1e3 * max(values)} for name, values in pairs.items()}


def _scenario(case: Case, measured: Samples) -> dict[str, Any]:
    """What MLPerf tells of the scenario; empty without one."""
    if case.scenario is None:
        return {}
    queries = [first + sum(rest) for first, rest in zip(measured.ttft_s, measured.itl_s, strict=True)]
    told: dict[str, Any] = {"scenario": case.scenario, "queries": len(queries), "query_ms": percentiles(queries)}
    told["queries_per_s"] = len(queries) / measured.wall_s
    told["output_tokens_per_s"] = len(queries) * case.new_tokens / measured.wall_s
    told["scenario_note"] = f"named after MLPerf Inference; {len(queries)} queries, not a verified MLPerf result"
    return told


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, interpolated as numpy does."""
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {f"p{name}": float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _measure(
    engine: Engine, meter: EnergyMeter, case: Case, what: str, progress: Progress | None
) -> tuple[Samples, float | None]:
    """The times of `repeat` runs after one to warm up, and the energy of the new tokens in joules."""
    random = np.random.default_rng(SEED)
    runs = case.repeat + 1
    prompts = random.integers(0, engine.info.vocab_size, (runs, case.prompt_tokens))
    if case.scenario is None:
        prompts[1:] = prompts[0]
    samples = Samples()
    energy: list[float | None] = []
    began = 0.0
    for run in range(runs):
        if progress is not None:
            progress(what, run, runs)
        if run == 1:
            began = time.perf_counter()
        ttft, itl, joules = _run_once(engine, prompts[run], case.new_tokens, meter)
        if run:  # the first warms up: pages, caches, the memory arena
            samples.ttft_s.append(ttft)
            samples.itl_s.append(itl)
            energy.append(joules)
    samples.wall_s = time.perf_counter() - began
    if progress is not None:
        progress(what, runs, runs)
    known = [value for value in energy if value is not None]
    return samples, sum(known) if len(known) == case.repeat else None


def _run_once(
    engine: Engine, prompt: np.ndarray[Any, np.dtype[np.int64]], new_tokens: int, meter: EnergyMeter
) -> tuple[float, list[float], float | None]:
    sampler = Sampler(Sampling())
    session = engine.begin()
    token, row = np.zeros(1, np.int64), np.zeros(1, np.int64)
    began = time.perf_counter()
    token[0] = sampler.choose(engine.prefill(prompt))
    ttft = time.perf_counter() - began
    meter.start()
    times = []
    last = time.perf_counter()
    for _ in range(new_tokens - 1):
        token[0] = sampler.choose(session.step(token, row).reshape(-1))
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return ttft, times, meter.joules()


def _check_fits(engine: Engine, prompt_tokens: int, new_tokens: int, batch: int) -> None:
    rebuild = f"moedge build {engine.bundle.path} --profile {engine.profile}"
    if batch != engine.info.max_batch:
        mend = "use --batch 1" if engine.info.max_batch == 1 else f"use --batch {engine.info.max_batch}"
        raise EngineError(
            f"engine '{engine.profile}' was built for batch {engine.info.max_batch} and cannot run {batch}; {mend}"
        )
    needed = prompt_tokens + new_tokens - 1
    capacity = engine.session.capacity
    if needed > capacity:
        raise EngineError(
            f"context is full: {prompt_tokens} prompt and {new_tokens} new tokens need room for {needed}, engine "
            f"'{engine.profile}' has {capacity}; use a smaller --prompt-tokens or --new-tokens, or build it for more: "
            f"{rebuild} --max-seq-len {needed}"
        )


def _quantization(bundle: Bundle) -> dict[str, Any]:
    found = bundle.manifest.get("quantization") or {}
    return {"weights": found.get("weights"), "group_size": found.get("group_size")}


def _circumstances(bundle: Bundle, backend_version: str) -> dict[str, Any]:
    """When, with which versions, on what machine and of what model."""
    from .. import __version__

    model = bundle.manifest.get("model") or {}
    moe = bundle.config.get("moe") or {}
    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"moedge": __version__, "backend": backend_version},
        "model_info": {
            "family": model.get("family"),
            "parameters": model.get("parameters"),
            "active_parameters": model.get("active_parameters"),
            "layers": bundle.config.get("num_hidden_layers"),
            "experts": moe.get("num_experts"),
            "experts_per_token": moe.get("num_experts_per_tok"),
        },
        "machine": machine.describe(),
    }


def _limit_note(bundle: Bundle) -> str | None:
    """Why memory bandwidth bounds nothing here, where it does not."""
    cache = machine.last_level_cache_bytes()
    weights = sum(bundle.sizes.values())
    if cache is None or weights > cache:
        return None
    return (
        f"the weights ({weights / 2**20:.1f} MiB) fit into the last-level cache ({cache / 2**20:.0f} MiB): "
        "memory bandwidth is not what limits this model here"
    )
