"""Build small engines of every family and precision, and write down their logs: python scripts/check_engines.py

No GPU is needed (TensorRT for RTX cross-builds), the extras `cpu`, `export`, `rtx` and `eval` are. Random models of the
tests' configurations, one of each family, in int4, int8, fp16 and, where the GPU has it, fp8, for SM80 and SM89;
docs/engines.md gets a row for each. Exit status 1 where an engine stores its weights more than 3% above the network's
own, or writes an expert's matrix out while decoding.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import explain_missing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from family_cases import FAMILIES, make_model, save_model  # noqa: E402

import moedge  # noqa: E402
from moedge.bundle import Bundle  # noqa: E402
from moedge.errors import MoedgeError  # noqa: E402
from moedge.profiles.build import build  # noqa: E402

OUT = ROOT / "docs" / "engines.md"
PROFILES = {"SM89": "rtx4090", "SM80": "a100-80gb"}
PRECISIONS = ("int4", "int8", "fp16", "fp8")
WITHOUT_FP8 = ("SM80",)
WIDE = {"hidden_size": 128, "vocab_size": 512}
MOST = 0.03
CONFIGURATIONS = {
    "deepseek": "every_second_layer_top_1_no_shared",
    "deepseek_v2": "greedy_first_dense",
    "deepseek_v3": "many_groups",
    "gpt_oss": "alternate_windows",
    "granitemoe": "multipliers",
    "mixtral": "odd_experts_short_window",
    "olmoe": "odd_experts_normalized_biases_mqa",
    "phimoe": "plain_norms",
    "qwen2_moe": "one_layer_dense",
    "qwen3_moe": "normalized_mqa",
}
_HEADING = """\
# Engines of every family, by their build logs

Written by `python scripts/check_engines.py` on {date}, with {package} {version}, without a GPU. Random models of
{hidden} channels and 512 tokens of vocabulary, context {length}, {lanes}. *Weights*: what the log says is
stored, against the network's own, which counts each matrix once however many profiles read it. *Written out*:
kernels that write an expert's matrix in floating point, in a step of one token{step} and in a prompt's chunk.
*Differs*: the network in float32 from the canonical graph on onnxruntime, over the largest logit; fp8 is made from
int4, and there the canonical graph has the same rounded weights.

| family | precision | GPU | weights | written out, step | written out, chunk | kernels, step | differs |
| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |
"""


def export(family: str, weights: str, folder: Path) -> Bundle:
    seed, settings = FAMILIES[family].configurations[CONFIGURATIONS[family]]
    FAMILIES[family].configurations["wide"] = (seed, {**settings, **WIDE})
    save_model(make_model(family, "wide"), family, folder / "checkpoint")
    return moedge.export(folder / "checkpoint", folder / "bundle", weights=weights, group_size=16, verify=False)


def check(bundle: Bundle, profile: str, precision: str, length: int, lanes: int) -> dict[str, Any]:
    """The session part of engine.json."""
    fp8 = "fp8" if precision == "fp8" else None
    folder = build(bundle.path, profile, max_seq_len=length, max_batch=lanes, precision=fp8)
    session: dict[str, Any] = json.loads((folder / "engine.json").read_text())["session"]
    return session


def row_of(family: str, precision: str, gpu: str, session: dict[str, Any]) -> tuple[str, bool]:
    """A line of the table, and whether it is as it must be."""
    memory = session["memory"]
    ratio = memory["weights_bytes"] / session["network_weights_bytes"] - 1.0
    one, chunk, *steps = memory["materialized_matrices"]
    written = max([one, *steps])
    kernels, differs = memory["kernels"][0], session["numerics"]["difference"]
    line = f"| {family} | {precision} | {gpu} | {ratio:+.2%} | {written} | {chunk} | {kernels} | {differs:.0e} |"
    return line, abs(ratio) <= MOST and written == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", action="append", choices=sorted(CONFIGURATIONS), help="only these; no table")
    parser.add_argument("--max-batch", type=int, default=2)
    parser.add_argument("--max-seq-len", type=int, default=128)
    arguments = parser.parse_args()
    explain_missing.need("torch", "transformers", "onnx", "onnxruntime", "safetensors", "tensorrt_rtx")
    rows, good = [], True
    for family in arguments.family or CONFIGURATIONS:
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory(prefix="moedge-engines-") as scratch:
                bundle = export(family, "int4" if precision == "fp8" else precision, Path(scratch))
                for gpu, profile in PROFILES.items():
                    if precision == "fp8" and gpu in WITHOUT_FP8:
                        continue
                    began = time.monotonic()
                    try:
                        session = check(bundle, profile, precision, arguments.max_seq_len, arguments.max_batch)
                        row, fine = row_of(family, precision, gpu, session)
                    except MoedgeError as error:
                        row, fine = f"| {family} | {precision} | {gpu} | not built: {error} | | | | |", False
                    print(row, f"({time.monotonic() - began:.0f} s)" + ("" if fine else " WRONG"), flush=True)
                    rows.append(row)
                    good = good and fine
    if not arguments.family:
        write(rows, arguments.max_seq_len, arguments.max_batch)
    return 0 if good else 1


def write(rows: list[str], length: int, lanes: int) -> None:
    import tensorrt_rtx

    several = lanes > 1
    heading = _HEADING.format(
        date=datetime.date.today().isoformat(),
        package="tensorrt_rtx",
        version=tensorrt_rtx.__version__,
        hidden=WIDE["hidden_size"],
        length=length,
        lanes=f"{lanes} lanes (three profiles)" if several else "one lane (two profiles)",
        step=" (of one sequence or of all lanes)" if several else "",
    )
    OUT.write_text(heading + "\n".join(rows) + "\n", encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    sys.exit(main())
