"""DeepSeek-V2 and V2-Lite: latent attention, softmax gate, greedy or limited to groups (arXiv:2405.04434).

As transformers' `DeepseekV2ForCausalLM`: rotations are of neighbouring channels, chosen weights are not normalized
whatever `norm_topk_prob` says, and YaRN's `mscale_all_dim` does not enter the softmax scale.
"""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import GateConfig, HfConfig, MoEConfig, MoELayersConfig
from ..ropes import read_rope
from ..weights import Weight
from ._common import ExpertNames, ignore_usual, plan_decoder, read_base, read_first_dense, read_softmax_gate
from ._latent import plan_latent_attention, read_latent_attention


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("mlp_bias", (False,), False)
    hf.require("scoring_func", ("softmax",), "softmax")
    intermediate = hf.integer("moe_intermediate_size", 1407)
    shared = 0 if hf.get("n_shared_experts", 2) is None else hf.integer("n_shared_experts", 2, minimum=0)
    return MoEConfig(
        family="deepseek_v2",
        **read_base(hf),
        attention=read_latent_attention(hf),
        rope=read_rope(hf, hf.integer("qk_rope_head_dim", 64), interleaved=True),
        moe=MoELayersConfig(
            layers=read_first_dense(hf, 0),
            num_experts=hf.integer("n_routed_experts", 64),
            num_experts_per_tok=hf.integer("num_experts_per_tok"),
            intermediate_size=intermediate,
            shared_intermediate_size=intermediate * shared,
            gate=_read_gate(hf),
        ),
    )


def _read_gate(hf: HfConfig) -> GateConfig:
    method = hf.require("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups = (hf.integer("n_group"), hf.integer("topk_group")) if method == "group_limited_greedy" else (1, 1)
    return read_softmax_gate(
        hf,
        hf.integer("n_routed_experts", 64),
        hf.integer("num_experts_per_tok"),
        normalize=False,
        factor=hf.number("routed_scaling_factor", 1.0),
        groups=groups,
    )


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_latent_attention, ExpertNames())


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    return ignore_usual(config)
