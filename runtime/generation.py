"""One text being generated: an iterator over its pieces that also says what came of it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .sampling import Sampler, Sampling
from .tokens import StopMatcher, StreamDecoder

if TYPE_CHECKING:
    from .engine import Engine


class Generation(Iterator[str]):
    """Pieces of text, each of whole characters, as the engine makes them.

    tokens: ids generated so far, the end token included.
    finish_reason: None while it runs, then "stop" (the model's end token or a stop text) or "length".
    limit: the most tokens to make; None: as many as there is room for.
    seed: repeats a sampled text.
    prompt_seconds, seconds: time to the first token, and in all.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: NDArray[np.int64],
        sampling: Sampling,
        *,
        max_new_tokens: int | None,
        stop: Sequence[str],
        whole_prompt: bool,
    ) -> None:
        self.tokens: list[int] = []
        self.prompt_tokens = len(prompt)
        self.finish_reason: str | None = None
        self.sampling = sampling
        self.prompt_seconds = 0.0
        self.seconds = 0.0
        self._engine = engine
        self._prompt = prompt
        self.limit = max_new_tokens
        self._sampler = Sampler(sampling)
        self.seed = self._sampler.seed
        self._stops = StopMatcher(stop)
        self._decoder = StreamDecoder(engine.tokenizer, prompt.tolist(), whole=whole_prompt)
        self._eos = engine.eos_token_ids
        self._turn = 0
        self._pieces = self._run()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def room(self) -> int:
        """The most new tokens that the context can give after the prompt; the last needs no place in it."""
        return self._engine.session.capacity - self.prompt_tokens + 1

    def close(self) -> None:
        """End it here; the engine is free for the next call anyway."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        began = time.perf_counter()
        self._engine.begin()
        self._turn = self._engine.turn
        logits = self._engine.prefill(self._prompt)
        while True:
            token = self._sampler.choose(logits)
            self.tokens.append(token)
            self.seconds = time.perf_counter() - began
            self.prompt_seconds = self.prompt_seconds or self.seconds
            if token in self._eos:
                self.finish_reason = "stop"
                break
            text, stopped = self._stops.push(self._decoder.push(token))
            if text:
                yield text
            if stopped:
                self.finish_reason = "stop"
                return
            if self.limit is not None and len(self.tokens) >= self.limit:
                self.finish_reason = "length"
                break
            full = self._context_end()
            if full is not None:
                yield from self._rest()
                raise full
            if self.finish_reason is not None:
                break
            logits = self._step(token)
        yield from self._rest()

    def _step(self, token: int) -> NDArray[np.float32]:
        if self._engine.turn != self._turn:
            raise EngineError(
                "another call has taken this engine's context while a generation was running: "
                "finish one before the next, or load a second engine"
            )
        return self._engine.session.step(np.array([token]), _FIRST).reshape(-1)

    def _context_end(self) -> EngineError | None:
        """The error of a context without room for another token; without a limit that is just the text's end."""
        session = self._engine.session
        if session.length < session.capacity or self._engine.turn != self._turn:
            return None
        if self.limit is None:
            self.finish_reason = "length"
            return None
        return self._engine.context_full(
            f"{self.prompt_tokens} tokens of the prompt and {len(self.tokens)} of the {self.limit} new ones fill "
            f"the {session.capacity} there is room for"
        )

    def _rest(self) -> Iterator[str]:
        """What was held back for an unfinished character or a possible stop text."""
        text, stopped = self._stops.push(self._decoder.finish())
        if not stopped:
            text += self._stops.finish()
        else:
            self.finish_reason = "stop"
        if text:
            yield text


_FIRST = np.zeros(1, dtype=np.int64)  # the row of the only token
