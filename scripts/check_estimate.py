"""Hold `moedge estimate` against `moedge bench` on this machine's CPU, and against published rates: docs/estimates.md.

    python scripts/check_estimate.py --work FOLDER -o docs/estimates.md [--threads N]

Each shape of CHECKED (estimate_shapes.py) is written with random weights (2 GB at most at a time), exported, built for
the CPU, measured, and predicted from the memory bandwidth of the same run. The constants behind the prediction were
fitted to other shapes (scripts/fit_estimate.py, which is run before this one). Every number on the page is of this
script or of the fit.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
from estimate_shapes import CHECKED, NEW_TOKENS, PROMPT_TOKENS, ROUNDS, Case, device_of, measure_all
from synthetic_checkpoint import SHAPES

from moedge.bundle import write_json
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.layout import plan_layout
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate, find_roofline
from moedge.profiles.roofline_cpu import FILE

GOAL = 0.25
@dataclass(frozen=True)
class Published:
    """A figure that somebody published of a shape whose config is known; other engines than ours."""

    shape: str
    profile: str
    what: str
    told: str
    value: float
    source: str
    prompt_tokens: int = 512
    called: str = ""  # what was measured, where the shape is only its nearest kin


_KIN = "Qwen3.5-35B-A3B, as "
DECODE, PREFILL, MEMORY = "decode, tokens/s", "first token, ms", "memory, GB"
PUBLISHED = (
    Published("deepseek-v2-lite", "rtx3090", DECODE, "about 180", 180.0, "llama.cpp, Q4_0"),
    Published("qwen3-30b-a3b", "rtx4090", DECODE, "up to 196", 196.0, "blogs, 4 bit; weak"),
    Published("qwen3-30b-a3b", "jetson-thor", DECODE, "81", 81.0, "TensorRT Edge-LLM 0.7, int4"),
    Published("qwen3-30b-a3b", "jetson-thor", PREFILL, "125", 125.0, "the same, 370 tokens", 370),
    Published("qwen3-30b-a3b", "jetson-thor", MEMORY, "15.9", 15.9, "the same"),
    Published("qwen3-30b-a3b", "jetson-agx-orin-64gb", DECODE, "31.4", 31.4, "vLLM, Marlin", called=_KIN),
    Published("qwen3-30b-a3b", "jetson-agx-orin-64gb", DECODE, "22.5", 22.5, "llama.cpp", called=_KIN),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("-o", "--output", type=Path, help="write the page there; default: print it")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"over all shapes; default: {ROUNDS}")
    parser.add_argument("--only", metavar="TEXT", help="only shapes whose name holds this")
    parser.add_argument("--quick", action="store_true", help="the goal's workload alone: int4, batch 1")
    args = parser.parse_args(arguments)
    shapes = {name: config for name, config in CHECKED.items() if args.only is None or args.only in name}
    cases = [case for name in shapes for case in (cases_of(name)[:1] if args.quick else cases_of(name))]
    rows = [compare(row) for row in measure_all(shapes, cases, args.work, args.threads, args.rounds)]
    write_json(args.work / "rows.json", rows)
    page = render(rows, describe(args))
    if args.output is None:
        print(page)
    else:
        args.output.write_text(page, encoding="utf-8")
    return 0


def cases_of(name: str) -> list[Case]:
    """The goal's own workload first; then a longer context, a batch, weights of 8 bits."""
    return [Case(name), Case(name, context=1024), Case(name, batch=4), Case(name, "int8")]


def compare(row: dict[str, Any]) -> dict[str, Any]:
    """A measurement with its prediction."""
    prompt = row["context_tokens"] + row["prompt_tokens"]  # the cache is as long then, whatever filled it
    counts = {"prompt_tokens": prompt, "new_tokens": row["new_tokens"], "batch": row["batch"]}
    found = {**row, "measured": row, "predicted": estimate(row["manifest"], device_of(row), **counts)}
    say(found)
    return found


