"""`MoEConfig`: what every family's config is translated to, and all that the rest of the project knows of a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of `dim` channels a head.

    `inv_freq` float64 [dim/2], radians per position; `attention_factor` multiplies cosine and sine.
    """

    dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values come from one latent a token."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    scale: float
    bias: bool = False
    # transformers builds the norms of q_a and kv_a with its default epsilon, whatever rms_norm_eps says.
    lora_norm_eps: float = 1e-6
    kind: Literal["mla"] = "mla"

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True)
class GroupedAttentionConfig:
    """Multi-head attention whose heads share keys and values in groups (Ainslie et al. 2023, arXiv:2305.13245).

    `qk_norm`: RMSNorm of queries and keys over each head, or over the full width, before the rotation.
    `clip`: the largest magnitude of queries, keys and values. `windows`: for each layer how many tokens are attended
    to, the current one included; 0 for all. `sinks`: a learned logit a head that takes part in the softmax only.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    windows: tuple[int, ...]
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip: float | None = None
    sinks: bool = False
    kind: Literal["gqa"] = "gqa"


AttentionConfig = LatentAttentionConfig | GroupedAttentionConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """A gating op of the moedge domain with its attributes; `bias`: it takes a correction bias [num_experts]."""

    op: str
    attributes: dict[str, int | float]
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoELayersConfig:
    """The sparse layers: which they are, their experts, and their gate.

    `shared_gate`: the shared expert's output is weighed by a sigmoid of its own. `activation` "clamped_swiglu" is
    gpt-oss's; `expert_bias` and `router_bias`: the experts' matrices and the router's have biases.
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    gate: GateConfig
    shared_gate: bool = False
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    expert_bias: bool = False
    router_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A decoder-only language model whose layers are dense or mixtures of experts. Sizes in channels."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention: AttentionConfig
    rope: RopeConfig
    moe: MoELayersConfig
    norm: Literal["rms", "layer"] = "rms"
    head_bias: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
    notes: tuple[str, ...] = field(default=())

    def cache_entries(self) -> list[tuple[str, int]]:
        """(name, width) of each tensor of the KV cache; a token has one row of `width` elements in each."""
        attention = self.attention
        if isinstance(attention, LatentAttentionConfig):
            rows = {"latent": attention.kv_lora_rank, "rope": attention.qk_rope_head_dim}
        else:
            width = attention.num_key_value_heads * attention.head_dim
            rows = {"key": width, "value": width}
        return [(f"{name}.{layer}", width) for layer in range(self.num_hidden_layers) for name, width in rows.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types, for the manifest."""
        document: dict[str, Any] = _plain(dataclasses.asdict(self))
        attention = self.attention
        document["num_attention_heads"] = attention.num_heads
        if isinstance(attention, LatentAttentionConfig):
            document["num_key_value_heads"], document["head_dim"] = attention.num_heads, attention.qk_head_dim
        else:
            document["num_key_value_heads"], document["head_dim"] = attention.num_key_value_heads, attention.head_dim
        return document


def moe_config_from_json(document: dict[str, Any]) -> MoEConfig:
    """The inverse of `MoEConfig.to_json`."""
    fields = {key: value for key, value in document.items() if key in MoEConfig.__dataclass_fields__}
    attention: AttentionConfig
    if fields["attention"]["kind"] == "mla":
        attention = LatentAttentionConfig(**fields["attention"])
    else:
        given = fields["attention"]
        attention = GroupedAttentionConfig(**{**given, "windows": tuple(given["windows"])})
    rope = RopeConfig(**{**fields["rope"], "inv_freq": tuple(fields["rope"]["inv_freq"])})
    moe = dict(fields["moe"])
    gate = GateConfig(**moe.pop("gate"))
    layers = MoELayersConfig(**{**moe, "layers": tuple(moe["layers"])}, gate=gate)
    return MoEConfig(**{**fields, "attention": attention, "rope": rope, "moe": layers, "notes": tuple(fields["notes"])})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class HfConfig:
    """A checkpoint's config.json with typed look-ups that say what is wrong.

    Raises (every look-up):
        CheckpointError: the key is missing, of another type, or out of range.
    """

    def __init__(self, document: dict[str, Any], where: str) -> None:
        self.document = document
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        return self.document.get(key, default)

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self.document.get(key, default)
        if value is None and default is None:
            raise CheckpointError(f"{self.where}: {key} is missing; it is needed for this model family")
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, an integer was expected")
        if not minimum <= value <= 1 << 31:
            raise CheckpointError(f"{self.where}: {key} is {value}, at least {minimum} was expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.document.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, a finite number was expected")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.document.get(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {value!r}, true or false was expected")
        return value

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value of `key`, which must be one of `allowed`."""
        value = self.document.get(key, default)
        if value not in allowed:
            known = ", ".join(repr(item) for item in allowed)
            raise CheckpointError(f"{self.where}: {key} is {value!r}; supported here: {known}")
        return value


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (arXiv:2309.00071, eq. 22, as DeepSeek generalizes it by `mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def read_rope(config: HfConfig, dim: int, *, interleaved: bool, theta: float = 10000.0) -> RopeConfig:
    """Rotary frequencies from `rope_theta` (default: the family's) and `rope_scaling`, as transformers computes them.

    Raises:
        CheckpointError: a rope type that is not known here, or parameters that are missing.
    """
    scaling = config.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{config.where}: rope_scaling is {scaling!r}, an object was expected")
    rope = HfConfig(scaling, f"{config.where}: rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if dim % 2:
        raise CheckpointError(f"{config.where}: the rotary dimension is {dim}, an even number was expected")
    if kind not in _ROPE_KINDS:
        known = ", ".join(sorted(_ROPE_KINDS))
        raise CheckpointError(f"{config.where}: rope type {kind!r} is not known; known: {known}")
    theta = config.number("rope_theta", theta)
    # float32 as in the reference: long contexts multiply the rounding of each frequency by the position.
    inv_freq = (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))).astype(np.float32)
    inv_freq, attention_factor = _ROPE_KINDS[kind](config, rope, inv_freq, theta)
    return RopeConfig(
        dim=dim,
        inv_freq=tuple(float(value) for value in inv_freq),
        attention_factor=attention_factor,
        interleaved=interleaved,
    )


_Frequencies = np.ndarray[Any, np.dtype[np.float32]]


def _default(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> tuple[_Frequencies, float]:
    return inv_freq, 1.0


def _linear(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> tuple[_Frequencies, float]:
    return inv_freq / np.float32(rope.number("factor")), 1.0


def _yarn(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> tuple[_Frequencies, float]:
    """YaRN (arXiv:2309.00071): interpolate the slow channels, keep the fast ones, a ramp between."""
    factor = rope.number("factor")
    dim = 2 * len(inv_freq)
    original = rope.get("original_max_position_embeddings") or config.integer("max_position_embeddings")
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        attention_factor = yarn_mscale(factor)
        if mscale and mscale_all_dim:
            attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)

    def channel_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(rope.get("beta_fast") or 32), channel_of(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    return (inv_freq / np.float32(factor) * (1 - keep) + inv_freq * keep).astype(np.float32), float(attention_factor)


def _llama3(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> tuple[_Frequencies, float]:
    """Llama 3.1's scaling: long waves are divided by `factor`, short ones kept, smooth between."""
    factor = rope.number("factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = rope.integer("original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    mixed = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return np.where(between, mixed, scaled).astype(np.float32), 1.0


_ROPE_KINDS = {"default": _default, "linear": _linear, "yarn": _yarn, "llama3": _llama3}
