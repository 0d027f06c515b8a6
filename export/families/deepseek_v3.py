"""DeepSeek-V3, R1 and their kin: latent attention, sigmoid gate with a correction bias (arXiv:2412.19437)."""

from __future__ import annotations

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import (
    GateConfig,
    HfConfig,
    LatentAttentionConfig,
    MoEConfig,
    MoELayersConfig,
    read_rope,
    yarn_mscale,
)
from ..gating import check_gate
from ..weights import Role, Weight, expert_gate_up, expert_stack, plain, stacked_rows
from ._latent import plan_latent_attention


def read_config(checkpoint: Checkpoint) -> MoEConfig:
    hf = HfConfig(checkpoint.config, str(checkpoint.path / "config.json"))
    hf.require("hidden_act", ("silu",), "silu")
    hf.require("moe_layer_freq", (1,), 1)
    hf.require("scoring_func", ("sigmoid",), "sigmoid")
    hf.require("topk_method", ("noaux_tc",), "noaux_tc")
    layers = hf.integer("num_hidden_layers")
    first_dense = min(hf.integer("first_k_dense_replace", 3, minimum=0), layers)
    if first_dense == layers:
        raise CheckpointError(
            f"{hf.where}: first_k_dense_replace {first_dense} leaves no mixture-of-experts layer of {layers}; "
            "this exporter is for mixture-of-experts models"
        )
    intermediate = hf.integer("moe_intermediate_size", 2048)
    return MoEConfig(
        family="deepseek_v3",
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hf.integer("hidden_size"),
        intermediate_size=hf.integer("intermediate_size"),
        num_hidden_layers=layers,
        max_position_embeddings=hf.integer("max_position_embeddings", 4096),
        rms_norm_eps=hf.number("rms_norm_eps", 1e-6),
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        attention=_read_attention(hf),
        rope=read_rope(hf, hf.integer("qk_rope_head_dim", 64), interleaved=hf.flag("rope_interleave", True)),
        moe=MoELayersConfig(
            layers=tuple(range(first_dense, layers)),
            num_experts=hf.integer("n_routed_experts", 256),
            num_experts_per_tok=hf.integer("num_experts_per_tok", 8),
            intermediate_size=intermediate,
            shared_intermediate_size=intermediate * hf.integer("n_shared_experts", 1, minimum=0),
            gate=_read_gate(hf),
        ),
    )


def _read_attention(hf: HfConfig) -> LatentAttentionConfig:
    nope, rope = hf.integer("qk_nope_head_dim", 128), hf.integer("qk_rope_head_dim", 64)
    scale = (nope + rope) ** -0.5
    scaling = hf.get("rope_scaling") or {}
    if isinstance(scaling, dict) and scaling.get("mscale_all_dim"):
        scale *= yarn_mscale(float(scaling["factor"]), float(scaling["mscale_all_dim"])) ** 2
    q_lora_rank = None if hf.get("q_lora_rank", 1536) is None else hf.integer("q_lora_rank", 1536)
    return LatentAttentionConfig(
        num_heads=hf.integer("num_attention_heads"),
        q_lora_rank=q_lora_rank,
        kv_lora_rank=hf.integer("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=hf.integer("v_head_dim", 128),
        scale=scale,
        bias=hf.flag("attention_bias", False),
    )


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
    hidden, vocab = config.hidden_size, config.vocab_size
    plan = [plain("embed.weight", "model.embed_tokens.weight", (vocab, hidden), "embedding", "table")]
    for layer in range(config.num_hidden_layers):
        ours, theirs = f"layers.{layer}", f"model.layers.{layer}"
        plan.append(plain(f"{ours}.attn_norm.weight", f"{theirs}.input_layernorm.weight", (hidden,), "norm", "keep"))
        plan += plan_latent_attention(config, layer)
        norm = f"{theirs}.post_attention_layernorm.weight"
        plan.append(plain(f"{ours}.mlp_norm.weight", norm, (hidden,), "norm", "keep"))
        plan += _plan_moe(config, layer) if layer in config.moe.layers else _plan_dense(config, layer)
    plan.append(plain("final_norm.weight", "model.norm.weight", (hidden,), "norm", "keep"))
    if not config.tie_word_embeddings:
        plan.append(plain("head.weight", "lm_head.weight", (vocab, hidden), "head", "table"))
    return plan


def _plan_dense(config: MoEConfig, layer: int) -> list[Weight]:
    ours, theirs = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp"
    hidden, inner = config.hidden_size, config.intermediate_size
    gate_up = (f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")
    return [
        stacked_rows(f"{ours}.gate_up.weight", gate_up, (inner, hidden), "dense_mlp"),
        plain(f"{ours}.down.weight", f"{theirs}.down_proj.weight", (hidden, inner), "dense_mlp", "linear"),
    ]


def _plan_moe(config: MoEConfig, layer: int) -> list[Weight]:
    ours, theirs = f"layers.{layer}", f"model.layers.{layer}.mlp"
    moe, hidden = config.moe, config.hidden_size
    experts = [f"{theirs}.experts.{expert}" for expert in range(moe.num_experts)]
    gate_up = [(f"{expert}.gate_proj.weight", f"{expert}.up_proj.weight") for expert in experts]
    down = [f"{expert}.down_proj.weight" for expert in experts]
    inner, shared = moe.intermediate_size, moe.shared_intermediate_size
    bias = f"{theirs}.gate.e_score_correction_bias"
    plan = [
        plain(f"{ours}.router.weight", f"{theirs}.gate.weight", (moe.num_experts, hidden), "router", "keep"),
        plain(f"{ours}.router.bias", bias, (moe.num_experts,), "router", "keep"),
        expert_gate_up(f"{ours}.experts.gate_up.weight", gate_up, (inner, hidden)),
        expert_stack(f"{ours}.experts.down.weight", down, (hidden, inner)),
    ]
    if shared:
        one = f"{theirs}.shared_experts"
        role: Role = "shared_experts"
        gate_up_names = (f"{one}.gate_proj.weight", f"{one}.up_proj.weight")
        plan += [
            stacked_rows(f"{ours}.shared.gate_up.weight", gate_up_names, (shared, hidden), role),
            plain(f"{ours}.shared.down.weight", f"{one}.down_proj.weight", (hidden, shared), role, "linear"),
        ]
    return plan


def ignored_tensors(config: MoEConfig) -> list[tuple[str, str]]:
    ignored = [(f"model.layers.{config.num_hidden_layers}.", "the multi-token-prediction layer, unused in decoding")]
    ignored += [
        (f"model.layers.{layer}.self_attn.rotary_emb.inv_freq", "frequencies follow from config.json")
        for layer in range(config.num_hidden_layers)
    ]
    if config.tie_word_embeddings:
        ignored.append(("lm_head.weight", "the head is tied to the embedding"))
    return ignored
