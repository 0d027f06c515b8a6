"""Qwen3-MoE (arXiv:2505.09388): queries and keys normed by head, no shared expert, some layers may be dense."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import HfConfig, MoEConfig, MoELayersConfig, read_rope
from ..weights import Weight
from ._common import (
    ExpertNames,
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_grouped_attention,
    read_softmax_gate,
    sparse_layers,
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    experts, top_k = hf.integer("num_experts", 128), hf.integer("num_experts_per_tok", 8)
    layers = hf.integer("num_hidden_layers")
    bias = hf.flag("attention_bias", False)
    window = hf.integer("sliding_window", 4096) if hf.flag("use_sliding_window", False) else 0
    attention = read_grouped_attention(
        hf, qk_norm="head", qkv_bias=bias, o_bias=bias, windows=(window,) * layers
    )
    return MoEConfig(
        family="qwen3_moe",
        **read_base(hf),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False),
        moe=MoELayersConfig(
            layers=sparse_layers(hf),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("moe_intermediate_size", 768),
            shared_intermediate_size=0,
            gate=read_softmax_gate(hf, experts, top_k, normalize=hf.flag("norm_topk_prob", False)),
        ),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, ExpertNames())


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
