"""`moedge bench`: what one engine does on this machine, beside what the machine's memory would allow.

Prompts are random tokens (so that experts are visited as evenly as training left them), and decoding goes on greedily
from them, of `batch` sequences together. Rates count all sequences.

Scenarios go by MLPerf Inference's names (Reddi et al., arXiv:1911.02549): single-stream sends a query when the last is
answered and is told by the 90th percentile of a query's time; offline has all queries at once and is told by its
throughput. Their queries are prompts that differ; they are as many as `repeat`, far fewer than MLPerf asks for.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bundle import Bundle, Progress
from ..errors import ProfileError
from ..profiles.device import load_profile, user_profiles_folder
from ..profiles.shape import ModelShape, bytes_per_token, describe_model
from . import kernels, machine
from .bench_runs import Case, Samples, check_fits, measure
from .energy import open_meter, process_gpu_memory
from .engine import load
from .preflight import EngineInfo, choose_profile, read_engine

SCHEMA = 1
PERCENTILES = (50, 90, 99)
SWEEP = (16, 64, 256, 1024, 4096, 16384)  # prompt lengths


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
    context: int = 0,
    breakdown: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an engine; the result as documented for `moedge bench --json`.

    One warm-up, then `repeat` runs of a prompt and `new_tokens` tokens for each of `batch` sequences: the prompts one
    after the other (TTFT is that of the last), the tokens of all in one step (ITL is a step's time). `context` tokens
    are in each cache before. `samples` keeps the raw times. `scenario`: `single-stream` or `offline`. `breakdown` runs
    once more with the backend's profiler on, for times by operation.

    Raises:
        UsageError: a count out of range, or an unknown scenario. EngineError: what `moedge.load` raises, more tokens
        than the context holds, or a breakdown of a backend without a profiler.
    """
    case = Case(prompt_tokens, new_tokens, batch, repeat, scenario, context)
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
    batches: Sequence[int] = (1,),
    contexts: Sequence[int] = (0,),
    new_tokens: int = 64,
    repeat: int = 5,
    threads: int | None = None,
    samples: bool = False,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A result for each prompt length, each batch and each context, the lengths in the innermost turn.

    lengths: default: 16, 64, 256 and so on, as far as the engine has room behind the longest context.
    contexts: tokens that are in each cache before the prompt; what they cost to compute is not counted.

    Raises:
        UsageError, EngineError: as `bench`.
    """
    if lengths is None:
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        room = read_engine(opened, profile if profile is not None else choose_profile(opened)).max_seq_len
        room -= max(contexts) + new_tokens - 1
        lengths = [length for length in SWEEP if length <= room] or [max(1, room)]
    cases = [
        Case(length, new_tokens, batch, repeat, context=context)
        for batch in dict.fromkeys(batches)
        for context in dict.fromkeys(contexts)
        for length in dict.fromkeys(lengths)
    ]
    return _bench_cases(bundle, profile, cases, threads, samples, progress)


def _bench_cases(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None,
    cases: Sequence[Case],
    threads: int | None,
    samples: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Measure each case, then the memory's bandwidth; the results in the cases' order.

    The engine is loaded once for single sequences, and once more for batches where there are both.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    results: list[dict[str, Any]] = []
    for several in sorted({case.batch > 1 for case in cases}):
        some = [case for case in cases if (case.batch > 1) == several]
        results += _measure_cases(opened, profile, some, threads, samples, progress)
    if progress is not None:
        progress("measuring memory bandwidth", 0, 1)
    info = read_engine(opened, results[0]["profile"])
    limit, source = _find_limit(info, results[0]["threads"])
    price = _price_usd_per_hour(info)
    if progress is not None:
        progress("measuring memory bandwidth", 1, 1)
    for result in results:
        result["bandwidth_limit_bytes_per_s"] = limit
        result["bandwidth_limit_source"] = source
        result["fraction_of_limit"] = None if limit is None else result["bandwidth_bytes_per_s"] / limit
        a_million = 1e6 / (3600 * result["decode_tokens_per_s"])  # hours
        result["usd_per_million_tokens"] = None if price is None else price * a_million
    order = [(case.batch, case.context, case.prompt_tokens) for case in cases]
    return sorted(results, key=lambda one: order.index((one["batch"], one["context_tokens"], one["prompt_tokens"])))


def _find_limit(info: EngineInfo, threads: int) -> tuple[float | None, str]:
    """Bytes per second that memory gives, and who says so: measured in this run on a CPU, the data sheet's on a GPU."""
    if info.compute_capability is None:
        return machine.measure_bandwidth(threads), "measured here"
    try:
        return load_profile(info.profile).bandwidth_bytes_per_s, "data sheet"
    except ProfileError:  # built with a file of the user's that lies elsewhere
        return None, f"not known: no profile has the name {info.profile}; put its file into {user_profiles_folder()}"


def _price_usd_per_hour(info: EngineInfo) -> float | None:
    """What an hour of the device costs, by its profile."""
    with contextlib.suppress(ProfileError):
        return load_profile(info.profile).price_usd_per_hour
    return None


