"""Manifests of models that nobody exported, with sizes counted here: for tests of fit, prediction and report."""

from __future__ import annotations

from typing import Any

# With a scale, fp32, of int6 fp16, of int4 a byte, and, but for int6, a zero point a group.
BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8 + 40 / 128, "int6": 6 + 16 / 128, "int4": 4 + 12 / 128}
DTYPES = {"fp32": "float32", "fp16": "float16", "int8": "uint8", "int6": "uint6", "int4": "uint4"}


def deepseek_v2_lite(weights: str = "int4", head: str = "int8") -> dict[str, Any]:
    """DeepSeek-V2-Lite's published shape: 27 layers, the first dense, 64 experts of 1408 with 6 a token, 2 shared.

    `head`: where weights are int4.
    """
    hidden, layers, experts = 2048, 27, 64
    attention = hidden * 16 * 192 + hidden * 576 + 16 * 512 * (128 + 128) + 16 * 128 * hidden
    counts = {
        "embedding": 102400 * hidden,
        "norm": (2 * layers + 1) * hidden + layers * 512,
        "attention": layers * attention,
        "dense_mlp": 3 * hidden * 10944,
        "router": 26 * experts * hidden,
        "shared_experts": 26 * 3 * hidden * 2816,
        "experts": 26 * experts * 3 * hidden * 1408,
        "head": 102400 * hidden,
    }
    dtypes = dict.fromkeys(counts, weights) | {"norm": "fp32", "router": "fp32"}
    if weights == "int4":
        dtypes |= {"embedding": "int8", "head": head}
    return {
        "format": 1,
        "model": {
            "name": "DeepSeek-V2-Lite",
            "family": "deepseek_v2",
            "parameters": sum(counts.values()),
            "active_parameters": sum(counts.values()) - counts["experts"] * 58 // 64,
        },
        "config": {
            "vocab_size": 102400,
            "hidden_size": hidden,
            "intermediate_size": 10944,
            "num_hidden_layers": layers,
            "max_position_embeddings": 163840,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 192,
            "attention": {
                "kind": "mla",
                "num_heads": 16,
                "q_lora_rank": None,
                "kv_lora_rank": 512,
                "qk_nope_head_dim": 128,
                "qk_rope_head_dim": 64,
                "v_head_dim": 128,
            },
            "moe": {
                "layers": list(range(1, layers)),
                "num_experts": experts,
                "num_experts_per_tok": 6,
                "intermediate_size": 1408,
                "shared_intermediate_size": 2816,
            },
        },
        "quantization": {
            "weights": weights,
            "group_size": 128,
            "classes": {name: {"dtype": DTYPES[dtype], "group_size": 128} for name, dtype in dtypes.items()},
        },
        "sizes": {name: round(count * BITS[dtypes[name]] / 8) for name, count in counts.items()},
        "cache": [entry for i in range(layers) for entry in _latent(i)],
        "files": {
            "model.onnx": {"bytes": 400_000, "sha256": "0" * 64},
            "weights.bin": {"bytes": 9_000_000_000, "sha256": "0" * 64},
        },
    }


def _latent(layer: int) -> list[dict[str, Any]]:
    return [{"name": f"latent.{layer}", "width": 512}, {"name": f"rope.{layer}", "width": 64}]


def olmoe() -> dict[str, Any]:
    """OLMoE-1B-7B's published shape at int4: 16 layers, all sparse, 64 experts of 1024, 8 a token, 16 heads."""
    hidden, layers = 2048, 16
    counts = {
        "embedding": 50304 * hidden,
        "norm": (4 * layers + 1) * hidden,
        "attention": layers * 4 * hidden * hidden,
        "router": layers * 64 * hidden,
        "experts": layers * 64 * 3 * hidden * 1024,
        "head": 50304 * hidden,
    }
    bits = dict.fromkeys(counts, BITS["int4"]) | {"norm": 32.0, "router": 32.0}
    return {
        "format": 1,
        "model": {"name": "OLMoE-1B-7B", "family": "olmoe"},
        "config": {
            "vocab_size": 50304,
            "hidden_size": hidden,
            "intermediate_size": 1024,
            "num_hidden_layers": layers,
            "max_position_embeddings": 4096,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "attention": {"kind": "gqa"},
            "moe": {
                "layers": list(range(layers)),
                "num_experts": 64,
                "num_experts_per_tok": 8,
                "intermediate_size": 1024,
                "shared_intermediate_size": 0,
            },
        },
        "quantization": {"weights": "int4", "group_size": 128, "classes": {}},
        "sizes": {name: round(count * bits[name] / 8) for name, count in counts.items()},
        "cache": [{"name": f"{kind}.{i}", "width": 2048} for i in range(layers) for kind in ("key", "value")],
        "files": {},
    }
