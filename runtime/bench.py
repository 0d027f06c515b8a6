"""`moedge bench`: what one engine does on this machine, beside what the machine's memory would allow.

Single stream, batch 1. The prompt is random tokens (so that experts are visited as evenly as training left them), and
decoding goes on greedily from it. Times are taken around the engine's own steps, sampling included, text excluded.
"""

from __future__ import annotations

import datetime
import os
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Bundle, Progress
from ..errors import EngineError, UsageError
from ..profiles.shape import bytes_per_token
from . import machine
from .engine import Engine, load
from .sampling import Sampler, Sampling

SCHEMA = 1
SEED = 0
PERCENTILES = (50, 90, 99)


@dataclass
class Samples:
    """Raw times in seconds: of the prompt for each repeat, and of each new token after the first, by repeat."""

    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[list[float]] = field(default_factory=list)

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an engine; the result as documented for `moedge bench --json`.

    One warm-up, then `repeat` runs of a prompt and `new_tokens` tokens. `samples` keeps the raw times.

    Raises:
        UsageError: a count out of range. EngineError: what `moedge.load` raises, or more tokens than the context holds.
    """
    for name, (value, least) in {
        "prompt_tokens": (prompt_tokens, 1),
        "new_tokens": (new_tokens, 2),  # one comes with the prompt
        "repeat": (repeat, 1),
    }.items():
        if value < least:
            raise UsageError(f"{name} is {value}; it must be at least {least}")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    peak_is_own = machine.reset_peak_memory()
    began = time.perf_counter()
    with load(opened, profile, threads=threads) as engine:
        load_s = time.perf_counter() - began
        _check_fits(engine, prompt_tokens, new_tokens, batch)
        used = engine.session.threads
        meter = machine.EnergyMeter()
        measured, joules = _measure(engine, meter, prompt_tokens, new_tokens, repeat, progress)
        peak = machine.peak_memory_bytes()
        info = engine.info
    if progress is not None:
        progress("measuring memory bandwidth", 0, 1)
    limit = machine.measure_bandwidth(used)
    if progress is not None:
        progress("measuring memory bandwidth", 1, 1)
    itl = [value for row in measured.itl_s for value in row]
    tokens_per_s = 1 / statistics.fmean(itl)
    element = np.dtype(info.cache[0].dtype).itemsize if info.cache else 4
    read = bytes_per_token(opened.manifest, prompt_tokens + new_tokens // 2, batch, element)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "model": opened.manifest.get("model", {}).get("name", opened.path.name),
        "profile": info.profile,
        "backend": info.backend,
        "device": machine.cpu_name(),
        **_quantization(opened),
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": used,
        "repeat": repeat,
        "load_s": load_s,
        "ttft_ms": percentiles(measured.ttft_s),
        "itl_ms": percentiles(itl),
        "prefill_tokens_per_s": prompt_tokens / statistics.median(measured.ttft_s),
        "decode_tokens_per_s": tokens_per_s,
        "peak_memory_bytes": peak,
        "bundle_bytes": sum(entry["bytes"] for entry in opened.manifest["files"].values()),
        "bytes_per_token": read,
        "bandwidth_bytes_per_s": read * tokens_per_s,
        "bandwidth_limit_bytes_per_s": limit,
        "fraction_of_limit": read * tokens_per_s / limit,
        "energy_j_per_token": None if joules is None else joules / len(itl),
        "measured": True,
        **_circumstances(opened, info.backend_version),
        "warm_up": 1,
        "peak_memory_of": "the benchmark" if peak_is_own else "the whole process",
        "energy_reason": meter.reason,
        "limit_note": _limit_note(opened),
    }
    if samples:
        result["samples"] = measured.to_json()
    return result


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, interpolated as numpy does."""
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {f"p{name}": float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _measure(
    engine: Engine,
    meter: machine.EnergyMeter,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    progress: Progress | None,
) -> tuple[Samples, float | None]:
    """The times of `repeat` runs after one to warm up, and the energy of the new tokens in joules."""
    prompt = np.random.default_rng(SEED).integers(0, engine.info.vocab_size, prompt_tokens)
    samples = Samples()
    energy: list[float | None] = []
    for run in range(repeat + 1):
        if progress is not None:
            progress("measuring", run, repeat + 1)
        ttft, itl, joules = _run_once(engine, prompt, new_tokens, meter)
        if run:  # the first warms up: pages, caches, the memory arena
            samples.ttft_s.append(ttft)
            samples.itl_s.append(itl)
            energy.append(joules)
    if progress is not None:
        progress("measuring", repeat + 1, repeat + 1)
    known = [value for value in energy if value is not None]
    return samples, sum(known) if len(known) == repeat else None


def _run_once(
    engine: Engine, prompt: np.ndarray[Any, np.dtype[np.int64]], new_tokens: int, meter: machine.EnergyMeter
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
