"""What a load-aware gate brings and costs on the sample model's held-out text; writes docs/load-balance.md.

    python scripts/load_balance.py [--bytes N] [--only-print]

Two routers: the sample's own, and the same with its correction bias skewed on purpose (SKEW, seed SEED). For each
setting of the gate the model is exported at int8 and built for the CPU; utilization and rerouted tokens are computed
from the JSON that `moedge trace` writes, bits per byte are `moedge eval`'s. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import explain_missing
import numpy as np

import moedge
from moedge.export.options import LoadAware
from moedge.runtime.eval import evaluate
from moedge.runtime.trace import trace, write_trace

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "sample"
PAGE = ROOT / "docs" / "load-balance.md"
BEGIN, END = "<!-- Written by scripts/load_balance.py: begin -->", "<!-- end -->"
SEED, SKEW = 20261122, 0.05
EVERYTHING = 1 << 20  # tokens
DEFAULT = LoadAware()
# Weak and strong: half the penalty, and half as much again. Capacity: a tight one alone, without a penalty.
SETTINGS: dict[str, dict[str, LoadAware | None]] = {
    "as trained": {
        "none": None,
        "default": DEFAULT,
        "weak": dataclasses.replace(DEFAULT, penalty=DEFAULT.penalty / 2),
    },
    "skewed": {
        "none": None,
        "default": DEFAULT,
        "weak": dataclasses.replace(DEFAULT, penalty=DEFAULT.penalty / 2),
        "strong": dataclasses.replace(DEFAULT, penalty=1.5 * DEFAULT.penalty),
        "capacity": dataclasses.replace(DEFAULT, penalty=0.0, capacity_factor=1.1),
    },
}


@dataclass
class Measured:
    """experts int64 [layers, tokens, k]."""

    experts: Any
    bits_per_byte: float
    num_experts: int

    @property
    def utilization(self) -> list[float]:
        """Mean load over maximum load, of each layer."""
        counts = [np.bincount(layer.ravel(), minlength=self.num_experts) for layer in self.experts]
        return [float(each.mean() / each.max()) for each in counts]

    def rerouted(self, before: Measured) -> float:
        """Share of tokens, over all layers, that took another set of experts."""
        same = (np.sort(self.experts, axis=-1) == np.sort(before.experts, axis=-1)).all(axis=-1)
        return float(1 - same.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, help="of the text; default: all")
    parser.add_argument("--only-print", action="store_true", help="leave the page as it is")
    args = parser.parse_args()
    explain_missing.need("torch", "safetensors", "onnxruntime")
    text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")[: args.bytes]
    rows = [HEADER]
    with tempfile.TemporaryDirectory() as scratch:
        for router, settings in SETTINGS.items():
            checkpoint = SAMPLE if router == "as trained" else skew(Path(scratch) / "skewed")
            base: Measured | None = None
            for name, setting in settings.items():
                found = measure(checkpoint, setting, text, Path(scratch))
                base = base or found
                rows.append(describe(router, name, setting, found, base))
                print(rows[-1], flush=True)
    tokens, layers = found.experts.shape[1], found.experts.shape[0]
    table = "\n".join(rows)
    said = f"{len(text.encode()):,} bytes, {tokens:,} tokens, {layers} mixtures of {found.num_experts} experts, int8."
    if not args.only_print:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
        PAGE.write_text(f"{head}\n{said}\n\n{table}\n{tail}", encoding="utf-8")


HEADER = """\
| router | gate | penalty | capacity | decay | utilization | worst layer | rerouted | bits per byte | change |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def describe(router: str, name: str, setting: LoadAware | None, found: Measured, base: Measured) -> str:
    figures = ("", "", "") if setting is None else dataclasses.astuple(setting)
    used = found.utilization
    change = "" if setting is None else f"{100 * (found.bits_per_byte / base.bits_per_byte - 1):+.2f}%"
    moved = "" if setting is None else f"{100 * found.rerouted(base):.1f}%"
    cells = [router, name, *(str(each) for each in figures), f"{100 * np.mean(used):.1f}%", f"{100 * min(used):.1f}%"]
    return "| " + " | ".join([*cells, moved, f"{found.bits_per_byte:.4f}", change]) + " |"


def measure(checkpoint: Path, setting: LoadAware | None, text: str, scratch: Path) -> Measured:
    """Export, build, trace and score."""
    bundle, output = scratch / "bundle", scratch / "trace.json"
    moedge.export(checkpoint, bundle, weights="int8", verify=False, force=True, load_aware=setting)
    moedge.build(bundle, "cpu")
    write_trace(trace(bundle, [("heldout.txt", text)], max_tokens=EVERYTHING), output)
    document = json.loads(output.read_text(encoding="utf-8"))
    (traced,) = document["texts"]
    score = evaluate(bundle, text, stride=512)
    return Measured(np.array(traced["experts"]), score["bits_per_byte"], document["num_experts"])


def skew(folder: Path) -> Path:
    """The sample with, in each layer, a ramp from SKEW to -SKEW over shuffled experts added to its correction bias."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(SAMPLE, folder)
    tensors = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(SEED)
    for name in sorted(tensors):
        if name.endswith("e_score_correction_bias"):
            count = len(tensors[name])
            ramp = torch.from_numpy(SKEW * rng.permutation(np.linspace(1, -1, count)))
            tensors[name] = (tensors[name] + ramp).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


if __name__ == "__main__":
    main()
