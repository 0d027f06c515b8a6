"""Backend `onnxruntime_prefix`: graphs without a KV cache, which compute the whole text so far at every step.

A user's own torch graph is such a one: nobody knows where its attention is. The cache is the tokens themselves, so
rewinding, copying and taking up a text cost nothing, and a step costs as much as a prompt of that length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from . import Findings, OneLane, Routing, SessionOptions, check_room, check_routing
from .onnxruntime_cpu import check as check
from .onnxruntime_cpu import loads as loads
from .onnxruntime_cpu import open_onnxruntime
from .onnxruntime_cpu import version as version

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo

__all__ = ["Findings", "cannot_run", "check", "loads", "open_session", "version"]


def cannot_run(info: EngineInfo) -> str | None:
    """It runs wherever onnxruntime is installed; where it is not, loading names the command."""
    return None


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> OnnxruntimePrefixSession:
    """Load the engine; raises as `onnxruntime_cpu.open_session` does."""
    session, threads = open_onnxruntime(bundle, info, options)
    return OnnxruntimePrefixSession(session, info, options.max_seq_len or info.max_seq_len, threads)


class OnnxruntimePrefixSession(OneLane):
    """One text over an onnxruntime session; see `Session` for what the members do."""

    def __init__(self, session: Any, info: EngineInfo, capacity: int, threads: int) -> None:
        self._session: Any = session
        self._info = info
        self._threads = threads
        self._tokens = np.zeros(capacity, np.int64)
        self._length = 0
        self._last = 0  # tokens of the last step, whose routes `routing` gives
        self._routing: Routing | None = None

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return len(self._tokens)

    @property
    def threads(self) -> int:
        return self._threads

    @property
    def routing(self) -> Routing:
        if self._routing is None:  # a step that asked for no logits has not been run
            self._run(np.empty(0, np.int64))
        assert self._routing is not None
        return self._routing

    def step(
        self,
        input_ids: NDArray[np.int64],
        rows: NDArray[np.int64],
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        count = len(input_ids)
        check_room(self.capacity, self._length, count)
        self._tokens[self._length : self._length + count] = input_ids
        self._length, self._last, self._routing = self._length + count, count, None
        if not len(rows):
            return np.empty((0, self._info.vocab_size), np.float32) if out is None else out
        try:
            logits = self._run(np.asarray(rows, np.int64) + (self._length - count))
        except BaseException:
            self._length -= count
            raise
        if out is None:
            return logits
        out[:] = logits
        return out

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._length = length

    def another(self) -> OnnxruntimePrefixSession:
        return OnnxruntimePrefixSession(self._session, self._info, self.capacity, self._threads)

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"cannot read tokens {start} to {stop} of {self._length}")
        return [self._tokens[start:stop, None].copy()]

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        if len(rows) != 1 or rows[0].ndim != 2 or rows[0].shape[1] != 1 or rows[0].dtype != np.int64:
            raise ValueError("these rows are of another cache")
        count = len(rows[0])
        if self._length + count > self.capacity:
            raise ValueError(f"no room for {count} tokens: {self._length} of {self.capacity} are taken")
        self._tokens[self._length : self._length + count] = rows[0][:, 0]
        self._length += count

    def close(self) -> None:
        self._session = None

    def _run(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits [R, vocab] after the tokens at `rows` of the text; notes the routes of the last step's tokens."""
        layers = self._info.moe_layers
        names = ["logits", *(f"{kind}.{layer}" for kind in ("experts", "weights") for layer in layers)]
        feeds = {"input_ids": self._tokens[None, : self._length], "rows": rows}
        try:
            logits, *routes = self._session.run(names, feeds)
        except Exception as error:  # onnxruntime's own classes, each straight from Exception
            first = (str(error).splitlines() or [""])[0]
            raise EngineError(
                f"the model fails on {self._length} tokens ({first}); give a shorter text, or build for less: "
                f"moedge build BUNDLE --profile {self._info.profile} --max-seq-len N"
            ) from error
        everything = Routing(np.stack(routes[: len(layers)]), np.stack(routes[len(layers) :]))
        check_routing(everything, layers, 0)  # tokens of a step that asked for no logits are run here first
        last = slice(self._length - self._last, self._length)
        self._routing = Routing(everything.experts[:, last], everything.weights[:, last])
        result: NDArray[np.float32] = logits
        return result
