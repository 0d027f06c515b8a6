"""What most families share: the decoder's tensors under Hugging Face's usual names, and reading usual config keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import CheckpointError, shorten
from ..config import GateConfig, GroupedAttentionConfig, HfConfig, MoEConfig
from ..gating import check_gate
from ..ropes import read_scaling, rope_kind
from ..weights import Role, Weight, expert_gate_up, expert_stack, plain, stacked_rows

LayerPlan = Callable[[MoEConfig, int], list[Weight]]


@dataclass(frozen=True)
class ExpertNames:
    """How a family names its mixture: `root` under a layer, the three matrices of an expert, the shared expert."""

    root: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_experts"
    correction_bias: str = "gate.e_score_correction_bias"


def plan_decoder(
    config: MoEConfig, plan_attention: LayerPlan, mixture: ExpertNames | LayerPlan
) -> list[Weight]:
    """Every canonical tensor of a decoder, in the order of the graph.

    `mixture`: how the usual tensors of a mixture are named, or the plan of a family that stores them otherwise.
    """
    plan_mixture = plan_named_mixture(mixture) if isinstance(mixture, ExpertNames) else mixture
    hidden, vocab = config.hidden_size, config.vocab_size
    plan = [plain("embed.weight", "model.embed_tokens.weight", (vocab, hidden), "embedding", "table")]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        plan += plan_norm(config, f"{ours}.attn_norm", f"{theirs}.input_layernorm")
        plan += plan_attention(config, layer)
        plan += plan_norm(config, f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm")
        if layer in config.moe.layers:
            plan += plan_mixture(config, layer)
        else:
            plan += plan_gated_mlp(f"{ours}.mlp", f"{theirs}.mlp", hidden, config.intermediate_size, "dense_mlp")
    plan += plan_norm(config, "final_norm", "model.norm")
    if not config.tie_word_embeddings:
        plan.append(plain("head.weight", "lm_head.weight", (vocab, hidden), "head", "linear"))
    if config.head_bias:
        plan.append(plain("head.bias", "lm_head.bias", (vocab,), "head", "keep"))
    return plan


def plan_norm(config: MoEConfig, ours: str, theirs: str) -> list[Weight]:
    """A norm over the hidden size; LayerNorm has a bias too."""
    parts = ("weight", "bias") if config.norm == "layer" else ("weight",)
    return [plain(f"{ours}.{part}", f"{theirs}.{part}", (config.hidden_size,), "norm", "keep") for part in parts]


def plan_gated_mlp(ours: str, theirs: str, hidden: int, inner: int, role: Role) -> list[Weight]:
    """gate and up stacked, and down."""
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        stacked_rows(f"{ours}.gate_up.weight", gate_up, (inner, hidden), role),
        plain(f"{ours}.down.weight", f"{theirs}.down_proj.weight", (hidden, inner), role, "linear"),
    ]


def plan_named_mixture(names: ExpertNames) -> LayerPlan:
    return lambda config, layer: plan_moe(config, layer, names)


def plan_moe(config: MoEConfig, layer: int, names: ExpertNames) -> list[Weight]:
    """Router, experts stacked, shared expert with its gate."""
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}.{names.root}"
    moe, hidden = config.moe, config.hidden_size
    experts = [f"{theirs}.experts.{expert}" for expert in range(moe.num_experts)]
    gate_up = [(f"{expert}.{names.gate}.weight", f"{expert}.{names.up}.weight") for expert in experts]
    down = [f"{expert}.{names.down}.weight" for expert in experts]
    inner, shared = moe.intermediate_size, moe.shared_intermediate_size
    plan = [plain(f"{ours}.router.weight", f"{theirs}.gate.weight", (moe.num_experts, hidden), "router", "keep")]
    if moe.gate.bias:
        bias = f"{theirs}.{names.correction_bias}"
        plan.append(plain(f"{ours}.router.bias", bias, (moe.num_experts,), "router", "keep"))
    plan += [
        expert_gate_up(f"{ours}.experts.gate_up.weight", gate_up, (inner, hidden)),
        expert_stack(f"{ours}.experts.down.weight", down, (hidden, inner)),
    ]
    if shared:
        plan += plan_gated_mlp(f"{ours}.shared", f"{theirs}.{names.shared}", hidden, shared, "shared_experts")
    if moe.shared_gate:
        gate = f"{theirs}.{names.shared}_gate.weight"
        plan.append(plain(f"{ours}.shared.gate.weight", gate, (1, hidden), "shared_experts", "keep"))
    return plan


def plan_grouped_attention(config: MoEConfig, layer: int) -> list[Weight]:
    """q, k, v and o with their biases, and the norms of queries and keys."""
    attention = config.attention
    assert isinstance(attention, GroupedAttentionConfig)
    ours, theirs = f"layers.{layer}.attn", f"model.layers.{layer}.self_attn"
    queries = attention.num_heads * attention.head_dim
    keys = attention.num_key_value_heads * attention.head_dim
    plan = []
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shape = (rows, config.hidden_size)
        plan.append(plain(f"{ours}.{name}.weight", f"{theirs}.{name}_proj.weight", shape, "attention", "linear"))
        if attention.qkv_bias:
            plan.append(plain(f"{ours}.{name}.bias", f"{theirs}.{name}_proj.bias", (rows,), "attention", "keep"))
        if attention.qk_norm != "none" and name != "v":
            width = attention.head_dim if attention.qk_norm == "head" else rows
            plan.append(plain(f"{ours}.{name}_norm.weight", f"{theirs}.{name}_norm.weight", (width,), "norm", "keep"))
    if attention.sinks:
        plan.append(plain(f"{ours}.sinks", f"{theirs}.sinks", (attention.num_heads,), "attention", "keep"))
    shape = (config.hidden_size, queries)
    plan.append(plain(f"{ours}.o.weight", f"{theirs}.o_proj.weight", shape, "attention", "linear"))
    if attention.o_bias:
        plan.append(plain(f"{ours}.o.bias", f"{theirs}.o_proj.bias", shape[:1], "attention", "keep"))
    return plan


def ignore_usual(config: MoEConfig) -> list[tuple[str, str]]:
    """(name prefix, why) of tensors that checkpoints carry and no decoder needs."""
    ignored = [
        (f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", "frequencies follow from config.json")
        for layer in range(config.num_hidden_layers)
    ]
    if config.tie_word_embeddings:
        ignored.append(("lm_head.weight", "the head is tied to the embedding"))
    return ignored


def read_grouped_attention(hf: HfConfig, *, groups: int | None = None, **changes: Any) -> GroupedAttentionConfig:
    """Heads, groups and head size by their usual keys; `changes` are the family's own fields.

    `groups`: what a config.json without num_key_value_heads means in this family; null is one for each head.

    Raises:
        CheckpointError: the groups do not divide the heads, or the heads the hidden size.
    """
    heads = hf.integer("num_attention_heads")
    groups = hf.integer("num_key_value_heads", heads if groups is None or "num_key_value_heads" in hf else groups)
    if heads % groups:
        raise CheckpointError(
            f"{hf.where}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; correct config.json"
        )
    hidden = hf.integer("hidden_size")
    if hf.get("head_dim") is None and hidden % heads:
        raise CheckpointError(
            f"{hf.where}: num_attention_heads {heads} does not divide hidden_size {hidden}; correct config.json"
        )
    dim = hidden // heads if hf.get("head_dim") is None else hf.integer("head_dim")
    windows = (0,) * hf.integer("num_hidden_layers")
    sizes = {"num_heads": heads, "num_key_value_heads": groups, "head_dim": dim}
    return GroupedAttentionConfig(**{**sizes, "scale": dim**-0.5, "windows": windows, **changes})


def read_window(hf: HfConfig, default: int) -> int:
    """Qwen's rule: `sliding_window` counts where `use_sliding_window` is set; null is none."""
    if not hf.flag("use_sliding_window", False) or ("sliding_window" in hf and hf.get("sliding_window") is None):
        return 0
    return hf.integer("sliding_window", default)