def _measure_cases(
    bundle: Bundle,
    profile: str | None,
    cases: Sequence[Case],
    threads: int | None,
    samples: bool,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Load once and measure each case; the results without what the memory's bandwidth says to them."""
    peak_is_own = machine.reset_peak_memory()
    began = time.perf_counter()
    with load(bundle, profile, threads=threads, lanes=max(case.batch for case in cases)) as engine:
        load_s = time.perf_counter() - began
        used, info = engine.session.threads, engine.info
        for case in cases:
            check_fits(engine, case)
        meter = open_meter(on_gpu=info.compute_capability is not None)
        results = []
        for case in cases:
            what = "measuring" if len(cases) == 1 else f"measuring {case.prompt_tokens} tokens, batch {case.batch}"
            found, joules = measure(engine, meter, case, what, progress)
            result = _result(bundle, info, case, found, joules)
            result |= {"threads": used, "load_s": load_s, "peak_memory_bytes": machine.peak_memory_bytes()}
            on_gpu = info.compute_capability is not None
            result["device_memory_bytes"] = process_gpu_memory() if on_gpu else None
            result["peak_memory_of"] = "the benchmark" if peak_is_own else "the whole process"
            if samples:
                result["samples"] = found.to_json()
            results.append(result)
        energy = {"energy_reason": meter.reason, "energy_source": meter.source}
        meter.close()
    return [result | energy for result in results]


def _result(
    bundle: Bundle, info: EngineInfo, case: Case, measured: Samples, joules: float | None
) -> dict[str, Any]:
    """The document of one case, by the contract's keys in their order."""
    itl = [value for row in measured.itl_s for value in row]
    steps_per_s = 1 / statistics.fmean(itl)
    shape = ModelShape.from_manifest(bundle.manifest)
    element = info.cache_bytes_per_token / shape.cache_width if info.cache else 4
    context = case.context + case.prompt_tokens + case.new_tokens // 2
    read = bytes_per_token(bundle.manifest, context, case.batch, element, info.backend)
    return {
        "schema": SCHEMA,
        "model": bundle.manifest["model"]["name"],
        "profile": info.profile,
        "backend": info.backend,
        "device": machine.name_of(info.compute_capability),
        **_quantization(bundle),
        "batch": case.batch,
        "prompt_tokens": case.prompt_tokens,
        "new_tokens": case.new_tokens,
        "threads": None,
        "repeat": case.repeat,
        "load_s": None,
        "ttft_ms": percentiles(measured.ttft_s),
        "itl_ms": percentiles(itl),
        "prefill_tokens_per_s": case.batch * case.prompt_tokens / statistics.median(measured.ttft_s),
        "decode_tokens_per_s": case.batch * steps_per_s,
        "peak_memory_bytes": None,
        "bundle_bytes": sum(entry["bytes"] for entry in bundle.manifest["files"].values()),
        "bytes_per_token": read,
        "bandwidth_bytes_per_s": read * steps_per_s,
        "bandwidth_limit_bytes_per_s": None,
        "fraction_of_limit": None,
        "energy_j_per_token": None if joules is None else joules / len(itl) / case.batch,
        "measured": True,
        "context_tokens": case.context,
        "expected_distinct_experts": shape.distinct_experts(case.batch),
        "kernels": kernels.describe(info.session),
        **_circumstances(bundle, info.backend_version),
        "warm_up": 1,
        "spread": _spread(measured),
        "limit_note": _limit_note(bundle),
        **_scenario(case, measured),
    }


def _spread(measured: Samples) -> dict[str, Any]:
    """How far the repeats lie apart: the least and most of each one's TTFT and ITL percentiles."""
    found = {"ttft_ms": [1e3 * value for value in measured.ttft_s]}
    rows = [percentiles(row) for row in measured.itl_s]
    found |= {f"itl_{name}_ms": [row[name] for row in rows] for name in percentiles([0.0])}
    return {name: {"min": min(values), "max": max(values)} for name, values in found.items()}


def _scenario(case: Case, measured: Samples) -> dict[str, Any]:
    """What MLPerf tells of the scenario; empty without one."""
    if case.scenario is None:
        return {}
    # Queries that are computed together are answered together.
    runs = [first + sum(rest) for first, rest in zip(measured.ttft_s, measured.itl_s, strict=True)]
    queries = [seconds for seconds in runs for _ in range(case.batch)]
    told: dict[str, Any] = {"scenario": case.scenario, "queries": len(queries), "query_ms": percentiles(queries)}
    told["queries_per_s"] = len(queries) / measured.wall_s
    told["output_tokens_per_s"] = len(queries) * case.new_tokens / measured.wall_s
    told["scenario_note"] = f"named after MLPerf Inference; {len(queries)} queries, not a verified MLPerf result"
    return told


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds, interpolated as numpy does."""
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {f"p{name}": float(value) for name, value in zip(PERCENTILES, values, strict=True)}


def _quantization(bundle: Bundle) -> dict[str, Any]:
    found = bundle.manifest["quantization"]
    return {"weights": found.get("weights"), "group_size": found.get("group_size")}


def _circumstances(bundle: Bundle, backend_version: str) -> dict[str, Any]:
    """When, with which versions, on what machine and of what model."""
    from .. import __version__

    return {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"moedge": __version__, "backend": backend_version},
        "model_info": describe_model(bundle.manifest),
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
