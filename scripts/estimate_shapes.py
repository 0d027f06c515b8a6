"""Shapes that `moedge estimate` is fitted to and checked on, and how they are measured on this machine's CPU.

Each is written with random weights, exported and built; the bundle is kept in the work folder and used again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from synthetic_checkpoint import write_checkpoint

import moedge
from moedge.bundle import Bundle
from moedge.profiles.device import DeviceProfile, load_profile
from moedge.runtime.bench import bench

PROMPT_TOKENS, NEW_TOKENS = 256, 48
REPEAT, ROUNDS = 2, 3

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
_QWEN2 = {**_GQA, "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": False,
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
    "Qwen3-MoE, tiny": shape(
        _QWEN3, 128, 3, 4, 2, head_dim=32, intermediate_size=64, moe_intermediate_size=64, num_experts=8,
        num_experts_per_tok=2, vocab_size=4096,
    ),
    "Qwen3-MoE, wide": shape(
        _QWEN3, 1536, 4, 12, 4, head_dim=128, intermediate_size=1024, moe_intermediate_size=1024, num_experts=16,
        num_experts_per_tok=4,
    ),
    "DeepSeek-V3, wide": shape(
        _MLA, 1536, 4, 12, 12, intermediate_size=4096, moe_intermediate_size=1024, n_routed_experts=16,
        num_experts_per_tok=4,
    ),
    "Qwen2-MoE, 6 layers": shape(
        _QWEN2, 512, 6, 8, 8, intermediate_size=1024, moe_intermediate_size=384, shared_expert_intermediate_size=1024,
        num_experts=16, num_experts_per_tok=4,
    ),
    "OLMoE, 4 wide layers": shape(
        _OLMOE, 2048, 4, 16, 16, intermediate_size=1024, num_experts=32, num_experts_per_tok=8, vocab_size=32768
    ),
    "Mixtral, 3 layers": shape(
        _MIXTRAL, 768, 3, 12, 4, intermediate_size=3072, num_local_experts=4, num_experts_per_tok=2, vocab_size=32768
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


def prepare(name: str, config: dict[str, Any], work: Path, weights: str = "int4") -> Bundle:
    """The shape's bundle with its engine for this machine, made where it is not there yet."""
    folder = work / f"{name.lower().replace(', ', '-').replace(' ', '-')}-{weights}"
    if not (folder / "bundle" / "moedge.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(config, folder / "checkpoint")
        moedge.export(folder / "checkpoint", folder / "bundle", weights=weights, verify=False)
        shutil.rmtree(folder / "checkpoint")
    moedge.build(folder / "bundle", "cpu")  # anew each time, in a second: the engine is this version's
    return Bundle.open(folder / "bundle")


@dataclass(frozen=True)
class Case:
    """What is measured of a shape: PROMPT_TOKENS behind `context` tokens, then NEW_TOKENS, of `batch` sequences."""

    name: str
    weights: str = "int4"
    context: int = 0
    batch: int = 1


def measure_all(
    shapes: dict[str, dict[str, Any]], cases: Sequence[Case], work: Path, threads: int | None, rounds: int
) -> list[dict[str, Any]]:
    """A row a case: the fastest of the runs of all rounds, for other work only slows; of its tokens the median.

    A round goes over all cases, so that other work does not meet all runs of one.
    """
    bundles = {key: prepare(key[0], shapes[key[0]], work, key[1]) for key in {(one.name, one.weights) for one in cases}}
    found: dict[Case, dict[str, Any]] = {}
    for turn in range(rounds):
        for case in cases:
            row = measure(bundles[case.name, case.weights], case, threads)
            best = found.setdefault(case, row)
            least = {key: min(best[key], row[key]) for key in ("itl_ms", "ttft_ms")}
            found[case] = row | least | {"bandwidth": max(best["bandwidth"], row["bandwidth"])}
            say(f"round {turn + 1} of {rounds}: {case}: {row['itl_ms']:.3f} ms, {row['ttft_ms']:.1f} ms")
    return [found[case] for case in cases]


def measure(bundle: Bundle, case: Case, threads: int | None) -> dict[str, Any]:
    """One `moedge bench`, the fastest of its repeats."""
    counts = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "context": case.context, "batch": case.batch}
    result = bench(bundle, "cpu", repeat=REPEAT, threads=threads, **counts)
    return {
        "name": case.name,
        "weights": case.weights,
        "context_tokens": case.context,
        "batch": case.batch,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "itl_ms": result["spread"]["itl_p50_ms"]["min"],
        "ttft_ms": result["spread"]["ttft_ms"]["min"],
        "bandwidth": result["bandwidth_limit_bytes_per_s"],
        "threads": result["threads"],
        "kernels": result["kernels"],
        # But for the files' digests all that an estimate reads.
        "manifest": {**bundle.manifest, "files": {}},
    }


def device_of(row: dict[str, Any]) -> DeviceProfile:
    """This machine with the threads and the bandwidth of a measurement."""
    device = load_profile("cpu").with_bandwidth(row["bandwidth"], "measured in the same run")
    share = row["threads"] / (device.cores or 1)
    flops = {precision: rate * share for precision, rate in device.flops.items()}
    return replace(device, cores=row["threads"], flops=flops)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
