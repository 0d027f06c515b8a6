"""Fit what `moedge estimate` assumes of CPUs to this machine: python scripts/fit_estimate.py --work FOLDER

Measures the shapes of FITTED (estimate_shapes.py; 2 GB at most at a time, five minutes) and writes
profiles/cpu_fit.json, which profiles/roofline_cpu.py reads: constants, their errors on what they were fitted to, and
what the machine was. scripts/check_estimate.py then says how well other shapes are predicted.

The constants are found by random steps that are kept where they make the logarithms' mean error less (seed 0).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import numpy as np
from estimate_shapes import FITTED, ROUNDS, Case, device_of, measure_all

from moedge.bundle import write_json
from moedge.profiles.device import DeviceProfile
from moedge.profiles.estimate import decode_work, prefill_work
from moedge.profiles.roofline import Pass
from moedge.profiles.roofline_cpu import FILE, Constants, CpuRoofline, load_fit, spread_of
from moedge.profiles.shape import ModelShape
from moedge.runtime import machine

STEPS = 6000
ALSO_INT8 = ("Qwen3-MoE, wide", "Qwen2-MoE, 6 layers")
ALSO_BATCHES = ("OLMoE, small", "DeepSeek-V3, wide", "Qwen3-MoE, wide")
LONG = 1024
# Where the search begins, and what it is drawn back to where the measurements say little.
START = Constants(
    pass_us=60, layer_us=30, latent_us=20, mixture_us=20, lane_us=15, channel_ns=2, bandwidth_share=0.85,
    cached_speed=2, int8_share=0.6, fp32_share=0.5, unpack4=6, unpack8=3,
)  # fmt: skip
# What no measurement can mean: more than the bandwidth that was measured, a cache slower than memory.
LIMITS = {"bandwidth_share": (0.3, 1.0), "cached_speed": (1.0, 10.0)}
_DRAWN_BACK = 0.004  # what a squared logarithm of the distance counts beside a logarithm's error
_SMALL = 0.05


@dataclasses.dataclass(frozen=True)
class Measured:
    """A time in seconds, and the passes that it was of."""

    seconds: float
    passes: Sequence[Pass]
    shape: ModelShape
    device: DeviceProfile
    weight: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("-o", "--output", type=Path, default=FILE, help="default: profiles/cpu_fit.json")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"over all shapes; default: {ROUNDS}")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="fit what an earlier run measured: work/fit.json")
    args = parser.parse_args(arguments)
    if args.measured is None:
        rows = measure_all(FITTED, list_cases(), args.work, args.threads, args.rounds)
        write_json(args.work / "fit.json", rows)
    else:
        rows = json.loads(args.measured.read_text(encoding="utf-8"))
    write_json(args.output, describe(rows, fit(samples_of(rows))))
    load_fit.cache_clear()
    return 0


def list_cases() -> list[Case]:
    """Every shape at int4, two contexts; some at int8, some in batches."""
    cases = [Case(name, context=context) for name in FITTED for context in (0, LONG)]
    cases += [Case(name, "int8") for name in ALSO_INT8]
    return cases + [Case(name, batch=batch) for name in ALSO_BATCHES for batch in (4, 8)]


def samples_of(rows: Sequence[dict[str, Any]]) -> list[Measured]:
    """The inter-token latency of each row, and its time to first token where the cache was empty."""
    found = []
    for row in rows:
        shape, device = ModelShape.from_manifest(row["manifest"]), device_of(row)
        bits = {"int4": 4, "int8": 8}[row["weights"]]
        context = row["context_tokens"] + row["prompt_tokens"] + row["new_tokens"] // 2
        step = decode_work(shape, device, row["batch"], context, bits, 4)
        found.append(Measured(row["itl_ms"] / 1e3, [step], shape, device, 1.0))
        if not row["context_tokens"] and row["batch"] == 1:
            prompt = prefill_work(shape, device, row["prompt_tokens"], bits, 4)
            found.append(Measured(row["ttft_ms"] / 1e3, prompt, shape, device, 0.5))
    return found


def errors(constants: Constants, samples: Sequence[Measured]) -> list[float]:
    """Logarithm of predicted over measured, of each."""
    roofline = CpuRoofline(constants, 1.0, "")
    return [
        math.log(sum(roofline.pass_seconds(each, one.shape, one.device) for each in one.passes) / one.seconds)
        for one in samples
    ]


def fit(samples: Sequence[Measured], steps: int = STEPS) -> tuple[Constants, list[float]]:
    """The constants that predict these best, and each one's error."""
    names = [field.name for field in dataclasses.fields(Constants)]
    start = np.log([getattr(START, name) for name in names])
    weights = np.array([one.weight for one in samples])
    random = np.random.default_rng(0)

    def constants(place: np.ndarray[Any, Any]) -> Constants:
        values = dict(zip(names, np.exp(place).tolist(), strict=True))
        for name, (least, most) in LIMITS.items():
            values[name] = min(most, max(least, values[name]))
        return Constants(**values)

    def loss(place: np.ndarray[Any, Any]) -> float:
        # Almost the absolute error: a run that other work held up counts as one, not as its square.
        found = np.hypot(errors(constants(place), samples), _SMALL)
        return float((weights * found).sum() / weights.sum() + _DRAWN_BACK * ((place - start) ** 2).mean())

    best, least = start, loss(start)
    for step in range(steps):
        width = 0.5 * (1 - step / steps) + 0.01
        some = random.random(len(names)) < random.choice((0.15, 0.5))
        place = best + width * some * random.standard_normal(len(names))
        if (now := loss(place)) < least:
            best, least = place, now
    return constants(best), errors(constants(best), samples)


def describe(rows: Sequence[dict[str, Any]], fitted: tuple[Constants, list[float]]) -> dict[str, Any]:
    """The document of profiles/cpu_fit.json."""
    constants, found = fitted
    left = iter(found)
    shown = []
    for row in rows:
        kept = {key: row[key] for key in ("name", "weights", "context_tokens", "batch", "itl_ms", "ttft_ms")}
        kept |= {"bandwidth": round(row["bandwidth"]), "itl_error": math.expm1(next(left))}
        has_ttft = not row["context_tokens"] and row["batch"] == 1
        kept["ttft_error"] = math.expm1(next(left)) if has_ttft else None
        shown.append({key: round(value, 4) if isinstance(value, float) else value for key, value in kept.items()})
    return {
        "made": {
            "date": datetime.date.today().isoformat(),
            "cpu": machine.cpu_name(),
            "threads": rows[0]["threads"],
            "onnxruntime": importlib.metadata.version("onnxruntime"),
            "kernels": rows[0]["kernels"],
            "shapes": len({row["name"] for row in rows}),
            "measurements": len(found),
        },
        "constants": {key: float(f"{value:.4g}") for key, value in dataclasses.asdict(constants).items()},
        "error": round(math.sqrt(sum(one**2 for one in found) / len(found)), 4),
        "spread": round(spread_of(found), 3),
        "measurements": shown,
    }


if __name__ == "__main__":
    sys.exit(main())
