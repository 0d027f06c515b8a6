"""`moedge.load`: an engine of a bundle, ready to give logits, routes and text."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import WEIGHTS, Bundle, read_json
from ..errors import BundleError, EngineError, UsageError
from .context import REUSE, Context, PrefixStore
from .generation import Generation
from .machine import trim_heap
from .preflight import EngineInfo, check_engine, choose_profile, read_engine
from .requests import ContextFull, TextRequest, check_whole, make_request
from .residence import LockedFile
from .sessions import Routing, Session, SessionOptions, backend_module
from .tokens import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .requests import Options

# A prompt is fed in pieces, so that memory does not grow with it: of so many tokens while others wait. It is also the
# grain in which an earlier prompt's beginning is used again.
PREFILL_CHUNK = 64
PREFILL_AT_ONCE = 4  # chunks, where no bit depends on the cut; more gain little and take long to be cancelled
TOKENIZER = "tokenizer.json"
# Bytes of cache rows kept of earlier prompts' beginnings.
PREFIX_BYTES = 128 << 20
MOST_THREADS = 1024


def load(
    bundle: str | os.PathLike[str] | Bundle,
    profile: str | None = None,
    *,
    threads: int | None = None,
    max_seq_len: int | None = None,
    lanes: int = 1,
    prefill_chunk: int | None = None,
    reuse: str = "exact",
    prefix_bytes: int = PREFIX_BYTES,
    lock_weights: bool = False,
) -> Engine:
    """Load an engine of `bundle`: that of `profile`, or the best one that runs on this machine.

    threads: threads that compute; default: the physical cores this process may use.
    max_seq_len: tokens the context has room for; default and limit: what the engine was built for.
    lanes: texts that a scheduler is to step together, if the engine can; more than 1 costs a single text a little.
        Last bits differ between engines loaded for one and for several, but not with how many run at a time.
    prefill_chunk: tokens of a prompt that are computed at once; memory and the pace of cancelling follow it. Default:
        64, and 256 while nobody waits where the engine's results do not depend on it.
    reuse: what a prompt need not compute again because an earlier one began alike: "exact" (whole chunks: the answer is
        the same, bit for bit, as without), "all" (every token, also generated ones; the last bits may differ), "off".
    prefix_bytes: the most memory for beginnings of earlier prompts; least recently used goes first. 0: only what the
        context itself still holds.
    lock_weights: keep them in memory (mlock), where they are mapped from the bundle; else the system may drop what was
        not used for a while, and read it again when it is.

    Raises:
        BundleError: no bundle there. EngineError: no such engine, or it does not fit this bundle or this machine.
        UsageError: a number out of range. DependencyError: the engine's runtime is not installed.
    """
    check_whole("threads", threads)
    if threads is not None and threads > MOST_THREADS:
        raise UsageError(f"threads is {threads}; it must be at most {MOST_THREADS}")
    check_whole("max_seq_len", max_seq_len)
    check_whole("lanes", lanes)
    check_whole("prefill_chunk", prefill_chunk)
    if reuse not in REUSE:
        raise UsageError(f"reuse is {reuse!r}; it must be one of {', '.join(REUSE)}")
    if type(prefix_bytes) is not int or prefix_bytes < 0:
        raise UsageError(f"prefix_bytes is {prefix_bytes!r}; it must be a whole number, 0 (off) or more")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    info = read_engine(opened, profile if profile is not None else choose_profile(opened))
    if max_seq_len is not None and max_seq_len > info.max_seq_len:
        raise EngineError(
            f"max_seq_len {max_seq_len} is more than engine '{info.profile}' was built for ({info.max_seq_len}); "
            f"build it for more: moedge build {opened.path} --profile {info.profile} --max-seq-len {max_seq_len}"
        )
    check_engine(opened, info)
    options = SessionOptions(threads, max_seq_len, lanes=lanes)
    with contextlib.ExitStack() as held:
        if lock_weights:
            held.callback(LockedFile(opened.path / WEIGHTS).close)
        session = backend_module(info.backend).open_session(opened, info, options)
        return Engine(
            opened, info, session, prefill_chunk, reuse=reuse, prefix_bytes=prefix_bytes, held=held.pop_all()
        )


class Engine:
    """A loaded engine with one context. Made by `moedge.load`; a context manager that frees the weights at its end.

    Thread-safe: calls from several threads take turns, a step at a time. But there is one context: each call takes it,
    so a generation that is still running when another call is made is over (an error says so). Many texts at once are
    the affair of `moedge.runtime.scheduler.Scheduler` and `moedge.runtime.aio.AsyncEngine`, over the same engine.
    """

    def __init__(
        self,
        bundle: Bundle,
        info: EngineInfo,
        session: Session,
        prefill_chunk: int | None = None,
        *,
        reuse: str = "exact",
        prefix_bytes: int = PREFIX_BYTES,
        held: contextlib.ExitStack | None = None,
    ) -> None:
        """`held`: what is let go when the engine is closed."""
        at_once = PREFILL_AT_ONCE if prefill_chunk is None and session.cuts_alike else 1
        prefill_chunk = PREFILL_CHUNK if prefill_chunk is None else prefill_chunk
        if (bundle.config.get("rope") or {}).get("kind", "fixed") != "fixed":
            # Frequencies that follow the tokens so far: only a prompt computed whole is what the model was trained on.
            prefill_chunk = max(prefill_chunk, info.max_seq_len)
        self.bundle = bundle
        self.info = info
        self.lock = threading.RLock()  # held for each step
        self.prefixes = PrefixStore(prefix_bytes)
        self._open: Session | None = session
        self._held = held or contextlib.ExitStack()
        self._chunk = prefill_chunk
        self._reuse = reuse
        self._at_once = at_once
        self._context = Context(session, prefill_chunk, self.prefixes, reuse, at_once)
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
        with self.lock:
            if self._open is not None:
                self._open.close()
                self._open = None
                self._held.close()
                self.prefixes.clear()
                trim_heap()  # the next engine's pieces do not fit in the holes of this one's: each load would take more

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
        with self.lock:
            if self._tokenizer is None:
                self._tokenizer = Tokenizer(self.bundle.path)
            return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the bundle has one; without it `generate` takes token ids and gives `Generation.tokens` alone."""
        return self.bundle.file(TOKENIZER).is_file()

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """The model's generation_config.json; empty where it has none."""
        return self._optional_json("generation_config.json")

    @cached_property
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
        """The text of token ids, without special tokens.

        Raises:
            EngineError: one is no token of this model.
        """
        given = list(ids)
        return self.tokenizer.decode(self.check_tokens(given, most=len(given)).tolist()) if given else ""

    def logits(self, ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The logits [tokens, vocab] after each of the tokens `ids`.

        Raises:
            EngineError: no tokens, a token out of range, too many for the context, or NaN in the result.
        """
        tokens = self.check_tokens(ids)
        result = np.empty((len(tokens), self.info.vocab_size), np.float32)
        with self.lock:
            session = self.begin()
            for start, part in self._chunks(tokens):
                session.step(part, np.arange(len(part)), result[start : start + len(part)])
        for start, values in self._chunks(result):
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
        experts, weights = [], []
        with self.lock:
            session = self.begin()
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
        repetition_penalty: float | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        stop: Sequence[str] = (),
        chat: bool = False,
        logprobs: int | None = None,
        context_end: str = "error",
    ) -> Generation:
        """Text that goes on from `prompt` (a text, or token ids), as an iterator over pieces of whole characters.

        max_new_tokens: default: until the model ends its text or the context is full.
        temperature, top_k, top_p, min_p: default: the model's generation_config if it says `do_sample`, else greedy
            (temperature 0). Given, they apply in this order. One of the last three alone means temperature 1.
        seed: makes the choice repeat exactly, on this engine and as many threads. Default: another each time.
        repetition_penalty: divides the positive logits of tokens in prompt and text, multiplies the negative ones;
            default: the model's own, else 1, which is off.
        presence_penalty, frequency_penalty: taken from the logit of a generated token: once, and for each time.
        logit_bias: token -> what is added to its logit.
        stop: texts that end the generation; they are not given out, nor is the model's end token.
        chat: the prompt is a user's message, put into the model's chat template.
        logprobs: record each token's log-probability, and those of so many alternatives: `Generation.logprobs`.
        context_end: what a full context means for a text that is to be longer: "error", or "slide": go on from its
            newer half, computed anew, as often as needed; of a prompt too long the newest tokens are taken.

        Raises (at once, and the context's end while iterating):
            UsageError: a number out of range. EngineError: the prompt is empty, too long, or has tokens out of range.
        """
        request = make_request(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            stop=stop,
            chat=chat,
            logprobs=logprobs,
            context_end=context_end,
        )
        return Generation(self, request)

    def samples(self, prompt: str | Sequence[int], n: int, **options: Unpack[Options]) -> Iterator[Generation]:
        """`n` texts from one prompt, which is computed once; each is to be read before the next is asked for.

        The options are those of `generate`; with a `seed` the texts have this one and those that follow it.

        Raises:
            UsageError, EngineError: as `generate`, at once.
        """
        check_whole("n", n)
        first = make_request(self, prompt, **options)
        return self._samples(first, n)

    def _samples(self, request: TextRequest, n: int) -> Iterator[Generation]:
        seed = request.sampling.seed
        for index in range(n):
            sampling = request.sampling if seed is None else replace(request.sampling, seed=seed + index)
            yield Generation(self, replace(request, sampling=sampling), again=index > 0)

    def save_snapshot(self, path: str | os.PathLike[str]) -> int:
        """Write the context to a file, for `load_snapshot`: the last prompt's tokens and their cache; how many.

        Raises:
            EngineError: no prompt has been computed since the last other call.
        """
        from .snapshot import write_snapshot

        with self.lock:
            return write_snapshot(self.bundle, self.info, self._context, Path(path))

    def load_snapshot(self, path: str | os.PathLike[str]) -> int:
        """Take a saved context: a prompt that begins with its tokens pays only for what follows. How many tokens.

        The prompt that was computed when it was saved costs nothing; of others that begin with it whole chunks are used
        again, and with `reuse="all"` every token.

        Raises:
            EngineError: no snapshot there, damaged, of another bundle or engine, or too long for this context.
        """
        from .snapshot import read_snapshot

        with self.lock:
            self.session  # noqa: B018  (raises where the engine is closed)
            count = read_snapshot(self.bundle, self.info, self._context, Path(path))
            self._turn += 1  # a generation that still runs is over; a snapshot that is refused ends none
            return count

    def prefill(self, tokens: NDArray[np.int64], session: Session | None = None) -> NDArray[np.float32]:
        """Feed `tokens` to the context, or to a further sequence of it, in chunks.

        The logits [vocab] after the last, valid until the next step.
        """
        session = session or self.session
        logits = np.empty((0, 0), np.float32)
        for start, part in self._chunks(tokens, self.prefill_tokens):
            last = start + len(part) == len(tokens)
            logits = session.step(part, np.array([len(part) - 1] if last else [], np.int64))
        return logits.reshape(-1)

    def begin(self) -> Session:
        """Empty the context for a new call, which ends any generation that still runs; the session."""
        with self.lock:
            session = self.session
            self._turn += 1
            self._context.clear()
            return session

    def take_context(self) -> Context:
        """The context for a new prompt, with what it holds; ends any generation that still runs."""
        with self.lock:
            self.session  # noqa: B018  (raises where the engine is closed)
            self._turn += 1
            return self._context

    def new_context(self) -> Context:
        """A further, empty context over the same weights, which shares what is kept of prompts' beginnings.

        Raises:
            EngineError: its cache does not fit the memory, or the engine is closed.
        """
        return Context(self.session.another(), self._chunk, self.prefixes, self._reuse, self._at_once)

    @property
    def turn(self) -> int:
        """Counts the calls that began with an empty context."""
        return self._turn

    def check_tokens(self, ids: Sequence[int] | NDArray[np.int64], most: int | None = None) -> NDArray[np.int64]:
        """`ids` as int64 [tokens].

        Raises:
            EngineError: none, one out of range, or more than `most` (default: what the context has room for).
        """
        capacity = self.session.capacity if most is None else most
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

    def no_room(self, request: TextRequest, made: int, limit: int | None) -> EngineError:
        """The error for a text of which `made` tokens fill the context and more were asked for."""
        capacity = self.session.capacity
        return self.context_full(
            f"{len(request.prompt)} tokens of the prompt and {made} of the {limit} new ones fill "
            f"the {capacity} there is room for"
        )

    def context_full(self, what: str) -> EngineError:
        """The error for a context without room; `what` says how full."""
        capacity = self.session.capacity
        built = self.info.max_seq_len
        most = int(self.config.get("max_position_embeddings", 2 * built))
        if capacity < built:
            mend = f"ask for fewer new tokens or give a shorter prompt, or load with max_seq_len up to {built}"
        elif built < most:
            build = f"moedge build {self.bundle.path} --profile {self.profile} --max-seq-len {min(2 * built, most)}"
            mend = f"ask for fewer new tokens or give a shorter prompt, or make room: {build}"
        else:
            mend = f"ask for fewer new tokens or give a shorter prompt (the model has {most} positions)"
        return ContextFull(f"context is full: {what}; {mend}")

    @property
    def prefill_tokens(self) -> int:
        """Tokens of a prompt that are computed at once while nobody waits."""
        return self._chunk * self._at_once

    def _chunks(self, tokens: NDArray[Any], size: int | None = None) -> Iterator[tuple[int, NDArray[Any]]]:
        size = size or self._chunk
        for start in range(0, len(tokens), size):
            yield start, tokens[start : start + size]

    def _optional_json(self, name: str) -> dict[str, Any]:
        path = self.bundle.file(name)
        return read_json(path, BundleError) if path.is_file() else {}

