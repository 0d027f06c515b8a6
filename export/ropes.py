"""Rotary frequencies from `rope_theta` and `rope_scaling`, as transformers computes them (modeling_rope_utils.py).

A checkpoint's rope type is one of `ROPE_KINDS`; each has a function here that gives `RopeConfig`'s fields.

`dynamic` and `longrope` depend on the sequence's length. The rule is transformers': a step takes the frequencies for
the tokens there are at its end, and keys that are in the cache keep the rotation they were given. So a prompt computed
at once equals transformers' whole prompt, one computed in pieces equals transformers' with a cache in the same pieces,
and the two differ once the length is passed; the export says so in its notes (`RopeConfig.note`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import CheckpointError, shorten
from .config import HfConfig, RopeConfig

_Frequencies = np.ndarray[Any, np.dtype[np.float32]]
_Fields = dict[str, Any]
_MOST_CHANNELS = 1 << 16


def read_rope(
    config: HfConfig, dim: int, *, interleaved: bool, theta: float = 10000.0, kinds: tuple[str, ...] = ()
) -> RopeConfig:
    """The rope of `dim` channels; `theta`: the family's default base; `kinds`: the types it has, all unless given.

    Raises:
        CheckpointError: a rope type that is not known here, or parameters that are missing.
    """
    rope = read_scaling(config)
    kind = rope_kind(rope)
    known = sorted(kinds or ROPE_KINDS)
    if kind not in known:
        raise CheckpointError(f"{config.where}: rope type {shorten(kind)} is not known; known: {', '.join(known)}")
    if dim % 2 or dim > _MOST_CHANNELS:
        raise CheckpointError(
            f"{config.where}: the rotary dimension is {dim}, an even number up to {_MOST_CHANNELS} was expected"
        )
    theta = config.number("rope_theta", rope.number("rope_theta", theta))
    if theta <= 1:
        raise CheckpointError(f"{config.where}: rope_theta is {theta}, more than 1 was expected")
    # float32 as in the reference: long contexts multiply the rounding of each frequency by the position.
    inv_freq = (1.0 / (theta ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)))).astype(np.float32)
    fields = ROPE_KINDS[kind](config, rope, inv_freq, theta)
    return RopeConfig(dim=dim, interleaved=interleaved, **fields)


def read_scaling(config: HfConfig) -> HfConfig:
    """`rope_scaling`, or `rope_parameters` as transformers 5 calls it; empty where there is none."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    scaling = config.get(key) or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{config.where}: {key} is {shorten(scaling)}, an object was expected")
    if by_type := [name for name, value in scaling.items() if isinstance(value, dict)]:
        raise CheckpointError(f"{config.where}: {key} differ by layer type ({', '.join(by_type)}); one was expected")
    return HfConfig(scaling, f"{config.where}: {key}")


def rope_kind(rope: HfConfig) -> Any:
    """The type that `rope_scaling` names; older checkpoints call the key `type`."""
    return rope.get("rope_type", rope.get("type", "default"))


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's attention temperature (arXiv:2309.00071, eq. 22, as DeepSeek generalizes it by `mscale`)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _as_floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _default(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    return {"inv_freq": _as_floats(inv_freq)}


def _linear(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    """Positions divided by `factor`."""
    return {"inv_freq": _as_floats(inv_freq / np.float32(_positive(rope, "factor")))}


def _positive(rope: HfConfig, key: str, default: float | None = None) -> float:
    value = rope.number(key, default)
    if value <= 0:
        raise CheckpointError(f"{rope.where}: {key} is {value}, more than 0 was expected")
    return value


def _yarn(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    """YaRN (arXiv:2309.00071): interpolate the slow channels, keep the fast ones, a ramp between."""
    factor = _positive(rope, "factor")
    dim = 2 * len(inv_freq)
    given = rope if rope.get("original_max_position_embeddings") else config
    original = given.integer("original_max_position_embeddings" if given is rope else "max_position_embeddings")
    attention_factor = yarn_mscale(factor)
    if rope.get("attention_factor") is not None:
        attention_factor = rope.number("attention_factor")
    elif rope.get("mscale") and rope.get("mscale_all_dim"):
        attention_factor = yarn_mscale(factor, rope.number("mscale")) / yarn_mscale(
            factor, rope.number("mscale_all_dim")
        )
    fast, slow = (_positive(rope, key, default) for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))

    def channel_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel_of(fast), channel_of(slow)
    if rope.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    keep = (1 - ramp).astype(np.float32)
    mixed = (inv_freq / np.float32(factor) * (1 - keep) + inv_freq * keep).astype(np.float32)
    return {"inv_freq": _as_floats(mixed), "attention_factor": attention_factor}


def _llama3(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    """Llama 3.1's scaling: long waves are divided by `factor`, short ones kept, smooth between."""
    factor = _positive(rope, "factor")
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    original = rope.integer("original_max_position_embeddings")
    if not 0 < low < high:
        raise CheckpointError(
            f"{rope.where}: high_freq_factor {high} is not above low_freq_factor {low}; correct config.json"
        )
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    mixed = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = np.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return {"inv_freq": _as_floats(np.where(between, mixed, scaled).astype(np.float32))}


def _dynamic(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    """NTK-aware scaling by the length: nothing changes up to `max_position_embeddings`, then the base grows."""
    dim = 2 * len(inv_freq)
    if dim <= 2:
        raise CheckpointError(f"{config.where}: the rotary dimension is {dim}, dynamic scaling needs 4 or more")
    return {
        "inv_freq": _as_floats(inv_freq),
        "kind": "dynamic",
        "original_length": config.integer("max_position_embeddings"),
        "theta": theta,
        "factor": _positive(rope, "factor"),
    }


def _longrope(config: HfConfig, rope: HfConfig, inv_freq: _Frequencies, theta: float) -> _Fields:
    """LongRoPE (arXiv:2402.13753): one list of divisors up to the original length, another beyond.

    The original length is config.json's own key; without it `max_position_embeddings` is, and `factor` says how far
    the model was stretched.
    """
    most = config.integer("max_position_embeddings", minimum=2)
    original = config.integer("original_max_position_embeddings", most, minimum=2)
    factor = most / original if config.get("original_max_position_embeddings") else rope.number("factor", 1.0)
    attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    if rope.get("attention_factor") is not None:
        attention_factor = rope.number("attention_factor")
    divisors = {key: _read_factors(rope, key, len(inv_freq)) for key in ("short_factor", "long_factor")}
    wave = np.float32(theta) ** (np.arange(len(inv_freq), dtype=np.float32) * 2 / np.float32(2 * len(inv_freq)))
    return {
        "inv_freq": _as_floats(1 / (divisors["short_factor"] * wave)),
        "long_inv_freq": _as_floats(1 / (divisors["long_factor"] * wave)),
        "attention_factor": attention_factor,
        "long_attention_factor": attention_factor,
        "kind": "long",
        "original_length": original,
    }


def _read_factors(rope: HfConfig, key: str, count: int) -> _Frequencies:
    values = rope.get(key)
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(type(value) in (int, float) and 0 < value < math.inf for value in values)
    ):
        raise CheckpointError(f"{rope.where}: {key} is not a list of {count} positive numbers, one a rotary pair")
    return np.array(values, np.float32)


ROPE_KINDS = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
