"""DeepSeek-V3, R1 and their kin: latent attention, sigmoid gate with a correction bias (arXiv:2412.19437)."""

from __future__ import annotations

from ..checkpoint import Checkpoint
from ..config import GateConfig, HfConfig, LatentAttentionConfig, MoEConfig, MoELayersConfig
from ..gating import check_gate
from ..ropes import read_rope, read_scaling, yarn_mscale
from ..weights import Weight
from ._common import ExpertNames, ignore_usual, plan_decoder, read_base, read_first_dense
from ._latent import plan_latent_attention, read_latent_attention


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("scoring_func", ("sigmoid",), "sigmoid")
    hf.require("topk_method", ("noaux_tc",), "noaux_tc")
    intermediate = hf.integer("moe_intermediate_size", 2048)
    return MoEConfig(
        family="deepseek_v3",
        **read_base(hf),
        attention=_read_attention(hf),
        rope=read_rope(hf, hf.integer("qk_rope_head_dim", 64), interleaved=hf.flag("rope_interleave", True)),
        moe=MoELayersConfig(
            layers=read_first_dense(hf, 3),
            num_experts=hf.integer("n_routed_experts", 256),
            num_experts_per_tok=hf.integer("num_experts_per_tok", 8),
            intermediate_size=intermediate,
            shared_intermediate_size=intermediate * hf.integer("n_shared_experts", 1, minimum=0),
            gate=_read_gate(hf),
        ),
    )


def _read_attention(hf: HfConfig) -> LatentAttentionConfig:
    """YaRN's temperature by `mscale_all_dim` goes into the softmax scale, squared: once for queries, once for keys."""
    rope, factor = read_scaling(hf), 1.0
    if rope.get("mscale_all_dim"):
        factor = yarn_mscale(rope.number("factor"), rope.number("mscale_all_dim")) ** 2
    return read_latent_attention(hf, scale_factor=factor)


def _read_gate(hf: HfConfig) -> GateConfig:
    attributes: dict[str, int | float] = {
        "top_k": hf.integer("num_experts_per_tok", 8),
        "n_group": hf.integer("n_group", 8),
        "topk_group": hf.integer("topk_group", 4),
        "norm_topk_prob": int(hf.flag("norm_topk_prob", True)),
        "routed_scaling_factor": hf.number("routed_scaling_factor", 2.5),
    }
    check_gate("SigmoidTopKGate", attributes, hf.integer("n_routed_experts", 256), where=hf.where)
    return GateConfig(op="SigmoidTopKGate", attributes=attributes, bias=True)


def plan_weights(config: MoEConfig) -> list[Weight]:
    return plan_decoder(config, plan_latent_attention, ExpertNames())


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    reason = "the multi-token-prediction layer, unused in decoding"
    return [(f"model.layers.{config.num_hidden_layers}.", reason), *ignore_usual(config)]
