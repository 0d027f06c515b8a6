"""From logits to text: one text as it grows, whoever computes the logits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .requests import TextRequest
from .sampling import Sampler, log_probabilities
from .tokens import StopMatcher, StreamDecoder, Tokenizer


class TokenLogprob(NamedTuple):
    """How likely a token was, by the model's own logits (before penalties, bias and sampling)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens there, with theirs; the likeliest first


class TextWriter:
    """Chooses each token from its logits and gives out text, until the text ends.

    tokens: ids chosen so far, the end token included.
    finish_reason: None while it runs, then "stop" (the model's end token or a stop text), "length", or what `end` said.
    limit: the most tokens to choose; None: no limit.
    logprobs: one for each token, where the request asked.

    Raises:
        UsageError: an empty stop text.
    """

    def __init__(self, request: TextRequest, tokenizer: Tokenizer | None, eos: frozenset[int]) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.limit = request.max_new_tokens
        self._sampler = Sampler(request.sampling, request.prompt)
        self.seed = self._sampler.seed
        self._stops = StopMatcher(request.stop)
        # A model without a tokenizer makes tokens all the same; there is just no text to them.
        self._decoder = None
        if tokenizer is not None:
            self._decoder = StreamDecoder(tokenizer, request.prompt.tolist(), whole=request.whole_prompt)
        self._eos = eos

    def take(self, logits: NDArray[np.float32], best: int | None = None) -> str:
        """Choose the next token from `logits` [vocab]; the text that may be given out now.

        best: the place of the largest logit, where that is known.

        Raises:
            EngineError: the logits hold NaN or have no finite maximum.
        """
        token = self._sampler.choose(logits, best)
        if self.request.logprobs is not None:
            self.logprobs.append(_logprob(logits, token, self.request.logprobs))
        self.tokens.append(token)
        if token in self._eos:
            return self.end("stop")
        text, stopped = self._stops.push(self._decoder.push(token) if self._decoder else "")
        if stopped:
            self.finish_reason = "stop"
        elif self.limit is not None and len(self.tokens) >= self.limit:
            text += self.end("length")
        return text

    def end(self, reason: str) -> str:
        """End the text here; what was held back for an unfinished character or a possible stop text."""
        self.finish_reason = reason
        text, stopped = self._stops.push(self._decoder.finish() if self._decoder else "")
        if stopped:
            self.finish_reason = "stop"
            return text
        return text + self._stops.finish()


def _logprob(logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    values = log_probabilities(logits)
    best: list[int] = []
    if count:
        places = np.argpartition(-values, count - 1)[:count] if count < len(values) else np.arange(len(values))
        best = [int(place) for place in places[np.lexsort((places, -values[places]))]]
    return TokenLogprob(token, float(values[token]), tuple((place, float(values[place])) for place in best))