def read_softmax_gate(
    hf: HfConfig,
    num_experts: int,
    top_k: int,
    *,
    normalize: bool,
    factor: float = 1.0,
    groups: tuple[int, int] = (1, 1),
) -> GateConfig:
    """A softmax gate, its attributes checked."""
    attributes: dict[str, int | float] = {
        "top_k": top_k,
        "n_group": groups[0],
        "topk_group": groups[1],
        "norm_topk_prob": int(normalize),
        "routed_scaling_factor": factor,
    }
    check_gate("SoftmaxTopKGate", attributes, num_experts, where=hf.where)
    return GateConfig(op="SoftmaxTopKGate", attributes=attributes)


def sparse_layers(hf: HfConfig) -> tuple[int, ...]:
    """Qwen's rule: every `decoder_sparse_step`-th layer but those in `mlp_only_layers`."""
    step = hf.integer("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise CheckpointError(f"{hf.where}: mlp_only_layers is {shorten(dense)}, a list of layers was expected")
    layers = hf.integer("num_hidden_layers")
    return check_sparse(hf, tuple(layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0))


def check_sparse(hf: HfConfig, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The same layers; raises CheckpointError when there are none."""
    if not layers:
        raise CheckpointError(
            f"{hf.where}: no layer of {hf.integer('num_hidden_layers')} is a mixture of experts; "
            "this exporter is for mixture-of-experts models"
        )
    return layers


def read_base(hf: HfConfig, **eps: float) -> dict[str, Any]:
    """The fields of MoEConfig that nearly every family has under the same keys."""
    return {
        "vocab_size": hf.integer("vocab_size"),
        "hidden_size": hf.integer("hidden_size"),
        "intermediate_size": hf.integer("intermediate_size"),
        "num_hidden_layers": hf.integer("num_hidden_layers"),
        "max_position_embeddings": read_positions(hf),
        "rms_norm_eps": hf.number("rms_norm_eps", eps.get("default_eps", 1e-6)),
        "tie_word_embeddings": hf.flag("tie_word_embeddings", False),
    }


def read_positions(hf: HfConfig) -> int:
    """The longest sequence; dynamic scaling stretches it by its factor."""
    positions, rope = hf.integer("max_position_embeddings", 4096), read_scaling(hf)
    return int(positions * max(1.0, rope.number("factor"))) if rope_kind(rope) == "dynamic" else positions


def read_first_dense(hf: HfConfig, default: int) -> tuple[int, ...]:
    """DeepSeek's rule: all layers but the first `first_k_dense_replace`."""
    layers = hf.integer("num_hidden_layers")
    first_dense = min(hf.integer("first_k_dense_replace", default, minimum=0), layers)
    if first_dense == layers:
        raise CheckpointError(
            f"{hf.where}: first_k_dense_replace {first_dense} leaves no mixture-of-experts layer of {layers}; "
            "this exporter is for mixture-of-experts models"
        )
    return tuple(range(first_dense, layers))


def read_divisor(hf: HfConfig, key: str) -> float:
    """A number that something is divided by; 1 unless given."""
    value = hf.number(key, 1.0)
    if value == 0:
        raise CheckpointError(f"{hf.where}: {key} is 0, it divides; correct config.json")
    return value
