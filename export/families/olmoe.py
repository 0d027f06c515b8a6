"""OLMoE (arXiv:2409.02060): queries and keys normed over their whole width and clipped, softmax gate as it is."""

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
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    experts, top_k = hf.integer("num_experts", 64), hf.integer("num_experts_per_tok", 8)
    bias = hf.flag("attention_bias", False)
    clip = None if hf.get("clip_qkv") is None else hf.number("clip_qkv")
    attention = read_grouped_attention(hf, qk_norm="full", clip=clip, qkv_bias=bias, o_bias=bias)
    return MoEConfig(
        family="olmoe",
        **read_base(hf, default_eps=1e-5),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False),
        moe=MoELayersConfig(
            layers=tuple(range(hf.integer("num_hidden_layers"))),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("intermediate_size"),
            shared_intermediate_size=0,
            gate=read_softmax_gate(hf, experts, top_k, normalize=hf.flag("norm_topk_prob", False)),
        ),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, ExpertNames())


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
