"""`MoEConfig`: what every family's config is translated to, and all that the rest of the project knows of a model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import CheckpointError, shorten

# gpt-oss's activation: the slope of its sigmoid, and what gate and up are clamped to.
CLAMPED_SWIGLU_ALPHA = 1.702
CLAMPED_SWIGLU_LIMIT = 7.0


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of `dim` channels a head.

    `inv_freq` [dim/2], radians per position; `attention_factor` multiplies cosine and sine. Two kinds change once a
    sequence has more than `original_length` tokens: "long" (LongRoPE, arXiv:2402.13753) takes `long_inv_freq` and
    `long_attention_factor`, "dynamic" stretches the base `theta` by `factor` and the length.
    """

    dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    interleaved: bool = False
    kind: Literal["fixed", "long", "dynamic"] = "fixed"
    original_length: int = 0
    long_inv_freq: tuple[float, ...] = ()
    long_attention_factor: float = 1.0
    theta: float = 10000.0
    factor: float = 1.0

    @property
    def note(self) -> str | None:
        """What a user has to know of a rope that depends on the sequence's length."""
        if self.kind == "fixed":
            return None
        return (
            f"rotary frequencies change beyond {self.original_length} tokens: each step takes those of the tokens so "
            "far, as transformers does, and keys in the cache keep theirs; so text that grows past that length in "
            "steps (a prompt in pieces of prefill_chunk, too) differs from the same text computed at once"
        )


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
    """A gating op of the moedge domain with its attributes; `bias`: it takes a correction bias [num_experts].

    `base`: the gate whose scores a LoadAwareGate takes.
    """

    op: str
    attributes: dict[str, int | float]
    bias: bool = False
    base: GateConfig | None = None


@dataclass(frozen=True, kw_only=True)
class MoELayersConfig:
    """The sparse layers: which they are, their experts, and their gate.

    `shared_gate`: the shared expert's output is weighed by a sigmoid of its own. `activation` "clamped_swiglu" is
    gpt-oss's, whose experts have biases; `router_bias`: so has the router's matrix.
    """

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    gate: GateConfig
    shared_gate: bool = False
    activation: Literal["swiglu", "clamped_swiglu"] = "swiglu"
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

    def __post_init__(self) -> None:
        experts = len(self.moe.layers) * self.moe.num_experts
        if experts > _MOST_EXPERTS:
            raise CheckpointError(f"config.json: {experts} experts in all layers, at most {_MOST_EXPERTS} expected")
        if self.rope.note is not None and self.rope.note not in self.notes:
            object.__setattr__(self, "notes", (*self.notes, self.rope.note))

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
    given = fields["rope"]
    frequencies = {key: tuple(given.get(key, ())) for key in ("inv_freq", "long_inv_freq")}
    rope = RopeConfig(**{**given, **frequencies})
    moe = dict(fields["moe"])
    gate = _gate_from_json(moe.pop("gate"))
    layers = MoELayersConfig(**{**moe, "layers": tuple(moe["layers"])}, gate=gate)
    return MoEConfig(**{**fields, "attention": attention, "rope": rope, "moe": layers, "notes": tuple(fields["notes"])})


def _gate_from_json(document: dict[str, Any]) -> GateConfig:
    base = document.get("base")
    return GateConfig(**{**document, "base": None if base is None else _gate_from_json(base)})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


# What is counted out one by one, or is the length of a table: far beyond any model, and still soon done.
_MOST = {
    "num_hidden_layers": 4096,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "n_routed_experts": 1 << 14,
    "hidden_size": 1 << 18,
    "head_dim": 1 << 14,
    "qk_rope_head_dim": 1 << 14,
}
_MOST_EXPERTS = 1 << 18  # in all layers together


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

    def __contains__(self, key: str) -> bool:
        return key in self.document

    def _value(self, key: str, default: Any) -> Any:
        """The value, and the default for null too, which is how config.json writes what is not set."""
        value = self.document.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._value(key, default)
        if value is None:
            raise CheckpointError(f"{self.where}: {key} is missing; it is needed for this model family")
        if isinstance(value, bool) or not isinstance(value, int):
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}, an integer was expected")
        most = _MOST.get(key, 1 << 31)
        if value < minimum:
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}, at least {minimum} was expected")
        if value > most:
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}, at most {most} was expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}, a finite number was expected")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}, true or false was expected")
        return value

    def require(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        """The value of `key`, which must be one of `allowed`."""
        value = self._value(key, default)
        if value not in allowed:
            known = ", ".join(repr(item) for item in allowed)
            raise CheckpointError(f"{self.where}: {key} is {shorten(value)}; supported here: {known}")
        return value
