"""What static expert buckets hold of a GPU's memory, read from build logs; writes a table into docs/devices.md.

    python scripts/bucket_memory.py [--chunk 512 --chunk 1024] [--only-print]

One mixture of DeepSeek-V2-Lite's proportions at a quarter of its widths (64 experts, 6 a token), random int4 weights,
cross-built for SM89 in three forms: buckets of what a capacity factor of 1.25 allows, buckets of the unbalanced worst
case (room for the whole chunk in each), and every expert over every token. A few minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import onnx_ir as ir
from synthetic_checkpoint import read_shape, write_checkpoint

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.export.gating.load_aware import find_capacity
from moedge.export.options import LoadAware
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_build import BuildJob, run_builder
from moedge.profiles.targets._trt_log import read_build_log
from moedge.profiles.targets._trt_network_files import SETTINGS, shape_profiles
from moedge.profiles.targets.tensorrt_network import NetworkForm, lower_network

PAGE = Path(__file__).resolve().parent.parent / "docs" / "devices.md"
BEGIN, END = "<!-- Written by scripts/bucket_memory.py: begin -->", "<!-- end of buckets -->"
BOUND = LoadAware(capacity_factor=1.25)
CHANGES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 352,
    "first_k_dense_replace": 0,
    "vocab_size": 1024,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 128,
    "max_position_embeddings": 4096,
    "rope_scaling": None,
    "n_shared_experts": None,
}
HEADER = """\
| chunk | form | room of an expert | activations of one token | of the chunk | engine's weights over the network's |
| ---: | --- | ---: | ---: | ---: | ---: |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, action="append", help="tokens; default: 512 and 1024")
    parser.add_argument("--only-print", action="store_true", help="leave the page as it is")
    args = parser.parse_args()
    rows = [HEADER]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        config = read_shape("deepseek-v2-lite", 1) | CHANGES
        write_checkpoint(config, folder / "checkpoint")
        worst = dataclasses.replace(BOUND, capacity_factor=config["n_routed_experts"] / config["num_experts_per_tok"])
        for chunk in args.chunk or [512, 1024]:
            sizes = chunk, config["num_experts_per_tok"], config["n_routed_experts"]
            forms = ("bounded", BOUND, True), ("worst case", worst, True), ("dense", BOUND, False)
            for name, setting, buckets in forms:
                room = find_capacity(*sizes, setting.capacity_factor) if buckets else chunk
                rows.append(f"| {chunk} | {name} | {room} {measure(folder, setting, NetworkForm(1, chunk, buckets))}")
                print(rows[-1], flush=True)
    if not args.only_print:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
        table = "\n".join(rows)
        PAGE.write_text(f"{head}\n{table}\n{tail}", encoding="utf-8")


def measure(folder: Path, setting: LoadAware, form: NetworkForm) -> str:
    """Build the network in this form; the cells that its log gives."""
    options: dict[str, Any] = {"weights": "int4", "verify": False, "force": True, "load_aware": setting}
    bundle: Bundle = moedge.export(folder / "checkpoint", folder / "bundle", **options)
    model, config = load_canonical(bundle)
    network = lower_network(model, config, form.chunk, real=ir.DataType.FLOAT16, form=form)
    network.weights.write(folder / network.weights.location)
    network.save(folder, MODEL)
    profiles = shape_profiles(network, form.chunk)
    job = BuildJob("tensorrt_rtx", folder / MODEL, folder, ((8, 9),), profiles, SETTINGS, folder / "failed.log")
    run_builder(job, "building", None)
    log = read_build_log(folder / job.log_name)
    one, many = (f"{size / 2**20:.1f} MiB" for size in log.activation_bytes)
    return f"| {one} | {many} | {100 * ((log.weights_bytes or 0) / network.weights.nbytes - 1):+.1f}% |"


if __name__ == "__main__":
    main()
