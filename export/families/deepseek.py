"""DeepSeekMoE-16B, V1 (arXiv:2401.06066): attention of Llama's kind, softmax gate, shared experts.

transformers has no class of its own for it; the checkpoint's modeling_deepseek.py is what this follows.
"""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import HfConfig, MoEConfig, MoELayersConfig
from ..ropes import read_rope
from ..weights import Weight
from ._common import (
    ExpertNames,
    check_sparse,
    ignore_usual,
    plan_decoder,
    plan_grouped_attention,
    read_base,
    read_first_dense,
    read_grouped_attention,
    read_softmax_gate,
)


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("mlp_bias", (False,), False)
    hf.require("scoring_func", ("softmax",), "softmax")
    experts, top_k = hf.integer("n_routed_experts"), hf.integer("num_experts_per_tok")
    intermediate = hf.integer("moe_intermediate_size", 1407)
    every = hf.integer("moe_layer_freq", 1)
    bias = hf.flag("attention_bias", False)
    attention = read_grouped_attention(hf, qkv_bias=bias, o_bias=bias)
    return MoEConfig(
        family="deepseek",
        **read_base(hf),
        attention=attention,
        rope=read_rope(hf, attention.head_dim, interleaved=False, kinds=("default", "linear", "dynamic")),
        moe=MoELayersConfig(
            layers=check_sparse(hf, tuple(layer for layer in read_first_dense(hf, 0) if layer % every == 0)),
            num_experts=experts,
            num_experts_per_tok=top_k,
            intermediate_size=intermediate,
            shared_intermediate_size=intermediate * hf.integer("n_shared_experts", 0, minimum=0),
            # A single choice keeps its share even where the chosen are to be normalized.
            gate=read_softmax_gate(hf, experts, top_k, normalize=hf.flag("norm_topk_prob", False) and top_k > 1),
        ),
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_grouped_attention, ExpertNames())


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
