"""Sequences in TensorRT engines: the runs that a step is made of, one sequence's or one token of each of several.

T = new tokens, B = lanes. Buffers, caches and what is bound to what are in `_trt_engines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from . import Routing, check_room, check_routing
from ._load_state import load_state_of
from ._trt_engines import CHUNK, LANES, ONE_TOKEN, CacheBlock, Device, Engines, lane_shape, rows_shape

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo


class TensorrtSession:
    """One sequence; see `Session` for what the members do.

    A run is of one token or of a chunk, and gives the logits of one of its tokens: more rows than one are runs of their
    own. Sequences over the same engines (`another`) wait for one another, or step together where `lanes` are asked for
    and the engines were built for several.
    """

    def __init__(
        self,
        device: Device,
        folder: Path,
        info: EngineInfo,
        capacity: int,
        lanes: int = 1,
        shared: Engines | None = None,
    ) -> None:
        self._info = info
        self._device = device
        self._capacity = capacity
        self.load = load_state_of(info, capacity)
        self._length = 0
        self._chunk = int(info.session["chunk"])
        self._place: tuple[CacheBlock, int] | None = None
        self._routing = _empty_routing(info, 0)
        try:
            self._engines = shared or Engines(device, folder, info, lanes)
        except BaseException:
            device.close()
            raise
        self._engines.users += 1
        try:
            self._place = self._engines.take_lane()
        except BaseException:
            self._leave()
            raise

    # Session

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def threads(self) -> int:
        return 1

    @property
    def lanes(self) -> int:
        return self._engines.lanes

    @property
    def routing(self) -> Routing:
        return self._routing

    def step(
        self, input_ids: NDArray[np.int64], rows: NDArray[np.int64], out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        count = len(input_ids)
        check_room(self._capacity, self._length, count)
        logits = np.empty((len(rows), self._info.vocab_size), np.float32) if out is None else out
        tokens = np.ascontiguousarray(input_ids, np.int64)
        routing = _empty_routing(self._info, count)
        first = self._length
        runs = split_runs(count, rows, self._chunk)
        while runs:
            start, stop = runs.pop(0)
            wanted = [index for index, row in enumerate(rows) if row == stop - 1]
            with self._engines.lock:
                self._run(tokens[start:stop], logits[wanted[0]] if wanted else None)
                found = self._read_routing(stop - start)
            if (found.experts < 0).any():  # a load-aware gate that needs more rounds than it has
                runs[:0] = [(start, (start + stop) // 2), ((start + stop) // 2, stop)]
                continue
            routing.experts[:, start:stop], routing.weights[:, start:stop] = found
            for index in wanted[1:]:
                logits[index] = logits[wanted[0]]
            self._length = first + stop
            if self.load is not None:
                self.load.append(found.experts)
        try:
            check_routing(routing, self._info.moe_layers, first)
        except EngineError:
            self.truncate(first)
            raise
        self._routing = routing
        return logits

    def step_together(self, others: Sequence[TensorrtSession], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        sequences = [self, *others]
        if len(tokens) != len(sequences) or len(sequences) > self.lanes:
            raise ValueError(f"this engine steps {self.lanes} sequences a run, not {len(sequences)}")
        for sequence in sequences:
            check_room(sequence._capacity, sequence._length, 1)
        logits = np.empty((len(sequences), self._info.vocab_size), np.float32)
        routings: list[Routing] = [_empty_routing(self._info, 0)] * len(sequences)
        by_block: dict[CacheBlock, list[int]] = {}
        for index, sequence in enumerate(sequences):
            by_block.setdefault(sequence._lane()[0], []).append(index)
        with self._engines.lock:
            for block, indices in by_block.items():
                if len(indices) == 1:
                    one = sequences[indices[0]]
                    one._run(tokens[indices], logits[indices[0]])
                    routings[indices[0]] = one._read_routing(1)
                    continue
                lanes = {index: sequences[index]._lane()[1] for index in indices}
                busy = {lane: (int(tokens[index]), sequences[index]._length) for index, lane in lanes.items()}
                found, routing = self._run_lanes(block, busy)
                for index, lane in lanes.items():
                    logits[index] = found[lane]
                    own = slice(lane, lane + 1)
                    routings[index] = Routing(routing.experts[:, own], routing.weights[:, own])
        for sequence, route in zip(sequences, routings, strict=True):
            check_routing(route, self._info.moe_layers, sequence._length)
        for sequence, route in zip(sequences, routings, strict=True):
            sequence._length += 1
            sequence._routing = route
        return logits

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._length = length
        if self.load is not None:
            self.load.move_to(length)

    def another(self) -> TensorrtSession:
        return TensorrtSession(self._device, Path(), self._info, self._capacity, shared=self._engines)

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"cannot read tokens {start} to {stop} of {self._length}")
        rows = [self._read_cache(entry)[..., start:stop, :].copy() for entry in self._info.cache]
        return rows if self.load is None else [*rows, self.load.routes[:, start:stop].copy()]

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        count = rows[0].shape[-2] if rows and rows[0].ndim >= 2 else 0
        if self._length + count > self._capacity:
            raise ValueError(f"no room for {count} tokens: {self._length} of {self._capacity} are taken")
        wanted = [(rows_shape(entry, count), np.dtype(entry.dtype)) for entry in self._info.cache]
        if self.load is not None:
            routes = self.load.routes[:, self._length : self._length + count]
            wanted.append((routes.shape, routes.dtype))
        if [(part.shape, part.dtype) for part in rows] != wanted:
            raise ValueError("these rows are of another cache")
        block, lane = self._lane()
        for entry, part in zip(self._info.cache, rows, strict=False):
            values = self._read_cache(entry)
            values[..., self._length : self._length + count, :] = part
            self._device.write(block.address(entry.name, lane), values)
        self._length += count
        if self.load is not None:
            routes[:] = rows[-1]
            self.load.move_to(self._length)

    def close(self) -> None:
        if self._place is not None:
            self._engines.give_lane(*self._place)
            self._place = None
            self._leave()

    def _leave(self) -> None:
        self._engines.users -= 1
        if not self._engines.users:
            self._engines.close()
            self._device.close()

    # one run

    def _run(self, tokens: NDArray[np.int64], logits: NDArray[np.float32] | None) -> None:
        """Put tokens behind the sequence; `logits` [vocab] of the last one are read where they are wanted."""
        engines, count = self._engines, len(tokens)
        engines.prepare(*self._lane(), ONE_TOKEN if count == 1 else CHUNK, count)
        engines.write(input_ids=tokens, start=[self._length], source=[0], rows=[count - 1])
        if self.load is not None:
            for layer, load in zip(self._info.moe_layers, self.load.load, strict=True):
                self._device.write(engines.buffers[f"load.{layer}"], load)
        self._device.run(engines.plans, repeats=count == 1)
        if logits is not None:
            self._device.read(engines.buffers["logits"], logits)

    def _run_lanes(
        self, block: CacheBlock, busy: dict[int, tuple[int, int]]
    ) -> tuple[NDArray[np.float32], Routing]:
        """A token for each lane of a block: (token, length) of those that are `busy`; logits [B, vocab], routing.

        An idle lane writes behind all that a sequence can fill, and takes the experts of a lane at work.
        """
        engines, lanes = self._engines, range(block.lanes)
        spare = lane_shape(self._info, self._info.cache[0])[2] - 1
        steps = [busy.get(lane, (0, spare)) for lane in lanes]
        engines.prepare(block, 0, LANES, block.lanes)
        engines.write(
            input_ids=[token for token, _ in steps],
            start=[start for _, start in steps],
            source=[lane if lane in busy else min(busy) for lane in lanes],
            rows=lanes,
        )
        self._device.run(engines.plans, repeats=True)
        logits = np.empty((block.lanes, self._info.vocab_size), np.float32)
        self._device.read(engines.buffers["logits"], logits)
        return logits, self._read_routing(block.lanes)

    def _read_routing(self, count: int) -> Routing:
        """Where the last run's `count` tokens went."""
        routing = _empty_routing(self._info, count)
        for index, layer in enumerate(self._info.moe_layers):
            for name, values in routing._asdict().items():
                self._device.read(self._engines.buffers[f"{name}.{layer}"], values[index])
        return routing

    # the cache

    def _lane(self) -> tuple[CacheBlock, int]:
        if self._place is None:
            raise EngineError("this sequence is closed")
        return self._place

    def _read_cache(self, entry: CacheEntry) -> NDArray[Any]:
        block, lane = self._lane()
        values = np.empty(lane_shape(self._info, entry), np.dtype(entry.dtype))
        self._device.read(block.address(entry.name, lane), values)
        return values


def split_runs(count: int, rows: NDArray[np.int64], chunk: int) -> list[tuple[int, int]]:
    """(start, stop) of each run: `chunk` tokens at most, and each row of `rows` the last of one."""
    ends = sorted({int(row) + 1 for row in rows} | {count})
    runs = []
    start = 0
    for end in ends:
        while start < end:
            stop = min(end, start + chunk)
            runs.append((start, stop))
            start = stop
    return runs


def _empty_routing(info: EngineInfo, count: int) -> Routing:
    shape = (len(info.moe_layers), count, info.num_experts_per_tok)
    return Routing(np.empty(shape, np.int64), np.empty(shape, np.float32))
