"""Several sequences in one run of an onnxruntime graph.

A run takes a prompt's chunk of one sequence, or one token of each of up to `lanes`. The graph is made so that what a
token gives does not depend, to the bit, on which others are stepped with it. One kernel of onnxruntime's takes rows in
pairs and rounds the last of an odd number otherwise (tried with 1.31): where the graph says that it has it
(`moedge.pairs`), a run of single tokens has an even number of rows, the first one twice where need be.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from .. import kernels
from . import Routing, check_room, check_routing
from ._ort_binding import (
    CPU,
    bind_buffer,
    bind_routing,
    bind_whole,
    check_interface,
    empty_routing,
    is_marked,
    run_bound,
)
from ._ort_cache import SequenceCache, aligned_empty

if TYPE_CHECKING:
    from ..preflight import EngineInfo

_FEW = 4  # lanes whose routes are summed without numpy


class _Frame:
    """The arrays of a run with one token in each of the first `active` lanes, made once and filled for each run."""

    def __init__(
        self, info: EngineInfo, active: int, lanes: int, idle_rows: int, pairs: bool, logits: NDArray[np.float32]
    ) -> None:
        """`logits`: where those of every frame go."""
        count = active + (active % 2 if pairs else 0)
        self.active = active
        self.input_ids = np.zeros(count, np.int64)
        self.places = np.zeros((1, count), np.int64)
        self.rows = np.arange(count)
        self.sizes = np.array([1] * active + [idle_rows] * (lanes - active), np.int64)
        self.take = np.array([*range(active), *[0] * (idle_rows * (lanes - active))], np.int64)
        self.give = np.array([*range(active), *[0] * (count - active)], np.int64)
        self.logits = logits[:count]
        self.routing = empty_routing(info, count)
        self.few = self.routing.weights.reshape(-1).data if active <= _FEW else None


class _Lanes:
    """A binding of the graph, and the cache that each lane has in it."""

    def __init__(self, session: Any, info: EngineInfo, lanes: int, idle: SequenceCache, in_place: bool) -> None:
        self.arrays: object = None  # whose addresses are bound
        self._session = session
        self._info = info
        self._idle = idle
        self._in_place = in_place
        self._stacked = is_marked(session, kernels.STACKED)
        self._binding: Any = session.io_binding()
        self._lengths = np.zeros(lanes, np.int64)
        self._binding.bind_input("lengths", *CPU, np.int64, (lanes,), self._lengths.ctypes.data)
        self._bound: list[SequenceCache | None] = [None] * lanes
        self._busy = lanes  # lanes that are not known to be idle, and bound so

    def bind(self, arrays: dict[str, NDArray[np.int64]], logits: NDArray[np.float32], routing: Routing) -> None:
        """What a run takes and gives beside caches; it must be kept until the next."""
        for name, array in arrays.items():
            if self._in_place and name in ("take", "give"):
                continue
            self._binding.bind_input(name, *CPU, np.int64, array.shape, array.ctypes.data)
        self._binding.bind_output("logits", *CPU, np.float32, logits.shape, logits.ctypes.data)
        bind_routing(self._binding, self._info, routing)

    def run(self, caches: Sequence[SequenceCache], count: int) -> None:
        """Run with `caches` in the first lanes, `count` new rows in each."""
        for lane in range(max(len(caches), self._busy)):
            cache = caches[lane] if lane < len(caches) else self._idle
            busy = cache is not self._idle
            self._lengths[lane] = cache.length if busy else 0
            bound = self._bound[lane] is cache
            if not self._in_place and (busy or not bound):
                self._bind_views(lane, cache, int(self._lengths[lane]), count if busy else 0)
            if not bound:
                self._bind_buffers(lane, cache)
        self._busy = len(caches)
        run_bound(self._session, self._binding)

    def forget(self, cache: SequenceCache) -> None:
        """Bind nothing of a cache that goes."""
        for lane, bound in enumerate(self._bound):
            if bound is cache:
                if not self._in_place:
                    self._bind_views(lane, self._idle, 0, 0)
                self._bind_buffers(lane, self._idle)

    def _bind_buffers(self, lane: int, cache: SequenceCache) -> None:
        """What stays bound while a sequence keeps its lane."""
        if self._in_place:
            bind_whole(self._binding, cache, self._stacked, lambda name: f"{name}.{lane}")
        else:
            for buffer in cache.buffers:
                bind_buffer(self._binding, buffer, f"{buffer.name}.{lane}")
        self._bound[lane] = cache

    def _bind_views(self, lane: int, cache: SequenceCache, past: int, count: int) -> None:
        bind_input, bind_output = self._binding.bind_input, self._binding.bind_output
        for view in cache.views:
            bind_input(f"cache.{view.name}.{lane}", *CPU, view.kind, view.shape(past + count), view.address)
            place = view.address + past * view.row
            bind_output(f"new.{view.name}.{lane}", *CPU, view.kind, (count, view.width), place)


class LaneRunner:
    """The graph, its binding, and what each lane is bound to. Thread-safe: runs wait for one another."""

    def __init__(self, session: Any, info: EngineInfo, threads: int) -> None:
        shapes = {value.name: value.shape for value in session.get_inputs()}
        if "lengths" not in shapes:
            raise EngineError(
                f"engine '{info.profile}' has no graph of several lanes; "
                f"build it again: moedge build BUNDLE --profile {info.profile}"
            )
        lanes = int(shapes["lengths"][0])
        for lane in range(lanes):
            check_interface(session, info, lambda name, lane=lane: f"{name}.{lane}", lanes)  # type: ignore[misc]
        self.info = info
        self.lanes = lanes
        self.threads = threads
        self.users = 0
        self._pairs = is_marked(session, "moedge.pairs")
        self.session: Any = session
        self.cuts_alike = is_marked(session, kernels.CUTS_ALIKE)
        self._lock = threading.Lock()
        self._frames: dict[int, _Frame] = {}
        self._logits = aligned_empty((lanes + lanes % 2, info.vocab_size), np.dtype(np.float32))  # of every frame
        in_place = is_marked(session, kernels.IN_PLACE)
        # onnxruntime's kernel over a cache by heads cannot do without a row: idle lanes take the run's first, and a
        # cache of one.
        idle = SequenceCache(info, 1)
        self._idle_rows = 1 if idle.buffers and not in_place else 0
        # A prompt's chunk among steps is to take no sequence's lane: binding thirty caches costs as much as a layer.
        self._chunks, self._steps = (_Lanes(session, info, lanes, idle, in_place) for _ in range(2))

    def run_chunk(
        self, cache: SequenceCache, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32]
    ) -> Routing:
        """Put tokens behind one sequence; `out` [R, vocab] is the logits after those at `rows`."""
        count, idle = len(input_ids), self.lanes - 1
        arrays = {
            "input_ids": np.ascontiguousarray(input_ids, np.int64),
            "places": np.arange(cache.length, cache.length + count)[None],
            "rows": np.ascontiguousarray(rows, np.int64),
            "sizes": np.array([count] + [self._idle_rows] * idle),
            "take": np.array([*range(count), *[0] * (self._idle_rows * idle)]),
            "give": np.arange(count),
        }
        routing = empty_routing(self.info, count)
        with self._lock:
            self._chunks.arrays = arrays, out, routing
            self._chunks.bind(arrays, out, routing)
            self._chunks.run([cache], count)
        return routing

    def run_together(self, caches: Sequence[SequenceCache], tokens: NDArray[np.int64]) -> _Frame:
        """Put one token behind each sequence; the frame's logits and routing are of the next run of as many."""
        active = len(caches)
        with self._lock:
            frame = self._frames.get(active)
            if frame is None:
                frame = self._frames[active] = _Frame(
                    self.info, active, self.lanes, self._idle_rows, self._pairs, self._logits
                )
            if self._steps.arrays is not frame:
                names = ("input_ids", "places", "rows", "sizes", "take", "give")
                self._steps.bind({name: getattr(frame, name) for name in names}, frame.logits, frame.routing)
                self._steps.arrays = frame
            frame.input_ids[:active] = tokens
            frame.input_ids[active:] = tokens[0]
            frame.places[0, :active] = [cache.length for cache in caches]
            frame.places[0, active:] = caches[0].length
            self._steps.run(caches, 1)
        return frame

    def forget(self, cache: SequenceCache) -> None:
        """Bind nothing of a cache that goes."""
        with self._lock:
            for lanes in (self._chunks, self._steps):
                lanes.forget(cache)

    def close(self) -> None:
        """Free the weights."""
        del self.session, self._chunks, self._steps


