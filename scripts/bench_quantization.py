"""Measure what each quantization costs the sample model: python scripts/bench_quantization.py [--threads N]

Each is exported with the parity check, run by the cpu engine and scored on sample/heldout.txt as `moedge eval` does.
gptq calibrates with pieces of this Python's standard library, none of them from held-out files. The results go to
docs/quantization.json, and docs/quantization.md is made from them. The status is 1 where the quality bar is not met.
`--planes` measures anew only what a head in planes costs (head_planes.py), and writes the page with what else is known.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
from check_estimate import plan_manifest
from head_planes import measure_planes, planes_section
from synthetic_checkpoint import read_shape

import moedge
from moedge.export.options import HEAD, HEAD_CHOICES
from moedge.export.quantization import gptq
from moedge.profiles.shape import bytes_per_token
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
    head: str = HEAD  # where weights are int4

    def describe(self) -> str:
        if self.weights == "fp32":
            return "fp32"
        group = "by channel" if self.group_size == CHANNEL else f"group {self.group_size}"
        more = ", zero points" * self.zero_points + f", {self.head} head" * (self.head != HEAD)
        return f"{self.weights} {self.algorithm}, {group}{more}"


VARIANTS = [
    Variant("fp32"),
    Variant("int8"),
    Variant("int8", "hqq", CHANNEL),
    *(Variant("int4", name, group) for name in ("rtn", "hqq", "gptq") for group in (32, 64, 128)),
    *(Variant("int4", name, 128, zero_points=True) for name in ("rtn", "hqq", "gptq")),
    *(Variant("int4", name, CHANNEL) for name in ("rtn", "gptq")),
    *(
        Variant("int4", name, group, head=head)
        for head in HEAD_CHOICES
        if head != HEAD
        for name in ("rtn", "hqq", "gptq")
        for group in (32, 64, 128)
    ),
]
# (title, shape, layers of it) of models whose heads are large and small beside what else is read.
SHOWN = (
    ("OLMoE-1B-7B", "olmoe-1b-7b", None),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b", None),
    ("the latter's first 12 layers", "qwen3-30b-a3b", 12),
)
RTN_32 = Variant("int4", "rtn", 32)
NARROW_HEADS = ("int6", "int4")
FREE_HEAD = 0.05
GOOD_128 = [Variant("int4", name, 128, zero) for name in ("hqq", "gptq") for zero in (False, True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads that compute (default: physical cores)")
    parser.add_argument("--planes", action="store_true", help="only the head in planes")
    arguments = parser.parse_args()
    known = PAGE.with_suffix(".json")
    with tempfile.TemporaryDirectory(prefix="bench-quantization-") as folder:
        calibration = write_calibration(Path(folder) / "calibration.txt")
        results = json.loads(known.read_text())["results"] if arguments.planes else []
        for variant in () if arguments.planes else VARIANTS:
            results.append(measure(variant, calibration, Path(folder), arguments.threads))
            print(f"{variant.describe()}: {results[-1]['bits_per_byte']:.4f} bits per byte", file=sys.stderr)
        text = (SAMPLE / "heldout.txt").read_text(encoding="utf-8")
        planes = measure_planes(text, SAMPLE, Path(folder), calibration)
    document = {"date": datetime.date.today().isoformat(), "moedge": moedge.__version__, "results": results}
    document["planes"] = planes
    known.write_text(json.dumps(document, indent=1) + "\n")
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


def measure(variant: Variant, calibration: Path, folder: Path, threads: int | None) -> dict[str, Any]:
    """Export, build and score one variant, beside the fp32 bundle where that is another."""
    options: dict[str, Any] = {"calibration": calibration} if variant.algorithm == "gptq" else {}
    bundle, plain = folder / "bundle", folder / "fp32"
    if variant.weights == "fp32":
        bundle = plain
    elif variant.weights == "int4":
        options["head"] = variant.head
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
        against = {} if bundle == plain else {"against": plain}
        scored = evaluate(bundle, text, "cpu", text_name="heldout.txt", threads=threads, progress=progress, **against)
    near = scored["against"] or {"kl_nats": {"mean": 0.0}, "top1_agreement": 1.0}
    classes = exported.manifest["quantization"]["classes"]
    return {
        **vars(variant),
        "bits_per_byte": scored["bits_per_byte"],
        "scored_tokens": scored["scored_tokens"],
        "kl_nats": near["kl_nats"]["mean"],
        "top1_agreement": near["top1_agreement"],
        "bytes": sum(exported.manifest["sizes"].values()),
        "head_bytes": exported.manifest["sizes"]["head"],
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


def judge_heads(results: list[dict[str, Any]], head: str) -> tuple[str, bool]:
    """Whether a head of so few bits is so nearly free that it should be the default; bits per byte have more chance."""
    found = [each for each in compare_heads(results, head) if each.group_size == 128]
    told = ", ".join(f"{each.algorithm} {each.spread:.0%}" for each in found)
    bar = f"{head}: at group 128 it adds at most {FREE_HEAD:.0%} of the divergence ({told})"
    return bar, all(each.spread <= FREE_HEAD for each in found)


@dataclass(frozen=True)
class Heads:
    """The same int4 weights with a head of 8 bits and a narrower one.

    `added`, `spread`: what the narrower one costs in bits per byte and in divergence, as a share of all else's cost.
    """

    algorithm: str
    group_size: int
    wide: dict[str, Any]
    narrow: dict[str, Any]
    added: float
    spread: float


def compare_heads(results: list[dict[str, Any]], head: str) -> list[Heads]:
    by_variant = {_variant_of(result): result for result in results}
    found = []
    for variant, wide in by_variant.items():
        narrow = by_variant.get(replace(variant, head=head))
        if variant.weights == "int4" and variant.head == "int8" and narrow is not None:
            costs = [_change(result, results) for result in (wide, narrow)]
            added = (costs[1] - costs[0]) / costs[0]
            spread = narrow["kl_nats"] / wide["kl_nats"] - 1
            found.append(Heads(variant.algorithm, variant.group_size, wide, narrow, added, spread))
    return found


def head_share(shape: str, layers: int | None) -> float:
    """Of the bytes of weights that a token reads of a published shape at int4, if the head is int8."""
    manifest = plan_manifest(shape, read_shape(shape, layers))
    config = manifest["config"]
    head = config["vocab_size"] * config["hidden_size"] * (1 + 4 / 128)
    return float(head / (bytes_per_token(manifest, 0) - manifest["sizes"]["head"] + head))


def _variant_of(result: dict[str, Any]) -> Variant:
    return Variant(*(result[key] for key in ("weights", "algorithm", "group_size", "zero_points", "head")))


def _change(result: dict[str, Any], results: list[dict[str, Any]]) -> float:
    """Relative to fp32's bits per byte."""
    plain = next(other["bits_per_byte"] for other in results if other["weights"] == "fp32")
    return float(result["bits_per_byte"] / plain - 1)


