"""Write a random GGUF file of a shape, as llama.cpp's quantizer would: python scripts/peers_gguf.py CONFIG.json OUT

Q4_0 for every matrix but the head (Q6_K, what llama-quantize takes for it) and the routers, which stay F32 as do the
norms. Blocks are drawn from one pool of random ones, so no matrix is ever held in memory. Needs the package gguf.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_DEVIATION = 0.02  # of the weights, as models are initialized
_POOL = 1 << 20  # blocks
_SEED = 0
_BYTES = {"Q4_0": 18 / 32, "Q6_K": 210 / 256, "F32": 4.0}  # of a weight, scales included


class Tensor(NamedTuple):
    """A tensor's name, its shape with the output dimension first, and its type as gguf names it."""

    name: str
    shape: tuple[int, ...]
    kind: str = "Q4_0"


def write_gguf(config: dict[str, Any], path: Path) -> None:
    """Write the file for a Hugging Face config of a type in ARCHITECTURES."""
    import gguf

    arch, tensors, fields = ARCHITECTURES[config["model_type"]](config)
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("random")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(gguf.ExpertGatingFuncType(value) if name == "expert_gating_func" else value)
    pools = {kind: _pool(kind) for kind in ("Q4_0", "Q6_K")}
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        shape, dtype = tensor.shape, np.dtype(np.float32)
        if kind != gguf.GGMLQuantizationType.F32:
            shape, dtype = gguf.quant_shape_to_byte_shape(tensor.shape, kind), np.dtype(np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, math.prod(shape) * dtype.itemsize, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(_SEED)
    for tensor in tensors:
        writer.write_tensor_data(_values(tensor, pools, random))
    writer.close()


def bytes_per_token(config: dict[str, Any], context: int) -> int:
    """The fewest bytes that a decode step reads out of such a file and a cache in half precision.

    Every matrix, but of the embedding a row and of the experts those that are chosen; a latent is key and value in one.
    """
    _, tensors, fields = ARCHITECTURES[config["model_type"]](config)
    total = 0.0
    for tensor in tensors:
        size = math.prod(tensor.shape) * _BYTES[tensor.kind]
        if tensor.name == "token_embd.weight" and not config.get("tie_word_embeddings"):
            size /= tensor.shape[0]
        elif "_exps." in tensor.name:
            size *= config["num_experts_per_tok"] / fields["expert_count"]
        total += size
    if "kv_lora_rank" in fields:
        width = fields["key_length"]
    else:
        head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        width = 2 * fields["head_count_kv"] * head
    return round(total + 2 * config["num_hidden_layers"] * width * context)


def _values(tensor: Tensor, pools: dict[str, NDArray[np.uint8]], random: np.random.Generator) -> NDArray[Any]:
    if tensor.kind == "F32":
        if len(tensor.shape) == 1:
            return np.ones(tensor.shape, np.float32)
        return random.normal(0, _DEVIATION, tensor.shape).astype(np.float32)
    pool = pools[tensor.kind]
    per_block = {"Q4_0": 32, "Q6_K": 256}[tensor.kind]
    count = math.prod(tensor.shape) // per_block
    start = int(random.integers(len(pool)))
    return np.resize(np.roll(pool, start, axis=0), (count, pool.shape[1]))


def _pool(kind: str) -> NDArray[np.uint8]:
    """Random blocks: a scale in half precision and random codes (ggml-common.h has the layouts)."""
    random = np.random.default_rng(_SEED)
    if kind == "Q4_0":
        blocks = random.integers(0, 256, (_POOL, 18), np.uint8)
        blocks[:, :2] = np.array([_DEVIATION / 4.6], np.float16).view(np.uint8)
        return blocks
    blocks = random.integers(0, 256, (_POOL // 8, 210), np.uint8)
    blocks[:, 192:208] = random.integers(20, 60, (len(blocks), 16), np.uint8)
    blocks[:, 208:] = np.array([_DEVIATION / 18.5 / 40], np.float16).view(np.uint8)
    return blocks


def _common(config: dict[str, Any]) -> Iterator[Tensor]:
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    tied = config.get("tie_word_embeddings")
    yield Tensor("token_embd.weight", (vocab, hidden), "Q6_K" if tied else "Q4_0")
    yield Tensor("output_norm.weight", (hidden,), "F32")
    if not tied:
        yield Tensor("output.weight", (vocab, hidden), "Q6_K")


def _experts(prefix: str, hidden: int, width: int, count: int) -> Iterator[Tensor]:
    yield Tensor(f"{prefix}.ffn_gate_inp.weight", (count, hidden), "F32")
    yield Tensor(f"{prefix}.ffn_gate_exps.weight", (count, width, hidden))
    yield Tensor(f"{prefix}.ffn_up_exps.weight", (count, width, hidden))
    yield Tensor(f"{prefix}.ffn_down_exps.weight", (count, hidden, width))


def _mlp(prefix: str, hidden: int, width: int, suffix: str = "") -> Iterator[Tensor]:
    yield Tensor(f"{prefix}.ffn_gate{suffix}.weight", (width, hidden))
    yield Tensor(f"{prefix}.ffn_up{suffix}.weight", (width, hidden))
    yield Tensor(f"{prefix}.ffn_down{suffix}.weight", (hidden, width))


def _attention(config: dict[str, Any], prefix: str, head: int, biases: bool = False) -> Iterator[Tensor]:
    """A layer's norms, and queries, keys and values by heads."""
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    yield Tensor(f"{prefix}.attn_norm.weight", (hidden,), "F32")
    yield Tensor(f"{prefix}.ffn_norm.weight", (hidden,), "F32")
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        yield Tensor(f"{prefix}.attn_{name}.weight", (count * head, hidden))
        if biases:
            yield Tensor(f"{prefix}.attn_{name}.bias", (count * head,), "F32")
    yield Tensor(f"{prefix}.attn_output.weight", (hidden, heads * head))


def _grouped(config: dict[str, Any]) -> tuple[str, list[Tensor], dict[str, Any]]:
    """Every layer of experts: OLMoE and Qwen3-MoE with norms on queries and keys, Mixtral and Granite-MoE without."""
    arch = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe", "mixtral": "llama", "granitemoe": "granitemoe"}[
        config["model_type"]
    ]
    hidden, heads, groups = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim") or hidden // heads
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_experts") or config["num_local_experts"]
    by_head = arch == "qwen3moe"
    tensors = list(_common(config))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"blk.{layer}"
        tensors += [*_attention(config, prefix, head), *_experts(prefix, hidden, width, experts)]
        if arch in ("olmoe", "qwen3moe"):
            tensors.append(Tensor(f"{prefix}.attn_q_norm.weight", (head if by_head else heads * head,), "F32"))
            tensors.append(Tensor(f"{prefix}.attn_k_norm.weight", (head if by_head else groups * head,), "F32"))
    fields = {"head_count_kv": groups, "expert_count": experts}
    if by_head:
        fields |= {"key_length": head, "value_length": head, "expert_feed_forward_length": width}
    if arch in ("llama", "granitemoe"):
        fields |= {"rope_dimension_count": head}
    if arch == "granitemoe":
        fields |= {
            "embedding_scale": config["embedding_multiplier"],
            "residual_scale": config["residual_multiplier"],
            "attention_scale": config["attention_multiplier"],
            "logit_scale": config["logits_scaling"],
        }
    return arch, tensors, fields


def _shared(config: dict[str, Any]) -> tuple[str, list[Tensor], dict[str, Any]]:
    """Qwen2-MoE: biases on queries, keys and values, a shared expert with a gate of its own."""
    hidden, groups, experts = config["hidden_size"], config["num_key_value_heads"], config["num_experts"]
    width, shared = config["moe_intermediate_size"], config["shared_expert_intermediate_size"]
    tensors = list(_common(config))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"blk.{layer}"
        tensors += _attention(config, prefix, hidden // config["num_attention_heads"], biases=True)
        tensors += _experts(prefix, hidden, width, experts)
        tensors += _mlp(prefix, hidden, shared, "_shexp")
        tensors.append(Tensor(f"{prefix}.ffn_gate_inp_shexp.weight", (hidden,), "F32"))
    fields = {"head_count_kv": groups, "expert_count": experts, "expert_feed_forward_length": width}
    return "qwen2moe", tensors, fields | {"expert_shared_feed_forward_length": shared}


def _latent(config: dict[str, Any]) -> tuple[str, list[Tensor], dict[str, Any]]:
    """DeepSeek-V2 and V3, in the absorbed form llama.cpp converts to: one latent head.

    llama.cpp takes a model of 27 layers, and no other, for one without a low-rank query."""
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    width, shared, dense = config["moe_intermediate_size"], config["n_shared_experts"], config["first_k_dense_replace"]
    low, sigmoid = config.get("q_lora_rank"), config.get("scoring_func") == "sigmoid"
    tensors = list(_common(config))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"blk.{layer}"
        tensors += [
            Tensor(f"{prefix}.attn_norm.weight", (hidden,), "F32"),
            Tensor(f"{prefix}.ffn_norm.weight", (hidden,), "F32"),
            Tensor(f"{prefix}.attn_kv_a_mqa.weight", (rank + rope, hidden)),
            Tensor(f"{prefix}.attn_kv_a_norm.weight", (rank,), "F32"),
            Tensor(f"{prefix}.attn_k_b.weight", (heads, rank, nope)),
            Tensor(f"{prefix}.attn_v_b.weight", (heads, value, rank)),
            Tensor(f"{prefix}.attn_output.weight", (hidden, heads * value)),
        ]
        if low:
            tensors.append(Tensor(f"{prefix}.attn_q_a.weight", (low, hidden)))
            tensors.append(Tensor(f"{prefix}.attn_q_a_norm.weight", (low,), "F32"))
        name = "attn_q_b" if low else "attn_q"
        tensors.append(Tensor(f"{prefix}.{name}.weight", (heads * (nope + rope), low or hidden)))
        if layer < dense:
            tensors += _mlp(prefix, hidden, config["intermediate_size"])
            continue
        tensors += _experts(prefix, hidden, width, config["n_routed_experts"])
        tensors += _mlp(prefix, hidden, width * shared, "_shexp")
        if sigmoid:
            tensors.append(Tensor(f"{prefix}.exp_probs_b.bias", (config["n_routed_experts"],), "F32"))
    fields = {
        "head_count_kv": 1,
        "kv_lora_rank": rank,
        "key_length": rank + rope,
        "value_length": rank,
        "key_length_mla": nope + rope,
        "value_length_mla": value,
        "rope_dimension_count": rope,
        "leading_dense_block_count": dense,
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": shared,
        "expert_feed_forward_length": width,
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
        "expert_gating_func": 2 if sigmoid else 1,
    }
    if low:
        fields["q_lora_rank"] = low
    if sigmoid:
        fields |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return "deepseek2", tensors, fields


ARCHITECTURES = {
    "olmoe": _grouped,
    "qwen3_moe": _grouped,
    "mixtral": _grouped,
    "granitemoe": _grouped,
    "qwen2_moe": _shared,
    "deepseek_v2": _latent,
    "deepseek_v3": _latent,
}


if __name__ == "__main__":
    write_gguf(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
