"""Measure what each quantization costs the sample model: python scripts/bench_quantization.py [--threads N]

Each is exported with the parity check, run by the cpu engine and scored on sample/heldout.txt as `moedge eval` does.
gptq calibrates with pieces of this Python's standard library, none of them from held-out files. The results go to
docs/quantization.json, and docs/quantization.md is made from them. The status is 1 where the quality bar is not met.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moedge
from moedge.progress import console_progress
from moedge.runtime.eval import evaluate

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "quantization.md"
SAMPLE = ROOT / "sample"
CHANNEL = 0
PIECES, PIECE_BYTES = 40, 1500  # of the calibration text: more than gptq takes


@dataclass(frozen=True)
class Variant:
    weights: str
    algorithm: str = "rtn"
    group_size: int = 128
    zero_points: bool = False

    def describe(self) -> str:
        if self.weights == "fp32":
            return "fp32"
        group = "by channel" if self.group_size == CHANNEL else f"group {self.group_size}"
        return f"{self.weights} {self.algorithm}, {group}{', zero points' if self.zero_points else ''}"


VARIANTS = [
    Variant("fp32"),
    Variant("int8"),
    Variant("int8", "hqq", CHANNEL),
    Variant("int4", "rtn", 32),
    *(Variant("int4", name, group) for name in ("rtn", "hqq", "gptq") for group in (64, 128)),
    *(Variant("int4", name, 128, zero_points=True) for name in ("rtn", "hqq", "gptq")),
    *(Variant("int4", name, CHANNEL) for name in ("rtn", "gptq")),
]
RTN_32 = Variant("int4", "rtn", 32)
GOOD_128 = [Variant("int4", name, 128, zero) for name in ("hqq", "gptq") for zero in (False, True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads that compute (default: physical cores)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-quantization-") as folder:
        calibration = write_calibration(Path(folder) / "calibration.txt")
        results = []
        for variant in VARIANTS:
            results.append(measure(variant, calibration, Path(folder) / "bundle", arguments.threads))
            print(f"{variant.describe()}: {results[-1]['bits_per_byte']:.4f} bits per byte", file=sys.stderr)
    document = {"date": datetime.date.today().isoformat(), "moedge": moedge.__version__, "results": results}
    PAGE.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    PAGE.write_text(make_page(document))
    bars = check_bars(results)
    print("\n".join(f"{'met' if met else 'NOT MET'}: {what}" for what, met in bars))
    return 0 if all(met for _, met in bars) else 1


def write_calibration(path: Path) -> Path:
    """Pieces of files all over the standard library that the sample's held-out text has nothing of."""
    data = json.loads((SAMPLE / "training.json").read_text())["data"]
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for file in sorted(library.rglob("*.py"))
        if not set(data["excluded_folders"]) & set(file.relative_to(library).parts)
        and file.relative_to(library).as_posix() not in data["held_out_paths"]
        and file.stat().st_size > 2 * PIECE_BYTES
    ]
    chosen = files[:: max(1, len(files) // PIECES)][:PIECES]
    pieces = []
    for file in chosen:
        text = file.read_text(encoding="utf-8", errors="ignore")
        middle = len(text) // 2
        pieces.append(text[middle : middle + PIECE_BYTES])
    path.write_text("\n".join(pieces), encoding="utf-8")
    return path


def measure(variant: Variant, calibration: Path, bundle: Path, threads: int | None) -> dict[str, Any]:
    """Export, build and score one variant."""
    options: dict[str, Any] = {"calibration": calibration} if variant.algorithm == "gptq" else {}
    text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")
    with console_progress() as progress:
        exported = moedge.export(
            SAMPLE,
            bundle,
            weights=variant.weights,
            algorithm=variant.algorithm,
            group_size=variant.group_size,
            zero_points=variant.zero_points,
            force=True,
            progress=progress,
            **options,
        )
        moedge.build(bundle, "cpu")
        scored = evaluate(bundle, text, "cpu", text_name="heldout.txt", threads=threads, progress=progress)
    classes = exported.manifest["quantization"]["classes"]
    return {
        **vars(variant),
        "bits_per_byte": scored["bits_per_byte"],
        "scored_tokens": scored["scored_tokens"],
        "bytes": sum(exported.manifest["sizes"].values()),
        "relative_errors": {role: entry.get("relative_error") for role, entry in classes.items()},
        "notes": [note for note in exported.manifest["provenance"]["notes"] if "hqq" in note],
    }


def check_bars(results: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    """What was promised of the sample model, and whether it holds."""
    change = {_variant_of(result): _change(result, results) for result in results}
    best = min(GOOD_128, key=change.__getitem__)
    int8, good = change[Variant("int8")], change[best]
    return [
        (f"int8 is within 0.1% of fp32 ({int8:+.2%})", abs(int8) <= 0.001),
        (f"int4 at group 128 by hqq or gptq is within 1.5% ({best.describe()}: {good:+.2%})", good <= 0.015),
        (f"and better than rtn at group 32 ({change[RTN_32]:+.2%})", good < change[RTN_32]),
    ]


def _variant_of(result: dict[str, Any]) -> Variant:
    return Variant(*(result[key] for key in ("weights", "algorithm", "group_size", "zero_points")))


def _change(result: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """Relative to fp32's bits per byte."""
    plain = next(other["bits_per_byte"] for other in results if other["weights"] == "fp32")
    return float(result["bits_per_byte"] / plain - 1)


def make_page(document: dict[str, Any]) -> str:
    """docs/quantization.md."""
    results = document["results"]
    lines = [
        "# What quantization costs the sample model",
        "",
        "Made by `scripts/bench_quantization.py`. Bits per byte are of `sample/heldout.txt`, by the cpu engine, whose",
        "kernels round activations to 8 bits; the change is against fp32. The error is that of the experts' weights,",
        "root mean square over root mean square. Embedding and head are int8 in all but fp32.",
        "",
        "| weights | bits per byte | change | error | size |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        error = result["relative_errors"].get("experts")
        cells = [
            _variant_of(result).describe(),
            f"{result['bits_per_byte']:.4f}",
            "" if result["weights"] == "fp32" else f"{_change(result, results):+.2%}",
            "" if error is None else f"{error:.2%}",
            f"{result['bytes'] / 2**20:.1f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What is asked of it:", ""]
    lines += [f"- {what}: {'met' if met else 'not met'}" for what, met in check_bars(results)]
    return "\n".join([*lines, "", f"moedge {document['moedge']}, {document['date']}.", ""])


if __name__ == "__main__":
    sys.exit(main())
