"""Which token comes next: greedy, or drawn after temperature, top-k, top-p and min-p, in this order.

Before that, greedy or not: the logit bias, the repetition penalty (over prompt and new tokens), then the frequency
and presence penalties (over new tokens, as OpenAI defines them). Order and meaning of each number are those of
transformers' logits processors, where it has them. Among equal logits the lower token id goes first.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, UsageError

# Top-p looks at tokens with at least this share of the likeliest one's probability first: sorting a whole vocabulary
# costs more than a layer.
_LOOKS = (2.0**-10, 2.0**-20, 0.0)

_BLOCK = 512  # tokens that are summed before one of them is drawn

# Penalties and biases go no further: a logit must stay a finite float32.
_MOST = 1e6


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy: then only penalties and bias matter beside it.

    Raises:
        UsageError: a number out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0  # above 1: logits of tokens in the text so far are divided (negative: multiplied)
    presence_penalty: float = 0.0  # taken once from each token that was generated
    frequency_penalty: float = 0.0  # taken from a token for each time it was generated
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token -> what is added to its logit

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "0 (greedy) or more", lambda value: 0 <= value < math.inf)
        _check("top_k", self.top_k, "a whole number, 0 (off) or more", _is_natural)
        _check("top_p", self.top_p, "above 0 and at most 1 (off)", lambda value: 0 < value <= 1)
        _check("min_p", self.min_p, "from 0 (off) to 1", lambda value: 0 <= value <= 1)
        _check("seed", self.seed, "a whole number, 0 or more", lambda value: value is None or _is_natural(value))
        repetition = "from 0.000001 to 1000000 (1 is off)"
        _check("repetition_penalty", self.repetition_penalty, repetition, lambda value: 1 / _MOST <= value <= _MOST)
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), "from -1000000 to 1000000 (0 is off)", _is_moderate)
        _check("logit_bias", self.logit_bias, "{token: number}", lambda value: isinstance(value, Mapping))
        for token, bias in self.logit_bias.items():
            _check("a token of logit_bias", token, "a whole number, 0 or more", _is_natural)
            _check(f"logit_bias of token {token}", bias, "from -1000000 to 1000000", _is_moderate)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed by what came before, or by a bias."""
        return bool(
            self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias
        )

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
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Sampling:
        """What the caller gave; for the rest what the model's generation_config says, if it samples (`do_sample`).

        With neither, decoding is greedy. A caller who gives top_k, top_p or min_p alone wants to sample: temperature 1.
        The model's own repetition penalty holds for greedy decoding too, as in transformers.
        """
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        chosen = {name: value for name, value in given.items() if value is not None}
        defaults: dict[str, Any] = {}
        if generation_config.get("do_sample"):
            defaults = {"temperature": 1.0}
            defaults |= {name: generation_config[name] for name in given if generation_config.get(name) is not None}
        elif chosen and temperature is None:
            defaults = {"temperature": 1.0}
        if repetition_penalty is None:
            repetition_penalty = generation_config.get("repetition_penalty") or 1.0
        return cls(
            **{**defaults, **chosen},
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias or {},
        )


class Sampler:
    """Chooses tokens one after another; two samplers with one seed choose alike.

    `prompt` are the tokens before the first, which the repetition penalty counts in.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | NDArray[np.int64] = ()) -> None:
        self.sampling = sampling
        self._adjuster = _Adjuster(sampling, prompt) if sampling.adjusts else None
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self._random: np.random.Generator | None = None

    def choose(self, logits: NDArray[np.float32], best: int | None = None) -> int:
        """The next token's id for the `logits` [vocab]; `best`: the place of the largest (of NaN, where there is any).

        Raises:
            EngineError: the logits hold NaN or have no finite maximum.
        """
        if best is None:
            best = int(logits.argmax())  # NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise EngineError(
                f"the model gave no usable logits (the largest is {float(logits[best])}): the weights or the engine "
                "are damaged; check them with `moedge verify`"
            )
        if self._adjuster is None:
            return self._draw(logits, best)
        adjusted = self._adjuster.adjust(logits)
        token = self._draw(adjusted, int(adjusted.argmax()))
        self._adjuster.count(token)
        return token

    def _draw(self, logits: NDArray[np.float32], best: int) -> int:
        if self.sampling.temperature == 0:
            return best
        if self._random is None:  # a generator takes longer to make than a greedy token to choose
            self._random = np.random.Generator(np.random.PCG64(self.seed))
        tokens, weights = _weigh(logits, self.sampling)
        place = _pick(weights, self._random.random())
        return place if tokens is None else int(tokens[place])


class _Adjuster:
    """Bias and penalties over one text. The tokens it touches are few, so it works on those alone."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int] | NDArray[np.int64]) -> None:
        self._sampling = sampling
        self._counts: dict[int, int] = {}  # of generated tokens
        self._seen = dict.fromkeys(int(token) for token in prompt) if sampling.repetition_penalty != 1 else {}
        self._bias_tokens = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)

    def count(self, token: int) -> None:
        """Take a generated token into account."""
        self._counts[token] = self._counts.get(token, 0) + 1
        self._seen[token] = None

    def adjust(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """`logits` [vocab] after bias and penalties, as a new array."""
        sampling, result = self._sampling, logits.copy()
        if len(self._bias_tokens):
            result[self._bias_tokens] += self._bias
        if sampling.repetition_penalty != 1 and self._seen:
            places = np.fromiter(self._seen, np.int64, len(self._seen))
            scores, penalty = result[places], np.float32(sampling.repetition_penalty)
            result[places] = np.where(scores < 0, scores * penalty, scores / penalty)
        if (sampling.presence_penalty or sampling.frequency_penalty) and self._counts:
            places = np.fromiter(self._counts, np.int64, len(self._counts))
            times = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            result[places] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)
        return result


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """The logarithm of each token's probability by the model's own `logits` [vocab], before any sampling rule."""
    values = logits.astype(np.float64)
    values -= values.max()
    result: NDArray[np.float64] = values - np.log(np.exp(values).sum())
    return result


