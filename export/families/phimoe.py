"""Phi-3.5-MoE (arXiv:2404.14219): LayerNorm with biases, sparse mixer gate, LongRoPE with a factor for each length."""

from __future__ import annotations

import dataclasses

from ..checkpoint import Checkpoint
from ..config import GateConfig, HfConfig, MoEConfig, MoELayersConfig, RopeConfig
from ..gating import check_gate
from ..ropes import read_rope, read_scaling
from ..weights import Weight
from ._common import (
    ExpertNames,
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_grouped_attention,
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    layers = hf.integer("num_hidden_layers")
    window = 0 if hf.get("sliding_window") is None else hf.integer("sliding_window")
    bias = hf.flag("attention_bias", False)
    attention = read_grouped_attention(hf, groups=8, qkv_bias=bias, o_bias=bias, windows=(window,) * layers)
    experts = hf.integer("num_local_experts", 16)
    return MoEConfig(
        family="phimoe",
        **read_base(hf, default_eps=1e-5),
        attention=attention,
        rope=_read_rope(hf, attention.head_dim),
        moe=MoELayersConfig(
            layers=tuple(range(layers)),
            num_experts=experts,
            num_experts_per_tok=2,
            intermediate_size=hf.integer("intermediate_size"),
            shared_intermediate_size=0,
            gate=_read_gate(hf, experts),
        ),
        norm="layer",
        head_bias=hf.flag("lm_head_bias", False),
    )


def _read_rope(hf: HfConfig, dim: int) -> RopeConfig:
    """The original length stands in `rope_scaling` here, and with it what multiplies cosine and sine on each side."""
    scaling = read_scaling(hf)
    length = {key: scaling.get(key) for key in ("original_max_position_embeddings",) if key in scaling}
    lifted = HfConfig({**hf.document, **length}, hf.where)
    rope = read_rope(lifted, dim, interleaved=False, theta=1e6, kinds=("default", "longrope"))
    if rope.kind == "fixed":
        return rope
    short, long = scaling.number("short_mscale"), scaling.number("long_mscale")
    return dataclasses.replace(rope, attention_factor=short, long_attention_factor=long)


def _read_gate(hf: HfConfig, experts: int) -> GateConfig:
    attributes: dict[str, int | float] = {
        "top_k": hf.integer("num_experts_per_tok", 2),
        "jitter_eps": hf.number("router_jitter_noise", 0.01),
    }
    check_gate("SparseMixerGate", attributes, experts, where=hf.where)
    return GateConfig(op="SparseMixerGate", attributes=attributes)


def plan_weights(config: MoEConfig) -> list[Weight]:
    names = ExpertNames(root="block_sparse_moe", gate="w1", up="w3", down="w2")
    return plan_decoder(config, plan_grouped_attention, names)


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