def is_goal(row: dict[str, Any]) -> bool:
    """Whether a row is of the workload that the goal is about."""
    real = row["measured"]
    return row["weights"] == "int4" and real["batch"] == 1 and not real["context_tokens"]


def predict(each: Published) -> tuple[float, float, float]:
    """(expected, low, high) of a published figure, for the shape at int4."""
    config = json.loads(SHAPES.read_text(encoding="utf-8"))[each.shape]
    counts = {"prompt_tokens": each.prompt_tokens, "new_tokens": 64}
    found = estimate(plan_manifest(each.shape, config), load_profile(each.profile), **counts)
    if each.what == DECODE:
        times = found["itl_ms"]
        return 1e3 / times["p50"], 1e3 / times["high"], 1e3 / times["low"]
    if each.what == PREFILL:
        return tuple(found["ttft_ms"][key] for key in ("p50", "low", "high"))
    return (found["peak_memory_bytes"] / 1e9,) * 3


def plan_manifest(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What moedge.json would say of a checkpoint of this config at int4, from its own plan, nothing exported."""
    checkpoint = Checkpoint(Path(name), config, {})
    family = find_family(checkpoint)
    parsed = family.read_config(checkpoint)
    layout = plan_layout(family.plan_weights(parsed), "int4", 128, zero_points=False)
    return {
        "model": {"name": name, "family": parsed.family},
        "config": parsed.to_json(),
        "quantization": {"weights": "int4", "group_size": 128},
        "sizes": layout.sizes_by_role(),
        "cache": [{"name": entry, "width": width} for entry, width in parsed.cache_entries()],
        "files": {},
    }


def say(row: dict[str, Any]) -> None:
    real, guess = row["measured"], row["predicted"]
    rate = 1e3 * real["batch"] / real["itl_ms"]
    told = f"decode {rate:,.1f} measured, {guess['decode_tokens_per_s']:,.1f} predicted ({error(row):+.0%})"
    what = f"{row['name']} {row['weights']}, context {real['context_tokens']}, batch {real['batch']}"
    print(f"{what}: {told}; TTFT {real['ttft_ms']:,.1f} and {guess['ttft_ms']['p50']:,.1f} ms", file=sys.stderr)


def error(row: dict[str, Any]) -> float:
    """Predicted decode rate over the measured one, less one."""
    real = row["measured"]
    return float(row["predicted"]["decode_tokens_per_s"] * real["itl_ms"] / 1e3 / real["batch"] - 1)


def describe(args: argparse.Namespace) -> str:
    """How the run was made."""
    created = datetime.datetime.now(datetime.timezone.utc).date()
    device = load_profile("cpu")
    how = f"{args.threads or device.cores} threads; of {args.rounds} rounds the fastest run, of its tokens the median"
    return f"{created}, {device.title}, onnxruntime {importlib.metadata.version('onnxruntime')}, {how}"


def render(rows: list[dict[str, Any]], how: str) -> str:
    """The page."""
    goal, others = [row for row in rows if is_goal(row)], [row for row in rows if not is_goal(row)]
    within = sum(abs(error(row)) <= GOAL for row in goal)
    fitted = json.loads(FILE.read_text(encoding="utf-8"))
    lines = [
        "# Estimates against measurements",
        "",
        f"Written by `scripts/check_estimate.py`, every figure from its run: {how}.",
        f"{PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, random weights. The prediction knows the shape and the "
        "memory bandwidth of the same run.",
        "",
        f"**On shapes not fitted to, {within} of {len(goal)} decode rates are predicted "
        f"within {GOAL:.0%}.** A positive error is a prediction that is too fast.",
        "",
        "## Not fitted to",
        "",
        "int4, batch 1, no context before the prompt.",
        "",
        *_table(goal),
        "",
    ]
    if others:
        lines += ["The same shapes otherwise used:", "", *_other_table(others), ""]
    lines += ["## What was fitted", "", *_fitted(fitted), ""]
    said = "Batch 1. Other engines than ours, so only the order is asked for; memory includes what the engine reserves."
    lines += ["## Published figures", "", said, "", *_published_table()]
    lines += ["", "## Assumptions", ""]
    sources = {kind: find_roofline(load_profile(kind)).source for kind in ("rtx4090", "jetson-thor", "cpu")}
    lines += [f"- `{load_profile(name).kind}`: {source}." for name, source in sources.items()]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = "shape|read a token|bandwidth|decode tokens/s, measured|predicted|error|band holds it"
    head += "|TTFT ms, measured|predicted|error"
    lines = [f"| {' | '.join(head.split('|'))} |", f"| --- |{' ---: |' * head.count('|')}"]
    for row in rows:
        real, guess = row["measured"], row["predicted"]
        ttft = real["ttft_ms"]
        cells = [
            row["name"],
            f"{guess['bytes_per_token'] / 2**20:.1f} MiB",
            f"{real['bandwidth'] / 1e9:.1f} GB/s",
            *_rates(row),
            f"{ttft:.1f}",
            f"{guess['ttft_ms']['p50']:.1f}",
            f"{guess['ttft_ms']['p50'] / ttft - 1:+.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _other_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = "shape|weights|context|batch|decode tokens/s, measured|predicted|error|band holds it"
    lines = [f"| {' | '.join(head.split('|'))} |", f"| --- | --- |{' ---: |' * (head.count('|') - 1)}"]
    for row in rows:
        real = row["measured"]
        cells = [row["name"], row["weights"], f"{real['context_tokens']:,}", str(real["batch"]), *_rates(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rates(row: dict[str, Any]) -> list[str]:
    """Decode measured and predicted, the error, and whether the band holds the truth."""
    real, guess = row["measured"], row["predicted"]
    held = guess["itl_ms"]["low"] <= real["itl_ms"] <= guess["itl_ms"]["high"]
    rate = 1e3 * real["batch"] / real["itl_ms"]
    return [f"{rate:.1f}", f"{guess['decode_tokens_per_s']:.1f}", f"{error(row):+.0%}", "yes" if held else "no"]


def _fitted(fitted: dict[str, Any]) -> list[str]:
    made, constants = fitted["made"], fitted["constants"]
    told = ", ".join(f"`{name}` {value:g}" for name, value in constants.items())
    lines = [
        f"By `scripts/fit_estimate.py` on {made['date']}, to these measurements of {made['shapes']} other shapes on "
        f"{made['cpu']}, {made['threads']} threads, kernels {made['kernels']}: {told}.",
        "",
        "| shape | weights | context | batch | ITL ms, measured | error | TTFT ms, measured | error |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in fitted["measurements"]:
        first = [f"{row['ttft_ms']:.1f}", f"{row['ttft_error']:+.0%}"] if row["ttft_error"] is not None else ["", ""]
        cells = [row["name"], row["weights"], f"{row['context_tokens']:,}", str(row["batch"]), f"{row['itl_ms']:.3f}"]
        lines.append(f"| {' | '.join([*cells, format(row['itl_error'], '+.0%'), *first])} |")
    return [*lines, "", "Here a positive error is a predicted time that is too long."]


def _published_table() -> list[str]:
    lines = ["| shape | device | figure | published | by | predicted | low to high | error |"]
    lines.append("| --- | --- | --- | ---: | --- | ---: | ---: | ---: |")
    for each in PUBLISHED:
        expected, low, high = predict(each)
        band = "" if low == high else f"{low:.0f} to {high:.0f}"
        cells = [f"{each.called}{each.shape}", load_profile(each.profile).title, each.what, each.told, each.source]
        lines.append(f"| {' | '.join(cells)} | {expected:.3g} | {band} | {expected / each.value - 1:+.0%} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
