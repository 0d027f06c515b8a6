"""The model card of the sample model, written from training.json alone: no number in it is typed by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUANTIZED = ("int8", "int4")


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [" | ".join(head), " | ".join("---" if i == 0 else "---:" for i in range(len(head)))]
    lines += [" | ".join(str(cell) for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def front(facts: dict[str, Any]) -> str:
    config = facts["config"]
    return f"""\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---

# moedge sample model

A small DeepSeek-V3 language model for Python source, distilled from a dense teacher by `scripts/distill.py`. \
It exists so that every step of moedge can be shown and tested on a real trained Mixture of Experts: \
multi-head latent attention, {config["n_routed_experts"]} routed experts of which {config["num_experts_per_tok"]} \
answer for a token, {config["n_shared_experts"]} shared expert, a sigmoid gate with a correction bias. \
transformers' `DeepseekV3ForCausalLM` loads it unchanged. This card is generated from `training.json`."""


def origin(facts: dict[str, Any]) -> str:
    data, versions = facts["data"], facts["versions"]
    folders = ", ".join(f"`{name}`" for name in data["excluded_folders"])
    prefixes = ", ".join(f"`{name}*`" for name in data["excluded_prefixes"])
    return f"""\
## Data and licence

{data["source"]} ({data["licence"]}): {data["train_files"]} files, {data["train_bytes"]:,} bytes, \
{data["train_tokens"]:,} tokens of a byte-level BPE vocabulary of {facts["config"]["vocab_size"]:,}. \
Left out: folders named {folders}; files and folders named {prefixes}.

{data["held_out_files"]} files ({data["held_out_bytes"]:,} bytes), chosen by the hash of their path and the seed, \
were split off before the tokenizer and the models were trained. \
`heldout.txt` ({facts["evaluation"]["heldout_txt_bytes"]:,} bytes) consists of such files behind a notice, \
and stays under the PSF licence. The weights are under this project's licence, Apache-2.0.

Made with seed {facts["seed"]} and preset `{facts["preset"]}` \
on `{facts["device"]}` with {facts["threads"]} threads in {facts["dtype"]}; \
Python {versions["python"]}, torch {versions["torch"]}, transformers {versions["transformers"]}. \
SHA-256 of the text: `{data["sha256"]}`."""


def sizes(facts: dict[str, Any]) -> str:
    names = {"teacher": "teacher (dense)", "student": "student", "undistilled": "student without distillation"}
    rows = [
        (
            label,
            f"{m['parameters']:,}",
            f"{m['active_parameters']:,}",
            m["steps"],
            f"{m['steps'] * m['plan']['batch_tokens']:,}",
            minutes(m["seconds"]),
        )
        for name, label in names.items()
        if (m := facts["models"].get(name))
    ]
    plan = facts["models"]["student"]["plan"]
    head = ("model", "parameters", "active per token", "steps", "tokens seen", "time")
    return f"""\
## Sizes and training

{table(head, rows)}

{facts.get("remark", "")}

The student's loss is {1 - plan["soft_share"]:g} x cross-entropy + {plan["soft_share"]:g} x T^2 x KL from the teacher \
at temperature T = {plan["temperature"]:g}. The student without distillation starts from the same weights and sees \
the same batches in the same order. The load of the experts is balanced by moving the correction bias alone, \
by up to {plan["balance_speed"]:g} a step; there is no auxiliary loss. \
Sequences have {plan["short"]} tokens, and {plan["long"]} in every {plan["long_every"]}th step. \
The weights take {facts["model_bytes"]:,} bytes in bfloat16."""


def figures(facts: dict[str, Any]) -> str:
    models, quantized = facts["models"], facts.get("quantized", {})
    names = {"teacher": "teacher", "student": "student (bfloat16)", "undistilled": "student without distillation"}
    rows: list[Sequence[object]] = [
        (label, f"{bits['held_out_files']:.4f}", f"{bits['heldout_txt']:.4f}")
        for name, label in names.items()
        if (bits := models.get(name, {}).get("bits_per_byte"))
    ]
    rows += [
        (f"student at {kind}", "", f"{quantized[kind]['heldout_txt']:.4f}") for kind in QUANTIZED if kind in quantized
    ]
    evaluation = facts["evaluation"]
    return f"""\
## Held-out bits per byte

{table(("model", "all held-out files", "heldout.txt"), rows)}

Exact: nats of every held-out token over ln 2 over the bytes of the text. Windows of {evaluation["context"]} tokens, \
{evaluation["stride"]} apart; every token is scored once. Lower is better."""


def experts(facts: dict[str, Any]) -> str:
    count = facts["config"]["n_routed_experts"]
    rows = [
        (f"layer {row['layer']}", *(f"{share:.1%}" for share in row["share"]), f"{row['mean_over_max']:.2f}")
        for row in facts["utilization"]
    ]
    head = ("", *(f"expert {i}" for i in range(count)), "mean / max")
    return f"""\
## Expert utilization

Each expert's share of the assignments on the held-out files; {1 / count:.1%} would be even.

{table(head, rows)}"""


def completions(facts: dict[str, Any]) -> str:
    made = facts["completions"]
    shown = "\n\n".join(
        f"{kind.capitalize()}:\n\n```python\n{row['prompt']}⟨{row[kind].rstrip()}⟩\n```"
        for row in made["rows"]
        for kind in ("greedy", "sampled")
    )
    return f"""\
## Completions

What the model wrote stands between ⟨ and ⟩. Sampled: temperature {made["temperature"]:g}, top-p {made["top_p"]:g}, \
seed {made["seed"]}.

{shown}"""


def limits(facts: dict[str, Any]) -> str:
    return """\
## Limits

A sample to exercise an exporter and a runtime with, not an assistant: what it writes looks like Python and is rarely \
right. It may repeat parts of the standard library from memory."""


def card(facts: dict[str, Any]) -> str:
    parts = (front, origin, sizes, figures, experts, completions, limits)
    return "\n\n".join(part(facts) for part in parts) + "\n"


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_card(folder: Path) -> Path:
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    write_atomically(folder / "README.md", card(facts))
    return folder / "README.md"
