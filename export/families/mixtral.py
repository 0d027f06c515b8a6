"""Mixtral (arXiv:2401.04088): grouped attention, softmax gate normalized over the chosen."""

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
    experts, top_k = hf.integer("num_local_experts", 8), hf.integer("num_experts_per_tok", 2)
    window = 0 if hf.get("sliding_window") is None else hf.integer("sliding_window")
    layers = hf.integer("num_hidden_layers")
    attention = read_grouped_attention(hf, groups=8, windows=(window,) * layers)
    return MoEConfig(
        family="mixtral",
        **read_base(hf, default_eps=1e-5),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False, theta=1e6),
        moe=MoELayersConfig(
            layers=tuple(range(layers)),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=hf.integer("intermediate_size"),
            shared_intermediate_size=0,
            gate=read_softmax_gate(hf, experts, top_k, normalize=True),
        ),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    names = ExpertNames(root="block_sparse_moe", gate="w1", up="w3", down="w2")
    return plan_decoder(config, plan_grouped_attention, names)


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
