"""`moedge.load`: an engine of a bundle, ready to give logits, routes and text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, read_json
from ..errors import BundleError, EngineError, UsageError
from .generation import Generation
from .preflight import EngineInfo, check_engine, choose_profile, read_engine
from .sampling import Sampling
from .sessions import Routing, Session, SessionOptions, backend_module
from .tokens import Tokenizer

# Tokens computed at once: a prompt is fed in pieces of this size, so that memory does not grow with it.
PREFILL_CHUNK = 256


def load(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None = None,
    *,
    threads: int | None = None,
    max_seq_len: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Engine:
    """Load an engine of `bundle`: that of `profile`, or the best one that runs on this machine.

    threads: threads that compute; default: the physical cores this process may use.
    max_seq_len: tokens the context has room for; default and limit: what the engine was built for.
    prefill_chunk: tokens of a prompt that are computed at once; memory and the pace of cancelling follow it.

    Raises:
        BundleError: no bundle there. EngineError: no such engine, or it does not fit this bundle or this machine.
        UsageError: a number out of range. DependencyError: the engine's runtime is not installed.
    """
    _check_whole("threads", threads)
    _check_whole("max_seq_len", max_seq_len)
    _check_whole("prefill_chunk", prefill_chunk)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    info = read_engine(opened, profile if profile is not None else choose_profile(opened))
    if max_seq_len is not None and max_seq_len > info.max_seq_len:
        raise EngineError(
            f"max_seq_len {max_seq_len} is more than engine '{info.profile}' was built for ({info.max_seq_len}); "
            f"build it for more: moedge build {opened.path} --profile {info.profile} --max-seq-len {max_seq_len}"
        )
    check_engine(opened, info)
    session = backend_module(info.backend).open_session(opened, info, SessionOptions(threads, max_seq_len))
    return Engine(opened, info, session, prefill_chunk)


class Engine:
    """A loaded engine with one context. Made by `moedge.load`; a context manager that frees the weights at its end.

    Not thread-safe: one call at a time. Each call begins with an empty context, so a generation that is still running
    when another call is made is over.
    """

    def __init__(self, bundle: Bundle, info: EngineInfo, session: Session, prefill_chunk: int = PREFILL_CHUNK) -> None:
        self.bundle = bundle
        self.info = info
        self._open: Session | None = session
        self._chunk = prefill_chunk
        self._tokenizer: Tokenizer | None = None
        self._turn = 0  # counts calls: a generation whose turn has passed stops

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the weights and the cache; a second time does nothing."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's configuration, as in the bundle's manifest."""
        return self.bundle.config

    @property
    def profile(self) -> str:
        """The device profile the engine was built for."""
        return self.info.profile

    @property
    def session(self) -> Session:
        """What executes the engine.

        Raises:
            EngineError: the engine is closed.
        """
        if self._open is None:
            raise EngineError("the engine is closed; load it again: moedge.load(...)")
        return self._open

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, read when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.bundle.path)
        return self._tokenizer

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's generation_config.json; empty where it has none."""
        return self._optional_json("generation_config.json")

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text, by generation_config.json, else by config.json."""
        for document in (self.generation_config, self._optional_json("config.json")):
            found = document.get("eos_token_id")
            if isinstance(found, int):
                return frozenset({found})
            if isinstance(found, list):
                return frozenset(int(token) for token in found)
        return frozenset()

    def tokenize(self, text: str) -> list[int]:
        """Token ids of `text`, with what the model expects at the ends."""
        return self.tokenizer.encode(text)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.tokenizer.decode([int(token) for token in ids])

    def logits(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits [tokens, vocab] after each of the tokens `ids`.

        Raises:
            EngineError: no tokens, a token out of range, too many for the context, or NaN in the result.
        """
        tokens = self.check_tokens(ids)
        result = np.empty((len(tokens), self.info.vocab_size), np.float32)
        session = self.begin()
        for start, part in self._chunks(tokens):
            values = session.step(part, np.arange(len(part)), result[start : start + len(part)])
            if np.isnan(values).any():
                place = start + int(np.isnan(values).any(axis=1).argmax())
                raise EngineError(
                    f"the model gave NaN after token {place}: the weights or the engine are damaged; "
                    f"check them: moedge verify {self.bundle.path}"
                )
        return result

    def routing(self, ids: Sequence[int] | NDArray[np.int64]) -> Routing:
        """The experts (int64) and their weights (float32) that each token took, each [MoE layers, tokens, top_k].

        Raises:
            EngineError: no tokens, a token out of range, or too many for the context.
        """
        tokens = self.check_tokens(ids)
        session = self.begin()
        experts, weights = [], []
        for _, part in self._chunks(tokens):
            session.step(part, np.empty(0, np.int64))
            experts.append(session.routing.experts.copy())
            weights.append(session.routing.weights.copy())
        return Routing(np.concatenate(experts, axis=1), np.concatenate(weights, axis=1))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
    ) -> Generation:
        """Text that goes on from `prompt` (a text, or token ids), as an iterator over pieces of whole characters.

        max_new_tokens: default: until the model ends its text or the context is full.
        temperature, top_k, top_p, min_p: default: the model's generation_config if it says `do_sample`, else greedy
            (temperature 0). Given, they apply in this order. One of the last three alone means temperature 1.
        seed: makes the choice repeat exactly, on this engine and as many threads. Default: another each time.
        stop: texts that end the generation; they are not given out, nor is the model's end token.
        chat: the prompt is a user's message, put into the model's chat template.

        Raises (at once, and the context's end while iterating):
            UsageError: a number out of range. EngineError: the prompt is empty, too long, or has tokens out of range.
        """
        _check_whole("max_new_tokens", max_new_tokens)
        sampling = Sampling.from_defaults(
            self.generation_config, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
        )
        tokens, whole = self._prompt_tokens(prompt, chat)
        return Generation(self, tokens, sampling, max_new_tokens=max_new_tokens, stop=stop, whole_prompt=whole)

    def prefill(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed `tokens` to the context in chunks; the logits [vocab] after the last, valid until the next step."""
        session = self.session
        logits = np.empty((0, 0), np.float32)
        for start, part in self._chunks(tokens):
            last = start + len(part) == len(tokens)
            logits = session.step(part, np.array([len(part) - 1] if last else [], np.int64))
        return logits.reshape(-1)

    def begin(self) -> Session:
        """Empty the context for a new call, which ends any generation that still runs; the session."""
        session = self.session
        self._turn += 1
        session.truncate(0)
        return session

    @property
    def turn(self) -> int:
        """Counts the calls that began with an empty context."""
        return self._turn

    def check_tokens(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """`ids` as int64 [tokens].

        Raises:
            EngineError: none, one out of range, or more than the context has room for.
        """
        capacity = self.session.capacity
        try:
            values = np.asarray(ids)
        except ValueError:
            raise EngineError("token ids must be a list of whole numbers, not lists of several lengths") from None
        if values.size == 0:
            raise EngineError("the prompt is empty: give at least one token")
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise EngineError(f"token ids must be a list of whole numbers, not {values.dtype} of shape {values.shape}")
        wrong = np.flatnonzero((values < 0) | (values >= self.info.vocab_size))
        if len(wrong):
            raise EngineError(
                f"token {values[wrong[0]]} at place {wrong[0]} is out of range: this model's tokens are 0 to "
                f"{self.info.vocab_size - 1}"
            )
        if len(values) > capacity:
            raise self.context_full(f"the prompt has {len(values)} tokens and there is room for {capacity}")
        return np.ascontiguousarray(values, np.int64)

    def context_full(self, what: str) -> EngineError:
        """The error for a context without room; `what` says how full."""
        capacity = self.session.capacity
        built = self.info.max_seq_len
        most = int(self.config.get("max_position_embeddings", 2 * built))
        if capacity < built:
            mend = f"give a shorter prompt, or load with max_seq_len up to {built}"
        elif built < most:
            build = f"moedge build {self.bundle.path} --profile {self.profile} --max-seq-len {min(2 * built, most)}"
            mend = f"give a shorter prompt, or make room: {build}"
        else:
            mend = f"give a shorter prompt (the model has {most} positions)"
        return EngineError(f"context is full: {what}; {mend}")

    def _prompt_tokens(self, prompt: str | Sequence[int], chat: bool) -> tuple[NDArray[np.int64], bool]:
        """Token ids of a prompt, and whether they end with a whole character for sure."""
        if not isinstance(prompt, str):
            if chat:
                raise UsageError("chat takes a text, not token ids: the chat template is text")
            return self.check_tokens(prompt), False
        if chat:
            text = self.tokenizer.chat([{"role": "user", "content": prompt}])
            return self.check_tokens(self.tokenizer.encode(text, special=False)), True
        return self.check_tokens(self.tokenizer.encode(prompt)), True

    def _chunks(self, tokens: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for start in range(0, len(tokens), self._chunk):
            yield start, tokens[start : start + self._chunk]

    def _optional_json(self, name: str) -> dict[str, Any]:
        path = self.bundle.file(name)
        return read_json(path, BundleError) if path.is_file() else {}


def _check_whole(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UsageError(f"{name} is {value!r}; it must be a whole number, 1 or more")
