"""Which token comes next: greedy, or drawn after temperature, top-k, top-p and min-p, in this order.

The order and the meaning of each number are those of transformers' logits warpers. Among equal logits the lower token
id goes first.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, UsageError

# Top-p looks at this many of the most likely tokens first: sorting a whole vocabulary costs more than a layer.
_FIRST_LOOK = 256


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy: then nothing else matters.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 (greedy) or more", lambda value: 0 <= value < math.inf)
        _check("top_k", self.top_k, "a whole number, 0 (off) or more", _is_natural)
        _check("top_p", self.top_p, "above 0 and at most 1 (off)", lambda value: 0 < value <= 1)
        _check("min_p", self.min_p, "from 0 (off) to 1", lambda value: 0 <= value <= 1)
        _check("seed", self.seed, "a whole number, 0 or more", lambda value: value is None or _is_natural(value))

    @classmethod
    def from_defaults(
        cls,
        generation_config: Mapping[str, Any],
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """What the caller gave; for the rest what the model's generation_config says, if it samples (`do_sample`).

        With neither, decoding is greedy. A caller who gives top_k, top_p or min_p alone wants to sample: temperature 1.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        chosen = {name: value for name, value in given.items() if value is not None}
        defaults: dict[str, Any] = {}
        if generation_config.get("do_sample"):
            defaults = {"temperature": 1.0}
            defaults |= {name: generation_config[name] for name in given if generation_config.get(name) is not None}
        elif chosen and temperature is None:
            defaults = {"temperature": 1.0}
        return cls(**{**defaults, **chosen}, seed=seed)


class Sampler:
    """Chooses tokens one after another; two samplers with one seed choose alike."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token's id for the `logits` [vocab].

        Raises:
            EngineError: the logits hold NaN or have no finite maximum.
        """
        best = int(np.argmax(logits))  # NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise EngineError(
                f"the model gave no usable logits (the largest is {float(logits[best])}): the weights or the engine "
                "are damaged; check them with `moedge verify`"
            )
        if self.sampling.temperature == 0:
            return best
        tokens, probabilities = distribution(logits, self.sampling)
        cumulative = np.cumsum(probabilities)
        place = int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
        return int(tokens[min(place, len(tokens) - 1)])


def distribution(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The token ids that may be drawn from `logits` [vocab], ascending, and their probabilities (they sum to 1)."""
    scaled = logits.astype(np.float64)
    if sampling.temperature != 1:
        with np.errstate(over="ignore"):
            scaled = (scaled - scaled.max()) / sampling.temperature
    tokens = np.arange(len(scaled), dtype=np.int64)
    if 0 < sampling.top_k < len(scaled):
        # As in transformers, tokens that tie with the k-th stay too.
        kth = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
        tokens = np.flatnonzero(scaled >= kth)
        scaled = scaled[tokens]
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if sampling.top_p < 1:
        kept = _nucleus(probabilities, sampling.top_p)
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(probabilities >= sampling.min_p * probabilities.max())
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities / probabilities.sum()


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """Places, ascending, of the fewest most likely entries that together reach `top_p`; at least one."""
    look = _FIRST_LOOK
    while True:
        if look < len(probabilities):
            least = np.partition(probabilities, -look)[-look]
            places = np.flatnonzero(probabilities >= least)
        else:
            places = np.arange(len(probabilities))
        order = places[np.argsort(-probabilities[places], kind="stable")]
        cumulative = np.cumsum(probabilities[order])
        if cumulative[-1] >= top_p or len(order) == len(probabilities):
            # The token that crosses top_p is kept: all whose predecessors stay below it.
            count = int(np.searchsorted(cumulative, top_p, side="left")) + 1
            return np.sort(order[:count])
        look *= 8


def _is_natural(value: Any) -> bool:
    return bool(value == int(value) >= 0)


def _check(name: str, value: Any, allowed: str, good: Callable[[Any], bool]) -> None:
    try:
        fits = good(value)  # False for NaN as well: so is every comparison with it
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UsageError(f"{name} is {value!r}; it must be {allowed}")