def distribution(
    logits: NDArray[np.float32], sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The token ids that may be drawn from `logits` [vocab], ascending, and their probabilities (they sum to 1)."""
    tokens, weights = _weigh(logits, sampling)
    return np.arange(len(weights)) if tokens is None else tokens, weights / weights.sum()


def _weigh(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64] | None, NDArray[np.float64]]:
    """The tokens that may be drawn, ascending (None: all), and what their probabilities are proportional to.

    In place wherever it can be: new arrays of a vocabulary's size cost more than what is computed in them.
    """
    tokens = None
    if 0 < sampling.top_k < len(logits):
        # As in transformers, tokens that tie with the k-th stay too.
        tokens = np.flatnonzero(logits >= np.partition(logits, -sampling.top_k)[-sampling.top_k])
        logits = logits[tokens]
    weights = logits.astype(np.float64)
    weights -= weights.max()
    if sampling.temperature != 1:
        with np.errstate(over="ignore"):
            weights /= sampling.temperature
    np.exp(weights, out=weights)
    for kept in (_nucleus, _likely):
        places = kept(weights, sampling)
        if places is not None:
            tokens, weights = places if tokens is None else tokens[places], weights[places]
    return tokens, weights


def _nucleus(weights: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64] | None:
    """Places, ascending, of the fewest most likely tokens that together reach top_p; at least one. None: all."""
    if sampling.top_p >= 1:
        return None
    wanted, largest = sampling.top_p * weights.sum(), weights.max()
    for share in _LOOKS:
        places = np.flatnonzero(weights >= share * largest)
        found = weights[places]
        descending = np.sort(found)[::-1]
        cumulative = np.cumsum(descending)
        if cumulative[-1] >= wanted:
            break
    # The token that crosses top_p is kept: all whose predecessors stay below it; of those as likely the first ones.
    count = min(int(np.searchsorted(cumulative, wanted, side="left")) + 1, len(places))
    kept = found > descending[count - 1]
    kept[np.flatnonzero(found == descending[count - 1])[: count - np.count_nonzero(kept)]] = True
    chosen: NDArray[np.int64] = places[kept]
    return chosen


def _likely(weights: NDArray[np.float64], sampling: Sampling) -> NDArray[np.int64] | None:
    """Places, ascending, of the tokens that min_p leaves; None: all."""
    return np.flatnonzero(weights >= sampling.min_p * weights.max()) if sampling.min_p > 0 else None


def _pick(weights: NDArray[np.float64], draw: float) -> int:
    """The place that a `draw` from [0, 1) falls on where each is as wide as its weight."""
    sums = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)))
    sought = draw * sums[-1]
    # A product that was rounded up to the whole is of the last block that adds to it.
    block = min(int(np.searchsorted(sums, sought, side="right")), int(np.searchsorted(sums, sums[-1])))
    part = weights[block * _BLOCK : (block + 1) * _BLOCK]
    place = int(np.searchsorted(np.cumsum(part), sought - (sums[block - 1] if block else 0.0), side="right"))
    # Sums that were rounded another way may end before it: then the last that can be drawn.
    return block * _BLOCK + (place if place < len(part) else int(np.flatnonzero(part)[-1]))


def _is_natural(value: Any) -> bool:
    return operator.index(value) >= 0  # TypeError: no whole number, be it 2.0


def _is_moderate(value: Any) -> bool:
    return bool(-_MOST <= value <= _MOST)


def _check(name: str, value: Any, allowed: str, good: Callable[[Any], bool]) -> None:
    try:
        fits = good(value)  # False for NaN as well: so is every comparison with it
    except (TypeError, ValueError, OverflowError):
        fits = False
    if not fits:
        raise UsageError(f"{name} is {value!r}; it must be {allowed}")
