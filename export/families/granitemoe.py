"""Granite 3 MoE (IBM): multipliers on embedding, residuals, attention and logits; experts stored in stacks."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import HfConfig, MoEConfig, MoELayersConfig
from ..ropes import read_rope
from ..weights import Piece, Weight, plain
from ._common import (
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_divisor,
    read_grouped_attention,
    read_softmax_gate,
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    experts, top_k = hf.integer("num_local_experts", 8), hf.integer("num_experts_per_tok", 2)
    bias = hf.flag("attention_bias", False)
    scale = hf.number("attention_multiplier", 1.0)
    attention = read_grouped_attention(hf, qkv_bias=bias, o_bias=bias, scale=scale)
    return MoEConfig(
        family="granitemoe",
        **read_base(hf),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False),
        moe=MoELayersConfig(
            layers=tuple(range(hf.integer("num_hidden_layers"))),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("intermediate_size"),
            shared_intermediate_size=0,
            # Softmax over the chosen logits: what normalizing the chosen shares of all of them comes to.
            gate=read_softmax_gate(hf, experts, top_k, normalize=True),
        ),
        embedding_multiplier=hf.number("embedding_multiplier", 1.0),
        residual_multiplier=hf.number("residual_multiplier", 1.0),
        logits_divisor=read_divisor(hf, "logits_scaling"),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, _plan_mixture)


def _plan_mixture(config: MoEConfig, layer: int) -> list[Weight]:
    """input_linear [E, 2I, H] has each expert's gate above its up; ours takes them in turns."""
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}.block_sparse_moe"
    experts, inner, hidden = config.moe.num_experts, config.moe.intermediate_size, config.hidden_size
    stack, source = (experts, 2 * inner, hidden), f"{theirs}.input_linear.weight"
    gate_up = tuple(
        (
            Piece(source, stack, at=(slice(0, None, 2),), pick=(slice(0, inner),), entry=expert),
            Piece(source, stack, at=(slice(1, None, 2),), pick=(slice(inner, 2 * inner),), entry=expert),
        )
        for expert in range(experts)
    )
    down_stack, down_source = (experts, hidden, inner), f"{theirs}.output_linear.weight"
    down = tuple((Piece(down_source, down_stack, entry=expert),) for expert in range(experts))
    router = f"{theirs}.router.layer.weight"
    return [
        plain(f"{ours}.router.weight", router, (experts, hidden), "router", "keep"),
        Weight(f"{ours}.experts.gate_up.weight", stack, "experts", "linear", gate_up, group_with=(inner,)),
        Weight(f"{ours}.experts.down.weight", down_stack, "experts", "linear", down, group_with=(hidden,)),
    ]


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
