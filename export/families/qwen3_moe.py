"""Qwen3-MoE (arXiv:2505.09388): queries and keys normed by head, no shared expert, some layers may be dense."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import HfConfig, MoEConfig, MoELayersConfig
from ..ropes import read_rope
from ..weights import Weight
from ._common import (
    ExpertNames,
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_grouped_attention,
    read_softmax_gate,
    read_window,
    sparse_layers,
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    experts, top_k = hf.integer("num_experts", 128), hf.integer("num_experts_per_tok", 8)
    bias = hf.flag("attention_bias", False)
    windows = (read_window(hf, 4096),) * hf.integer("num_hidden_layers")
    attention = read_grouped_attention(
        hf, groups=4, qk_norm="head", qkv_bias=bias, o_bias=bias, windows=windows
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
