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
from ._sequence import CachedSequence
from ._trt_engines import CHUNK, LANES, ONE_TOKEN, CacheBlock, Device, Engines, lane_shape, rows_shape

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo


class TensorrtSession(CachedSequence):
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
        super().__init__(info, capacity)
        self._info = info
        self._device = device
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
        try:
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
                self._advance(found.experts)
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
            sequence._advance(route.experts)
            sequence._routing = route
        return logits

    def another(self) -> TensorrtSession:
        return TensorrtSession(self._device, Path(), self._info, self._capacity, shared=self._engines)

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

    def _write_cache(self, entry: CacheEntry, start: int, rows: NDArray[Any]) -> None:
        block, lane = self._lane()
        values = self._read_cache(entry)
        values[..., start : start + rows.shape[-2], :] = rows
        self._device.write(block.address(entry.name, lane), values)

    def _rows_shape(self, entry: CacheEntry, tokens: int) -> tuple[int, ...]:
        return rows_shape(entry, tokens)


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