def _about_calibration() -> list[str]:
    """What gptq reads, from its own constants."""
    most = gptq.SEQUENCES * gptq.LENGTH
    return [
        "gptq alone reads a text, `--calibration FILE`, and is refused without one; rtn and hqq need none. It takes",
        f"the file's first {most:,} tokens, in pieces of {gptq.LENGTH}; what follows is not read. An expert that",
        f"gets fewer than {gptq.MIN_TOKENS} of them is quantized by hqq: `moedge inspect --json` lists those under",
        "`provenance.notes`. Good is plain UTF-8 text like what the model will read and write, in its languages, kinds",
        "and formats (of a chat model with the chat template's marks): short pieces out of many documents rather than",
        "one long one, and nothing of what the result is judged by. The rows below were made with",
        f"{PIECES} pieces of {PIECE_BYTES:,} bytes out of the standard library's files, held-out ones left out.",
    ]


def make_page(document: dict[str, Any]) -> str:
    """docs/quantization.md."""
    results = document["results"]
    lines = [
        "# What quantization costs the sample model",
        "",
        "Made by `scripts/bench_quantization.py`. Bits per byte are of `sample/heldout.txt`, by the cpu engine, whose",
        "kernels round activations to 8 bits; the change is against fp32, and so are the divergence (of the next",
        "token's probabilities, in nats: the mean) and the share of tokens with the same most likely next one. The",
        "error is that of the experts' weights, root mean square over root mean square. The embedding is int8 in all",
        f"but fp32; the head is {HEAD} where weights are int4. `moedge export --algorithm` takes rtn, hqq or gptq.",
        "",
        *_about_calibration(),
        "",
        "| weights | bits per byte | change | KL divergence | same token | error | size |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        if result["head"] == HEAD:
            lines.append(_row(result, results))
    lines += ["", "What is asked of it:", ""]
    lines += [f"- {what}: {'met' if met else 'not met'}" for what, met in check_bars(results)]
    lines += ["", *_head_section(results)]
    lines += ["", *planes_section(document["planes"])]
    return "\n".join([*lines, "", f"moedge {document['moedge']}, {document['date']}.", ""])


def _row(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    error, plain = result["relative_errors"].get("experts"), result["weights"] == "fp32"
    cells = [
        _variant_of(result).describe(),
        f"{result['bits_per_byte']:.4f}",
        *(["", "", ""] if plain else [f"{_change(result, results):+.2%}", *_nearness(result)]),
        "" if error is None else f"{error:.2%}",
        f"{result['bytes'] / 2**20:.1f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def _nearness(result: dict[str, Any]) -> list[str]:
    return [f"{result['kl_nats']:.4f}", f"{result['top1_agreement']:.1%}"]


def _head_section(results: list[dict[str, Any]]) -> list[str]:
    shares = ", ".join(f"{head_share(*shape):.0%} in {title}" for title, *shape in SHOWN)
    lines = [
        "## A head of fewer bits",
        "",
        "A token reads the whole head, and of the experts only its own. Of the weights that it reads, a head of 8 bits",
        f"is {shares}.",
        "`moedge export --head` takes int8, int6 and int4. Added: what the fewer bits cost, as a share of what 4 bits",
        "everywhere else cost.",
        "",
        "| weights | head | change | added | KL divergence | added | same token |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    by_head = [compare_heads(results, head) for head in NARROW_HEADS]
    for pair in zip(*by_head, strict=True):
        name = replace(_variant_of(pair[0].wide), head=HEAD).describe()
        rows = [(pair[0].wide, "", ""), *((each.narrow, f"{each.added:+.0%}", f"{each.spread:+.0%}") for each in pair)]
        for result, added, spread in rows:
            divergence, same = _nearness(result)
            cells = [name, result["head"], f"{_change(result, results):+.2%}", added, divergence, spread, same]
            lines.append(f"| {' | '.join(cells)} |")
            name = ""
    lines += ["", "What is asked of one to be the default:", ""]
    judged = [judge_heads(results, head) for head in NARROW_HEADS]
    return [*lines, *(f"- {what}: {'met' if met else 'not met'}" for what, met in judged)]


if __name__ == "__main__":
    sys.exit(main())