class LaneSession(SequenceCache):
    """One sequence of several over one graph; see `Session` for what the members do."""

    def __init__(self, runner: LaneRunner, capacity: int) -> None:
        super().__init__(runner.info, capacity)
        self.cuts_alike = runner.cuts_alike
        self._runner = runner
        self._open = True
        runner.users += 1
        self._routing = empty_routing(runner.info, 0)  # of the last chunk
        self._lane: tuple[_Frame, int] | None = None  # of the last single token
        self._logits = np.empty((1, runner.info.vocab_size), np.float32)  # of `step`; the runner's are everybody's

    @property
    def threads(self) -> int:
        return self._runner.threads

    @property
    def lanes(self) -> int:
        return self._runner.lanes

    @property
    def routing(self) -> Routing:
        return self._routing if self._lane is None else _of_lane(self._lane[0].routing, self._lane[1])

    def step(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        count = len(input_ids)
        if count == 1 and len(rows) == 1:
            out = self._logits if out is None else out
            out[:] = self.step_together((), input_ids)
            return out
        check_room(self._capacity, self._length, count)
        logits = np.empty((len(rows), self._runner.info.vocab_size), np.float32) if out is None else out
        self._routing = self._runner.run_chunk(self, input_ids, rows, logits)
        self._lane = None
        check_routing(self._routing, self._runner.info.moe_layers, self._length)
        self._length += count
        return logits

    def step_together(self, others: Sequence[LaneSession], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        sessions = (self, *others)
        if len(tokens) != len(sessions) or len(sessions) > self._runner.lanes:
            raise ValueError(f"{len(tokens)} tokens for {len(sessions)} sequences in {self._runner.lanes} lanes")
        for session in sessions:
            if session._length >= session._capacity:
                check_room(session._capacity, session._length, 1)
        frame = self._runner.run_together(sessions, tokens)
        moe_layers = self._runner.info.moe_layers
        try:
            check_routing(frame.routing, moe_layers, 0, frame.few)  # all at once; where there is NaN, whose it is
        except EngineError:
            for lane, session in enumerate(sessions):
                check_routing(_of_lane(frame.routing, lane), moe_layers, session._length)
        for lane, session in enumerate(sessions):
            session._lane = frame, lane
            session._length += 1
        return frame.logits[: len(sessions)]

    def another(self) -> LaneSession:
        return LaneSession(self._runner, self._capacity)

    def end_profiling(self) -> Path:
        """The profile (Chrome's trace format) of a session that was opened with `profile_prefix`."""
        return Path(self._runner.session.end_profiling())

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        self._runner.forget(self)
        self._runner.users -= 1
        if not self._runner.users:
            self._runner.close()
        self.free()


def _of_lane(routing: Routing, lane: int) -> Routing:
    return Routing(routing.experts[:, lane : lane + 1], routing.weights[:, lane : lane + 1])
