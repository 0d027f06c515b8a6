"""Sessions: what executes an engine, one file per backend, chosen by the engine's "backend" (table BACKENDS).

A backend's module has
    version() -> str | None                           the installed version of what it runs on; None: not installed
    loads(info) -> list[str]                          the engine's files that a session loads
    check(folder, info) -> Findings                   what is wrong with the engine's files, found without running them
    cannot_run(info) -> str | None                    why this machine cannot run the engine
    open_session(bundle, info, options) -> Session
and imports what it runs on only inside these.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo

# Backend as engine.json names it -> module of this package.
BACKENDS = {
    "onnxruntime": "onnxruntime_cpu",
    "onnxruntime_cuda": "onnxruntime_cuda",
    "onnxruntime_prefix": "onnxruntime_prefix",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
}


class Routing(NamedTuple):
    """Where tokens went: L = MoE layers, S = tokens, k = experts per token."""

    experts: NDArray[np.int64]  # [L, S, k]
    weights: NDArray[np.float32]  # [L, S, k]


@dataclass(frozen=True)
class SessionOptions:
    """How a session is opened. `threads` None: the physical cores this process may use."""

    threads: int | None = None
    max_seq_len: int | None = None  # None: what the engine was built for
    profile_prefix: str | None = None  # where the backend writes a profile of its operations, if it can
    lanes: int = 1  # sequences that are to be stepped together; an engine that cannot has fewer


@dataclass
class Findings:
    """What a check without running found: `faults` must be mended, `unchecked` could not be looked at here and why."""

    faults: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check_room(capacity: int, length: int, count: int) -> None:
    """Whether `count` more tokens fit behind the `length` in the cache.

    Raises:
        EngineError: they do not.
    """
    if length + count > capacity:
        raise EngineError(
            f"context is full: it has room for {capacity} tokens, {length} are in it and {count} more came"
        )


def check_routing(
    routing: Routing, moe_layers: Sequence[int], start: int, few: memoryview | None = None
) -> None:
    """Whether every weight of a step's routes is a number; `start`: tokens before the step's first.

    A NaN in a router's logits comes out as weights of NaN, whatever experts were then picked.
    few: the weights once more, of few tokens: after a run numpy's sum has left the processor's caches, and takes 50 us.

    Raises:
        EngineError: names the first layer with a NaN, and its first token.
    """
    total = routing.weights.sum() if few is None else sum(few)
    if total == total:  # one sum a step: NaN alone differs from itself
        return
    layer, token = np.argwhere(np.isnan(routing.weights).any(axis=-1))[0]
    raise EngineError(
        f"the router of layer {moe_layers[layer]} gave NaN for token {start + token}: the weights or the engine are "
        "damaged; check them with `moedge verify`"
    )


class Session(Protocol):
    """One sequence and its KV cache in an engine. Not thread-safe."""

    @property
    def length(self) -> int:
        """Tokens in the cache."""

    @property
    def capacity(self) -> int:
        """Tokens the cache has room for."""

    @property
    def threads(self) -> int:
        """Threads that compute."""

    @property
    def lanes(self) -> int:
        """Sequences, this one included, that one run of this engine can step."""

    @property
    def cuts_alike(self) -> bool:
        """Whether every result has the same bits however tokens are cut into steps."""

    @property
    def routing(self) -> Routing:
        """The experts of the last step's tokens, in MoE layers' order; valid until the next step."""

    def step(
        self,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Append `input_ids` [S] to the cache and return the logits [R, vocab] after the tokens at `rows` [R] of them.

        They are written to `out` (C-contiguous) where it is given; else they are valid until the next step.

        Raises:
            EngineError: there is no room for them, memory is short, or a router gave NaN (`check_routing`); the cache
                is then what it was.
        """

    def step_together(self, others: Sequence[Any], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one of `tokens` [B] to this sequence and to each of `others`; the logits [B, vocab] after them.

        The others come from `another()` of the same engine, B = 1 + len(others) is at most `lanes`, and each token
        stands behind its own sequence's length. The logits are valid until the next step of any of them. `routing` of
        each is then that of its own token.

        Raises:
            EngineError: one has no room, or memory is short; all caches are then what they were.
        """

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; costs nothing."""

    def another(self) -> Session:
        """A further sequence, empty, over the same weights; steps of the two may run in two threads.

        Raises:
            EngineError: its cache does not fit the memory.
        """

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        """A copy of what each cache tensor has for tokens `start` to `stop`."""

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        """Put rows that `read_rows` gave behind the tokens in the cache, as if those tokens had been computed.

        Raises:
            ValueError: they are not of this cache's shapes and types, or there is no room.
        """

    def close(self) -> None:
        """Free the cache, and the weights when no other sequence uses them."""


class OneLane:
    """`lanes` and `step_together` of a session whose engine steps one sequence a run."""

    cuts_alike = False

    @property
    def lanes(self) -> int:
        return 1

    def step_together(self, others: Sequence[Any], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        if others or len(tokens) != 1:
            raise ValueError(f"this engine steps 1 sequence a run, not {1 + len(others)}")
        return self.step(tokens, np.zeros(1, np.int64))

    def step(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        raise NotImplementedError


class Backend(Protocol):
    """The functions of a backend's module."""

    def version(self) -> str | None: ...

    def loads(self, info: EngineInfo) -> list[str]: ...

    def check(self, folder: Path, info: EngineInfo) -> Findings: ...

    def cannot_run(self, info: EngineInfo) -> str | None: ...

    def open_session(self, bundle: Bundle, info: EngineInfo, options: SessionOptions) -> Session: ...


def backend_module(name: str) -> Backend:
    """The module of the backend that engine.json calls `name`.

    Raises:
        EngineError: no such backend.
    """
    if name not in BACKENDS:
        known = ", ".join(sorted(BACKENDS))
        raise EngineError(
            f"unknown backend {name!r}; this version of moedge knows {known}: upgrade moedge, or build the engine again"
        )
    return cast(Backend, importlib.import_module(f".{BACKENDS[name]}", __name__))
