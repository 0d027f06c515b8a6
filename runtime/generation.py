"""One text being generated: an iterator over its pieces that also says what came of it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .requests import TextRequest, window_tokens
from .writing import TextWriter, TokenLogprob

if TYPE_CHECKING:
    from .context import Context
    from .engine import Engine


class Generation(Iterator[str]):
    """Pieces of text, each of whole characters, as the engine makes them.

    finish_reason: None while it runs, then "stop" (the model's end token or a stop text), "length" or "cancelled".
    reused_tokens: tokens of the prompt that an earlier one had paid for; known with the first piece.
    prompt_seconds, seconds: time to the first token, and in all.
    """

    def __init__(self, engine: Engine, request: TextRequest, *, again: bool = False) -> None:
        self.prompt_tokens = len(request.prompt)
        self.sampling = request.sampling
        self.reused_tokens = 0
        self.prompt_seconds = 0.0
        self.seconds = 0.0
        self._engine = engine
        self._request = request
        self._again = again
        ids_only = not (request.whole_prompt or request.stop or engine.has_tokenizer)
        self._writer = TextWriter(request, None if ids_only else engine.tokenizer, engine.eos_token_ids)
        self._cancelled = False
        self._turn = 0
        self._pieces = self._run()

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, the end token included."""
        return self._writer.tokens

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """How likely each of them was; empty unless asked for."""
        return self._writer.logprobs

    @property
    def finish_reason(self) -> str | None:
        """Why the text ended; None while it runs."""
        return self._writer.finish_reason

    @property
    def seed(self) -> int:
        """Repeats a sampled text."""
        return self._writer.seed

    @property
    def limit(self) -> int | None:
        """The most tokens to make; None: as many as there is room for."""
        return self._writer.limit

    @limit.setter
    def limit(self, value: int | None) -> None:
        self._writer.limit = value

    @property
    def room(self) -> int:
        """The most new tokens that the context can give after the prompt; the last needs no place in it."""
        return self._engine.session.capacity - self.prompt_tokens + 1

    def cancel(self) -> None:
        """End it before the next step or chunk of the prompt; may be called from another thread."""
        self._cancelled = True

    def close(self) -> None:
        """End it here; the engine is free for the next call anyway."""
        self._pieces.close()

    def _run(self) -> Generator[str, None, None]:
        began = time.perf_counter()
        with self._engine.lock:
            context = self._engine.take_context()
            self._turn = self._engine.turn
            self.reused_tokens = context.start(self._request.prompt, again=self._again)
        logits = self._fill(context)
        writer = self._writer
        while logits is not None:
            text = writer.take(logits)
            self.seconds = time.perf_counter() - began
            self.prompt_seconds = self.prompt_seconds or self.seconds
            full = self._context_end(context)
            if full is not None:
                text += writer.end("length")
            if text:
                yield text
            if full is not None and self.limit is not None:
                raise full
            if writer.finish_reason is not None:
                return
            logits = self._step(context, writer.tokens[-1])
        text = writer.end("cancelled")
        if text:
            yield text

    def _fill(self, context: Context) -> NDArray[np.float32] | None:
        """Compute the prompt's chunks; None where it was cancelled between two."""
        while not self._cancelled:
            with self._engine.lock:
                self._check_turn()
                logits = context.advance()
            if logits is not None:
                return logits
        return None

    def _step(self, context: Context, token: int) -> NDArray[np.float32] | None:
        if self._cancelled:
            return None
        with self._engine.lock:
            self._check_turn()
            capacity = context.session.capacity
            if context.session.length < capacity:
                return context.step(token)
            window = [*context.tokens, token][-window_tokens(capacity) :]
            context.start(np.array(window, np.int64))
        return self._fill(context)

    def _check_turn(self) -> None:
        self._engine.session  # noqa: B018  (raises where the engine is closed)
        if self._engine.turn != self._turn:
            raise EngineError(
                "another call has taken this engine's context while a generation was running: "
                "finish one before the next, or load a second engine"
            )

    def _context_end(self, context: Context) -> EngineError | None:
        """The error of a context without room for another token; without a limit that is just the text's end."""
        session = context.session
        if self.finish_reason is not None or self._request.slide or self._engine.turn != self._turn:
            return None
        if session.length < session.capacity:
            return None
        return self._engine.no_room(self._request, len(self.tokens), self.limit)
