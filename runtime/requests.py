"""What is asked of the model for one text: the prompt as tokens, how tokens are chosen, where it ends."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError, UsageError
from .sampling import Sampling

if TYPE_CHECKING:
    from .engine import Engine

# What happens when the context is full while text is still to come.
CONTEXT_ENDS = ("error", "slide")
MOST_LOGPROBS = 20


class ContextFull(EngineError):
    """There is no room in the context for the prompt, or for as many new tokens as were asked for."""


class Options(TypedDict, total=False):
    """The options of `Engine.generate`, for what hands them on."""

    max_new_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    stop: Sequence[str]
    chat: bool
    logprobs: int | None
    context_end: str


@dataclass(frozen=True)
class TextRequest:
    """One text to generate. Made by `make_request`, which checks it against the engine."""

    prompt: NDArray[np.int64]
    whole_prompt: bool  # the prompt's tokens end with a whole character for sure
    sampling: Sampling
    max_new_tokens: int | None  # None: until the model ends its text or the context is full
    stop: tuple[str, ...]
    logprobs: int | None  # how many alternatives to each token to report; None: no log-probabilities at all
    slide: bool  # at the context's end go on with the newer half of the text


def make_request(
    engine: Engine,
    prompt: str | Sequence[int] | NDArray[np.int64],
    *,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    logprobs: int | None = None,
    context_end: str = "error",
    **sampling: Any,
) -> TextRequest:
    """Check everything a text is asked with; the options are those of `Engine.generate`.

    Raises:
        UsageError: a number out of range. EngineError: the prompt is empty, too long, or has tokens out of range.
    """
    check_whole("max_new_tokens", max_new_tokens)
    if context_end not in CONTEXT_ENDS:
        raise UsageError(f"context_end is {context_end!r}; it must be one of {', '.join(CONTEXT_ENDS)}")
    most = min(MOST_LOGPROBS, engine.info.vocab_size)
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= most):
        raise UsageError(f"logprobs is {logprobs!r}; it must be a whole number from 0 to {most}")
    chosen = Sampling.from_defaults(engine.generation_config, **sampling)
    unknown = [token for token in chosen.logit_bias if token >= engine.info.vocab_size]
    if unknown:
        raise UsageError(
            f"logit_bias has token {unknown[0]}, which is out of range: this model's tokens are 0 to "
            f"{engine.info.vocab_size - 1}"
        )
    if isinstance(stop, str) or not isinstance(stop, Sequence):
        raise UsageError(f"stop must be a list of texts, not {'the text ' if isinstance(stop, str) else ''}{stop!r}")
    slide = context_end == "slide"
    tokens = _prompt_tokens(engine, prompt, chat, slide)
    return TextRequest(tokens, isinstance(prompt, str), chosen, max_new_tokens, tuple(stop), logprobs, slide)


def check_whole(name: str, value: int | None) -> None:
    """Raise UsageError unless `value` is None or a whole number from 1."""
    if value is not None and (type(value) is not int or value < 1):
        raise UsageError(f"{name} is {value!r}; it must be a whole number, 1 or more")


def _prompt_tokens(
    engine: Engine, prompt: str | Sequence[int] | NDArray[np.int64], chat: bool, slide: bool
) -> NDArray[np.int64]:
    """Token ids of a prompt, checked; of one too long for a sliding context the end that fits."""
    ids: Sequence[int] | NDArray[np.int64]
    if not isinstance(prompt, str):
        if chat:
            raise UsageError("chat takes a text, not token ids: the chat template is text")
        ids = prompt
    elif chat:
        text = engine.tokenizer.chat([{"role": "user", "content": prompt}])
        ids = engine.tokenizer.encode(text, special=False)
    else:
        ids = engine.tokenizer.encode(prompt)
    if slide:
        tokens = engine.check_tokens(ids, most=sys.maxsize)
        capacity = engine.session.capacity
        return tokens if len(tokens) <= capacity else tokens[-window_tokens(capacity) :]
    return engine.check_tokens(ids)


def window_tokens(capacity: int) -> int:
    """Tokens that stay when a full context of `capacity` slides: half, so that it is rare: they are recomputed."""
    return max(1, capacity // 2)
