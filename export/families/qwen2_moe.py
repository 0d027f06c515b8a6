"""Qwen2-MoE and Qwen1.5-MoE: biased projections, a shared expert behind a sigmoid gate of its own."""

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
    experts, top_k = hf.integer("num_experts", 60), hf.integer("num_experts_per_tok", 4)
    windows = (read_window(hf, 4096),) * hf.integer("num_hidden_layers")
    attention = read_grouped_attention(hf, groups=16, qkv_bias=hf.flag("qkv_bias", True), windows=windows)
    return MoEConfig(
        family="qwen2_moe",
        **read_base(hf),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False),
        moe=MoELayersConfig(
            layers=sparse_layers(hf),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("moe_intermediate_size", 1408),
            shared_intermediate_size=hf.integer("shared_expert_intermediate_size", 5632),
            shared_gate=True,
            gate=read_softmax_gate(hf, experts, top_k, normalize=hf.flag("norm_topk_prob", False)),
        ),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, ExpertNames(shared="shared_expert"))


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
