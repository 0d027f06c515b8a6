"""What every session with a cache keeps of its sequence: how long it is, what fits, and the load of its experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ._load_state import load_state_of

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo


class CachedSequence:
    """`length`, `capacity`, `truncate`, `read_rows` and `append_rows` of `Session`, over cache tensors that a session
    reads and writes by `_read_cache` and `_write_cache`."""

    cuts_alike = False

    def __init__(self, info: EngineInfo, capacity: int) -> None:
        self._entries = info.cache
        self._length = 0
        self._capacity = capacity
        self.load = load_state_of(info, capacity)

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._length = length
        if self.load is not None:
            self.load.move_to(length)

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"cannot read tokens {start} to {stop} of {self._length}")
        rows = [self._read_cache(entry)[..., start:stop, :].copy() for entry in self._entries]
        return rows if self.load is None else [*rows, self.load.routes[:, start:stop].copy()]

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        count = rows[0].shape[-2] if rows and rows[0].ndim >= 2 else 0
        start, stop = self._length, self._length + count
        if stop > self._capacity:
            raise ValueError(f"no room for {count} tokens: {start} of {self._capacity} are taken")
        wanted = [(self._rows_shape(entry, count), np.dtype(entry.dtype)) for entry in self._entries]
        if self.load is not None:
            routes = self.load.routes[:, start:stop]
            wanted.append((routes.shape, routes.dtype))
        if [(part.shape, part.dtype) for part in rows] != wanted:
            raise ValueError("these rows are of another cache")
        for entry, part in zip(self._entries, rows, strict=False):
            self._write_cache(entry, start, part)
        self._length = stop
        if self.load is not None:
            routes[:] = rows[-1]
            self.load.move_to(stop)

    def _advance(self, experts: NDArray[np.int64]) -> None:
        """Count the tokens of a run that has written its rows; `experts` [layers, tokens, k], their routes."""
        self._length += experts.shape[1]
        if self.load is not None:
            self.load.append(experts)

    def _rows_shape(self, entry: CacheEntry, tokens: int) -> tuple[int, ...]:
        """[tokens, width], by heads [1, heads, tokens, head size]."""
        return (1, entry.heads, tokens, entry.width // entry.heads) if entry.heads else (tokens, entry.width)

    def _read_cache(self, entry: CacheEntry) -> NDArray[Any]:
        """A whole cache tensor."""
        raise NotImplementedError

    def _write_cache(self, entry: CacheEntry, start: int, rows: NDArray[Any]) -> None:
        """Put the rows of some tokens behind the first `start`."""
        raise NotImplementedError
