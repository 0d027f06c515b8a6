"""Times by kind of operation, out of onnxruntime's own profiler: prompts and their new tokens, apart.

The profiler slows every node a little, so these times are for shares, not for latency.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import EngineError
from .bench_runs import Case, run_once
from .engine import Engine
from .preflight import check_engine, read_engine
from .sessions import SessionOptions, backend_module

_SEED = 0


def measure_breakdown(
    bundle: str | os.PathLike[str] | Bundle, profile: str, case: Case, threads: int | None
) -> dict[str, Any]:
    """`prefill` (of all sequences' prompts) and `decode` (of one step): rows of op, nodes, ms and share, longest first;
    `prefill_ms` and `decode_ms` with the profiler on, what is outside of all nodes included.

    Raises:
        EngineError: the backend has no profiler.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    info = read_engine(opened, profile)
    check_engine(opened, info)
    with tempfile.TemporaryDirectory(prefix="moedge-profile-") as folder:
        options = SessionOptions(threads, profile_prefix=str(Path(folder) / "ops"), lanes=case.batch)
        session = backend_module(info.backend).open_session(opened, info, options)
        end_profiling = getattr(session, "end_profiling", None)
        if end_profiling is None:
            session.close()
            raise EngineError(
                f"engine '{profile}' runs on {info.backend}, of which moedge reads no breakdown; use a cpu engine"
            )
        with Engine(opened, info, session) as engine:
            prefills = _run(engine, case)
            events = json.loads(end_profiling().read_text(encoding="utf-8"))
    return summarize(events, prefills, case.new_tokens - 1)


def summarize(events: Sequence[Mapping[str, Any]], prefills: int, steps: int) -> dict[str, Any]:
    """The breakdown out of a profile in Chrome's trace format: the last `prefills` + `steps` runs of the model."""
    runs = sorted(
        (event["ts"], event["ts"] + event["dur"]) for event in events if event.get("name") == "model_run"
    )[-(prefills + steps) :]
    nodes = sorted(
        (event["ts"], event["dur"], str(event["args"]["op_name"]))
        for event in events
        if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
    )
    groups = (("prefill", runs[:prefills], 1), ("decode", runs[prefills:], max(1, steps)))
    found: dict[str, Any] = {}
    for name, of_group, divisor in groups:
        total = sum(end - start for start, end in of_group) / divisor / 1e3
        by_op: dict[str, list[float]] = {}
        for start, end in of_group:
            for moment, duration, op in nodes:
                if start <= moment < end:
                    by_op.setdefault(op, []).append(duration)
        rows: list[dict[str, Any]] = [
            {"op": op, "nodes": len(times) / divisor, "ms": sum(times) / divisor / 1e3} for op, times in by_op.items()
        ]
        rows.append({"op": "between nodes", "nodes": 0, "ms": max(0.0, total - sum(row["ms"] for row in rows))})
        rows.sort(key=lambda row: -row["ms"])
        found[name] = [row | {"share": row["ms"] / total if total else 0.0} for row in rows]
        found[f"{name}_ms"] = total
    return found


def _run(engine: Engine, case: Case) -> int:
    """Warm up, then the prompts and their new tokens; how many runs of the model the prompts took."""
    size = (case.batch, case.context + case.prompt_tokens)
    prompts = np.random.default_rng(_SEED).integers(0, engine.info.vocab_size, size)
    own = engine.begin()
    sessions = [own, *(own.another() for _ in range(case.batch - 1))]
    for _ in range(2):
        run_once(engine, sessions, prompts, case)
    for session in sessions[1:]:
        session.close()
    return case.batch * -(-case.prompt_tokens // engine.prefill_tokens)
