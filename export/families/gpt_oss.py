"""gpt-oss (arXiv:2508.10925): attention sinks, a window on every second layer, experts with biases and clamped SwiGLU.

Experts are stored the other way round, [E, in, out]; gate and up take turns already.
"""

from __future__ import annotations

from ...errors import CheckpointError, shorten
from ..checkpoint import Checkpoint
from ..config import CLAMPED_SWIGLU_LIMIT, HfConfig, MoEConfig, MoELayersConfig
from ..ropes import read_rope
from ..weights import Piece, Weight, plain
from ._common import (
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_grouped_attention,
    read_softmax_gate,
)

# What config.json means where it does not say.
_DEFAULTS = {
    "head_dim": 64,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig({**_DEFAULTS, **checkpoint.config}, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("swiglu_limit", (CLAMPED_SWIGLU_LIMIT,), CLAMPED_SWIGLU_LIMIT)
    experts, top_k = hf.integer("num_local_experts", 128), hf.integer("num_experts_per_tok", 4)
    bias = hf.flag("attention_bias", True)
    attention = read_grouped_attention(
        hf, groups=8, qkv_bias=bias, o_bias=bias, sinks=True, windows=_read_windows(hf)
    )
    return MoEConfig(
        family="gpt_oss",
        **read_base(hf, default_eps=1e-5),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False, theta=150000.0),
        moe=MoELayersConfig(
            layers=tuple(range(hf.integer("num_hidden_layers"))),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("intermediate_size"),
            shared_intermediate_size=0,
            # Softmax over the chosen logits: what normalizing the chosen shares of all of them comes to.
            gate=read_softmax_gate(hf, experts, top_k, normalize=True),
            activation="clamped_swiglu",
            router_bias=True,
        ),
    )


def _read_windows(hf: HfConfig) -> tuple[int, ...]:
    """By `layer_types`; without it every second layer attends to `sliding_window` tokens, the first included."""
    layers = hf.integer("num_hidden_layers")
    kinds = {"sliding_attention": hf.integer("sliding_window", 128), "full_attention": 0}
    types = hf.get("layer_types")
    if types is None:
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
    known = isinstance(types, list) and all(isinstance(kind, str) and kind in kinds for kind in types)
    if not known or len(types) != layers:
        raise CheckpointError(
            f"{hf.where}: layer_types is {shorten(types)}; a list of {layers}, one a layer, of {' or '.join(kinds)} "
            "was expected"
        )
    return tuple(kinds[kind] for kind in types)


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, _plan_mixture)


def _plan_mixture(config: MoEConfig, layer: int) -> list[Weight]:
    """The router with its bias, and both stacks turned round, with theirs."""
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}.mlp"
    experts, inner, hidden = config.moe.num_experts, config.moe.intermediate_size, config.hidden_size
    plan = [
        plain(f"{ours}.router.weight", f"{theirs}.router.weight", (experts, hidden), "router", "keep"),
        plain(f"{ours}.router.logits_bias", f"{theirs}.router.bias", (experts,), "router", "keep"),
    ]
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        source = f"{theirs}.experts.{name}_proj"
        stored = (experts, columns, rows)
        units = tuple((Piece(source, stored, entry=expert, transpose=True),) for expert in range(experts))
        other = (inner,) if name == "gate_up" else (hidden,)
        shape = (experts, rows, columns)
        plan.append(Weight(f"{ours}.experts.{name}.weight", shape, "experts", "linear", units, group_with=other))
        plan.append(plain(f"{ours}.experts.{name}.bias", f"{source}_bias", (experts, rows), "experts", "keep"))
    return plan


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
