"""The tensors of multi-head latent attention, named alike in DeepSeek-V2 and V3."""

from __future__ import annotations

from ..config import HfConfig, LatentAttentionConfig, MoEConfig
from ..weights import Piece, Role, Weight, plain

_ROLE: Role = "attention"


def read_latent_attention(hf: HfConfig, scale_factor: float = 1.0) -> LatentAttentionConfig:
    """The sizes of latent attention; `scale_factor` multiplies the usual softmax scale."""
    nope, rope = hf.integer("qk_nope_head_dim", 128), hf.integer("qk_rope_head_dim", 64)
    return LatentAttentionConfig(
        num_heads=hf.integer("num_attention_heads"),
        q_lora_rank=None if hf.get("q_lora_rank", 1536) is None else hf.integer("q_lora_rank", 1536),
        kv_lora_rank=hf.integer("kv_lora_rank", 512),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=hf.integer("v_head_dim", 128),
        scale=(nope + rope) ** -0.5 * scale_factor,
        bias=hf.flag("attention_bias", False),
    )


def plan_latent_attention(config: MoEConfig, layer: int) -> list[Weight]:
    """q (or q_a, q_b), kv_a, the up-projections by head, and o."""
    ours, theirs = f"layers.{layer}.attn", f"model.layers.{layer}.self_attn"
    attention, hidden = config.attention, config.hidden_size
    assert isinstance(attention, LatentAttentionConfig)
    width = attention.num_heads * attention.qk_head_dim
    rank = attention.q_lora_rank
    latent = attention.kv_lora_rank + attention.qk_rope_head_dim
    plan = []
    if rank is None:
        plan.append(plain(f"{ours}.q.weight", f"{theirs}.q_proj.weight", (width, hidden), _ROLE, "linear"))
    else:
        plan += _with_bias(attention, f"{ours}.q_a", f"{theirs}.q_a_proj", (rank, hidden))
        plan.append(plain(f"{ours}.q_a_norm.weight", f"{theirs}.q_a_layernorm.weight", (rank,), "norm", "keep"))
        plan.append(plain(f"{ours}.q_b.weight", f"{theirs}.q_b_proj.weight", (width, rank), _ROLE, "linear"))
    plan += _with_bias(attention, f"{ours}.kv_a", f"{theirs}.kv_a_proj_with_mqa", (latent, hidden))
    norm = (attention.kv_lora_rank,)
    plan.append(plain(f"{ours}.kv_a_norm.weight", f"{theirs}.kv_a_layernorm.weight", norm, "norm", "keep"))
    plan += _plan_up_projections(attention, ours, f"{theirs}.kv_b_proj.weight")
    plan += _with_bias(attention, f"{ours}.o", f"{theirs}.o_proj", (hidden, attention.num_heads * attention.v_head_dim))
    return plan


def _with_bias(attention: LatentAttentionConfig, ours: str, theirs: str, shape: tuple[int, int]) -> list[Weight]:
    plan = [plain(f"{ours}.weight", f"{theirs}.weight", shape, _ROLE, "linear")]
    if attention.bias:
        plan.append(plain(f"{ours}.bias", f"{theirs}.bias", shape[:1], _ROLE, "keep"))
    return plan


def _plan_up_projections(attention: LatentAttentionConfig, ours: str, source: str) -> list[Weight]:
    """kv_b holds for each head nope rows of keys, then value rows: split, so that decoding can absorb each.

    Those of values in 8 bits where others have 4: they are few, and 4 bits would cost much (docs/decisions.md).
    """
    heads, nope, value, rank = (
        attention.num_heads,
        attention.qk_nope_head_dim,
        attention.v_head_dim,
        attention.kv_lora_rank,
    )
    shape = (heads * (nope + value), rank)
    view = (heads, nope + value, rank)
    keys = Piece(source, shape, view=view, pick=(slice(None), slice(0, nope)))
    values = Piece(source, shape, view=view, pick=(slice(None), slice(nope, nope + value)))
    return [
        Weight(f"{ours}.k_up.weight", (heads, nope, rank), _ROLE, "linear", ((keys,),)),
        Weight(f"{ours}.v_up.weight", (heads, value, rank), _ROLE, "wide", ((values,),)),
    ]
