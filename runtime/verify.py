"""`moedge verify`: every checksum, every expert, and each engine's preflight, as far as this machine can look."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import MODEL, WEIGHTS, Bundle, Progress, find_faults
from ..errors import BundleError, EngineError
from .initializers import Placed, read_placed
from .preflight import cannot_run, inspect_engine, read_engine

# Each expert's own tensors (quantized ones also have scales and zero points beside them).
_EXPERT_TENSORS = ("gate_up.weight", "down.weight")


@dataclass
class Verdict:
    """What was looked at: `faults` must be mended, `unchecked` could not be looked at here; each is one line."""

    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    experts: int = 0
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"ok": not self.faults, **vars(self)}

    def raise_for_faults(self) -> None:
        """Raise the one fault as a BundleError, or how many there are and the first."""
        if self.faults:
            count = f"{len(self.faults)} faults, the first: " if len(self.faults) > 1 else ""
            raise BundleError(count + self.faults[0])


def verify(bundle: Bundle, progress: Progress | None = None) -> Verdict:
    """Check the whole bundle; nothing is loaded and no GPU is needed."""
    files = bundle.manifest["files"]
    verdict = Verdict(files=len(files), bytes=sum(entry["bytes"] for entry in files.values()))
    damaged = []
    for name in sorted(files):
        for fault in find_faults(bundle.path, {name: files[name]}, progress):
            damaged.append(name)
            verdict.faults.append(f"{fault}; {_again()}")
    try:
        _check_experts(bundle, verdict, progress)
    except BundleError as error:
        verdict.faults.append(str(error))
    for profile in bundle.engines():
        _check_engine(bundle, profile, verdict, damaged, progress)
    return verdict


def _check_engine(
    bundle: Bundle, profile: str, verdict: Verdict, damaged: list[str], progress: Progress | None
) -> None:
    """`damaged`: files of the bundle, without which no engine of it loads."""
    try:
        info = read_engine(bundle, profile)
        findings = inspect_engine(bundle, info, whole=True, progress=progress)
        reason = cannot_run(bundle, info)
    except EngineError as error:
        verdict.faults.append(str(error))
        verdict.engines[profile] = {"ok": False, "runs_here": False, "reason": str(error)}
        return
    verdict.faults += findings.faults
    verdict.unchecked += findings.unchecked
    if damaged:
        reason = f"it needs the bundle's {' and '.join(damaged)}"
    ok = not findings.faults and not damaged
    verdict.engines[profile] = {
        "ok": ok,
        "status": info.status,
        "runs_here": ok and reason is None,
        "reason": findings.faults[0] if findings.faults else reason,
    }


def _check_experts(bundle: Bundle, verdict: Verdict, progress: Progress | None) -> None:
    """Each expert of each MoE layer has its bytes, and they are more than one value over and over."""
    moe = bundle.config["moe"]
    layers, count = moe.get("layers", []), moe.get("num_experts", 0)
    if not layers or not bundle.file(MODEL).is_file() or not bundle.file(WEIGHTS).is_file():
        return
    placed = _by_layer(read_placed(bundle.file(MODEL)))
    size = bundle.file(WEIGHTS).stat().st_size
    weights = np.memmap(bundle.file(WEIGHTS), np.uint8, "r") if size else np.empty(0, np.uint8)
    for done, layer in enumerate(layers):
        if progress is not None:
            progress("checking experts", done, len(layers))
        for name in _EXPERT_TENSORS:
            tensor = placed[layer].get(name)
            label = f"layers.{layer}.experts.{name}"
            if tensor is None:
                verdict.faults.append(f"{bundle.file(MODEL)} has no {label}; {_again()}")
            elif not tensor.shape or tensor.shape[0] != count:
                has = tensor.shape[0] if tensor.shape else 0
                verdict.faults.append(f"{label} has {has} experts instead of {count}; {_again()}")
            elif tensor.offset + tensor.length > size:
                verdict.faults.append(f"{label} goes past the end of {bundle.file(WEIGHTS)}; {_again()}")
            else:
                verdict.faults += _empty_experts(weights, tensor, count, label)
        verdict.experts += count
    if progress is not None:
        progress("checking experts", len(layers), len(layers))


def _empty_experts(weights: np.ndarray[Any, Any], tensor: Placed, count: int, label: str) -> list[str]:
    share = tensor.length // count
    faults = []
    for expert in range(count):
        begin = tensor.offset + expert * share
        values = weights[begin : begin + share]
        if share == 0 or not (values != values[0]).any():
            faults.append(f"expert {expert} of {label} is empty (one value throughout); {_again()}")
    return faults


def _by_layer(tensors: list[Placed]) -> defaultdict[int, dict[str, Placed]]:
    """Layer -> {"gate_up.weight": its place, ...} of the experts' tensors."""
    found: defaultdict[int, dict[str, Placed]] = defaultdict(dict)
    for tensor in tensors:
        words = tensor.name.split(".", 3)
        if len(words) == 4 and words[0] == "layers" and words[1].isdigit() and words[2] == "experts":
            if Path(tensor.location).name == WEIGHTS:
                found[int(words[1])][words[3]] = tensor
    return found


def _again() -> str:
    return "export the bundle again: moedge export ... --force"
