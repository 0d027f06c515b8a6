"""Hold `moedge estimate` against `moedge bench` on this machine's CPU, and against published rates: docs/estimates.md.

    python scripts/check_estimate.py --work FOLDER -o docs/estimates.md [--processor-time]

Each shape below is written with random weights (2 GB at most at a time), exported at int4, built for the CPU, measured
and predicted from the memory bandwidth of the same run. FITTED are what the assumptions in profiles/estimate.py were
chosen on; CHECKED are not. Every number on the page is this script's.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from synthetic_checkpoint import SHAPES, write_checkpoint

import moedge
from moedge.bundle import Bundle, write_json
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.layout import plan_layout
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import ASSUMPTIONS, estimate
from moedge.runtime.bench import bench

GOAL = 0.25
PROMPT_TOKENS, NEW_TOKENS, REPEAT = 256, 64, 5

_ROPE = {"rope_theta": 10000.0, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
_GQA = {**_ROPE, "attention_bias": False, "tie_word_embeddings": False, "vocab_size": 16384}
_MLA = {
    **_GQA, "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "q_lora_rank": None,
    "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "first_k_dense_replace": 1, "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip
_OLMOE = {**_GQA, "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "norm_topk_prob": False}
_QWEN3 = {**_GQA, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True,
          "decoder_sparse_step": 1, "mlp_only_layers": []}  # fmt: skip
_MIXTRAL = {**_GQA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}


def shape(base: dict[str, Any], hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**base, **sizes, "num_key_value_heads": kv_heads, **more}


FITTED = {
    "OLMoE, small": shape(_OLMOE, 256, 12, 4, 4, intermediate_size=128, num_experts=8, num_experts_per_tok=2),
    "DeepSeek-V3, small": shape(
        _MLA, 256, 12, 4, 4, intermediate_size=512, moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=2
    ),
    "Qwen3-MoE, wide": shape(
        _QWEN3, 1536, 4, 12, 4, head_dim=128, intermediate_size=1024, moe_intermediate_size=1024, num_experts=16,
        num_experts_per_tok=4,
    ),
    "DeepSeek-V3, wide": shape(
        _MLA, 1536, 4, 12, 12, intermediate_size=4096, moe_intermediate_size=1024, n_routed_experts=16,
        num_experts_per_tok=4,
    ),
}  # fmt: skip
CHECKED = {
    "OLMoE, 6 layers": shape(_OLMOE, 1280, 6, 10, 10, intermediate_size=768, num_experts=24, num_experts_per_tok=6),
    "DeepSeek-V3, 8 layers": shape(
        _MLA, 1024, 8, 8, 8, intermediate_size=2816, moe_intermediate_size=512, n_routed_experts=32,
        num_experts_per_tok=6,
    ),
    "Qwen3-MoE, 10 layers": shape(
        _QWEN3, 768, 10, 12, 2, head_dim=64, intermediate_size=512, moe_intermediate_size=512, num_experts=32,
        num_experts_per_tok=4,
    ),
    "Mixtral, 5 layers": shape(
        _MIXTRAL, 1024, 5, 16, 4, intermediate_size=2048, num_local_experts=8, num_experts_per_tok=2
    ),
}  # fmt: skip

# Published decode rates at batch 1 (tokens/s) of shapes whose config is known; other engines than ours.
PUBLISHED: tuple[tuple[str, str, str, float, str], ...] = (
    ("deepseek-v2-lite", "rtx3090", "about 180", 180.0, "llama.cpp, Q4_0"),
    ("qwen3-30b-a3b", "rtx4090", "up to 196", 196.0, "blogs, 4 bit; weak"),
    ("qwen3-30b-a3b", "jetson-thor", "81", 81.0, "TensorRT Edge-LLM 0.7, int4"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and bundles")
    parser.add_argument("-o", "--output", type=Path, help="write the page there; default: print it")
    parser.add_argument("--threads", type=int, help="default: the physical cores")
    parser.add_argument("--repeat", type=int, default=REPEAT, help=f"default: {REPEAT}")
    parser.add_argument("--processor-time", action="store_true", help="one thread by its own time: on a busy machine")
    parser.add_argument("--only", metavar="TEXT", help="only shapes whose name holds this")
    args = parser.parse_args(arguments)
    rows: dict[str, list[dict[str, Any]]] = {"fitted": [], "checked": []}
    for kind, shapes in (("fitted", FITTED), ("checked", CHECKED)):
        for name, config in shapes.items():
            if args.only is None or args.only in name:
                rows[kind].append(measure(name, config, args))
                say(rows[kind][-1])
    write_json(args.work / "rows.json", rows)
    page = render(rows, [published(*each) for each in PUBLISHED], describe(args))
    if args.output is None:
        print(page)
    else:
        args.output.write_text(page, encoding="utf-8")
    return 0


def measure(name: str, config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One shape measured and predicted; the bundle is kept in the work folder and used again."""
    folder = args.work / name.lower().replace(", ", "-").replace(" ", "-")
    if not (folder / "bundle" / "engines" / "cpu").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(config, folder / "checkpoint")
        moedge.export(folder / "checkpoint", folder / "bundle", weights="int4", verify=False)
        moedge.build(folder / "bundle", "cpu")
        shutil.rmtree(folder / "checkpoint")
    bundle = Bundle.open(folder / "bundle")
    measured = processor_time(bundle, args.repeat) if args.processor_time else wall_time(bundle, args)
    device = load_profile("cpu").with_bandwidth(measured["bandwidth"], "measured in the same run")
    share = measured["threads"] / (device.cores or 1)
    flops = {precision: rate * share for precision, rate in device.flops.items()}
    device = replace(device, cores=measured["threads"], flops=flops)
    predicted = estimate(bundle.manifest, device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    return {"name": name, "measured": measured, "predicted": predicted}


def wall_time(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """What `moedge bench` says: of the repeats the fastest, for other work only slows; of its tokens the median."""
    counts = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    result = bench(bundle, "cpu", repeat=args.repeat, threads=args.threads, **counts)
    spread = result["spread"]
    return {
        "itl_ms": spread["itl_p50_ms"]["min"],
        "ttft_ms": spread["ttft_ms"]["min"],
        "bandwidth": result["bandwidth_limit_bytes_per_s"],
        "threads": result["threads"],
    }


def processor_time(bundle: Bundle, repeat: int) -> dict[str, Any]:
    """The same by the processor's time of one thread, which waiting for a core on a shared machine does not lengthen.

    Contention for memory and caches still does, so the tokens' tenth percentile counts.
    """
    itl, ttft = [], []
    token, row = np.zeros(1, np.int64), np.zeros(1, np.int64)
    with moedge.load(bundle, "cpu", threads=1) as engine:
        prompt = np.random.default_rng(0).integers(0, engine.info.vocab_size, PROMPT_TOKENS)
        for _ in range(repeat):
            session = engine.begin()
            began = time.process_time()
            token[0] = engine.prefill(prompt).argmax()
            ttft.append(time.process_time() - began)
            for _ in range(NEW_TOKENS - 1):
                began = time.process_time()
                token[0] = session.step(token, row).argmax()
                itl.append(time.process_time() - began)
    buffer = np.ones(64 << 20, np.int32)
    sweeps = []
    for _ in range(2 * repeat):
        began = time.process_time()
        np.maximum.reduce(buffer)
        sweeps.append(time.process_time() - began)
    return {
        "itl_ms": 1e3 * float(np.percentile(itl, 10)),
        "ttft_ms": 1e3 * min(ttft),
        "bandwidth": buffer.nbytes / min(sweeps),
        "threads": 1,
    }


def published(shape_name: str, profile: str, told: str, rate: float, source: str) -> dict[str, Any]:
    """A published rate beside the prediction for the shape at int4."""
    config = json.loads(SHAPES.read_text(encoding="utf-8"))[shape_name]
    result = estimate(plan_manifest(shape_name, config), load_profile(profile), prompt_tokens=512, new_tokens=64)
    return {"name": shape_name, "profile": profile, "told": told, "rate": rate, "source": source, "predicted": result}


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
    }


def say(row: dict[str, Any]) -> None:
    rate, ttft = 1e3 / row["measured"]["itl_ms"], row["measured"]["ttft_ms"]
    guess = row["predicted"]
    told = f"decode {rate:,.1f} measured, {guess['decode_tokens_per_s']:,.1f} predicted ({error(row):+.0%})"
    print(f"{row['name']}: {told}; TTFT {ttft:,.1f} and {guess['ttft_ms']['p50']:,.1f} ms", file=sys.stderr)


def error(row: dict[str, Any]) -> float:
    """Predicted decode rate over the measured one, less one."""
    return float(row["predicted"]["decode_tokens_per_s"] * row["measured"]["itl_ms"] / 1e3 - 1)


def describe(args: argparse.Namespace) -> str:
    """How the run was made."""
    created = datetime.datetime.now(datetime.timezone.utc).date()
    device = load_profile("cpu")
    how = (
        "one thread by its own processor time, since the machine had other work; the tokens' tenth percentile, the "
        "fastest of the prompts"
        if args.processor_time
        else f"{args.threads or device.cores} threads; of {args.repeat} repeats the fastest, of its tokens the median"
    )
    version = importlib.metadata.version("onnxruntime")
    return f"{created}, {device.title}, onnxruntime {version}, {how}"


def render(rows: dict[str, list[dict[str, Any]]], rates: list[dict[str, Any]], how: str) -> str:
    """The page."""
    within = sum(abs(error(row)) <= GOAL for row in rows["checked"])
    lines = [
        "# Estimates against measurements",
        "",
        f"Written by `scripts/check_estimate.py`, every figure from its run: {how}.",
        f"{PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, random weights at int4. The prediction knows the shape "
        "and the memory bandwidth of the same run.",
        "",
        f"**On shapes not fitted to, {within} of {len(rows['checked'])} decode rates are predicted "
        f"within {GOAL:.0%}.** A positive error is a prediction that is too fast.",
        "",
    ]
    for title, kind in (("Not fitted to", "checked"), ("What the assumptions were chosen on", "fitted")):
        lines += [f"## {title}", "", *_table(rows[kind]), ""]
    said = "Decoding at batch 1. Other engines than ours, so only the order is asked for."
    lines += ["## Published rates", "", said, "", *_published_table(rates)]
    lines += ["", "## Assumptions", ""]
    lines += [f"- `{kind}`: {assumed.source}." for kind, assumed in ASSUMPTIONS.items()]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = "shape|read a token|bandwidth|decode tokens/s, measured|predicted|error|band holds it"
    head += "|TTFT ms, measured|predicted|error"
    lines = [f"| {' | '.join(head.split('|'))} |", f"| --- |{' ---: |' * head.count('|')}"]
    for row in rows:
        real, guess = row["measured"], row["predicted"]
        rate, ttft = 1e3 / real["itl_ms"], real["ttft_ms"]
        held = guess["itl_ms"]["low"] <= 1e3 / rate <= guess["itl_ms"]["high"]
        cells = [
            row["name"],
            f"{guess['bytes_per_token'] / 2**20:.1f} MiB",
            f"{real['bandwidth'] / 1e9:.1f} GB/s",
            f"{rate:.1f}",
            f"{guess['decode_tokens_per_s']:.1f}",
            f"{error(row):+.0%}",
            "yes" if held else "no",
            f"{ttft:.1f}",
            f"{guess['ttft_ms']['p50']:.1f}",
            f"{guess['ttft_ms']['p50'] / ttft - 1:+.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _published_table(rates: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| shape | device | published tokens/s | by | predicted | low to high | error |"]
    lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: |")
    for each in rates:
        guess = each["predicted"]
        low, high = (1e3 / guess["itl_ms"][end] for end in ("high", "low"))
        rate = guess["decode_tokens_per_s"]
        lines.append(
            f"| {each['name']} | {guess['device']} | {each['told']} | {each['source']} | {rate:.0f} | {low:.0f} to "
            f"{high:.0f} | {rate / each['rate'] - 1:+.0%} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
