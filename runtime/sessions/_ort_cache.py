"""A sequence's KV cache for an onnxruntime graph, which is never copied.

Most of it are buffers [capacity, width]: the graph is given a view of the rows so far, those of the run included, and
writes the run's own rows to the view's end. So a step writes S rows and copies none, and rewinding is a smaller view.
Attention with key and value heads has its cache by heads instead, [1, heads, capacity, head size]: one buffer that is
the kernel's input and its output. A graph with our own attention takes every buffer whole and changes it; those of one
kind lie one behind the other, layer by layer, for graphs that take them so.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from ..kernels import stack_of
from ._sequence import CachedSequence

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo

_ALIGNMENT = 64  # bytes: a cache line, and the widest vector register
_HUGE_FROM = 4 << 20  # bytes of an array for which numpy asks for huge pages
_MAP_NORESERVE = 0x4000  # which Python's mmap names from 3.11 on


class View(NamedTuple):
    """A buffer of rows, as each step binds it."""

    name: str
    width: int
    kind: type[Any]
    address: int
    row: int  # bytes
    parts: int  # that the graph wants a row cut into

    def shape(self, rows: int) -> tuple[int, ...]:
        """How the graph sees the first `rows` of them."""
        if self.parts == 1:
            return (rows, self.width)
        return (rows * self.parts,) if self.width == self.parts else (rows * self.parts, self.width // self.parts)


class Buffer(NamedTuple):
    """A buffer that is bound once, whole."""

    name: str
    shape: tuple[int, ...]
    kind: type[Any]
    address: int


class SequenceCache(CachedSequence):
    """The buffers of one sequence and how many tokens are in them.

    Raises:
        EngineError: they do not fit the memory.
    """

    def __init__(self, info: EngineInfo, capacity: int) -> None:
        super().__init__(info, capacity)
        self._cache: dict[str, NDArray[Any]] = {}
        self.views: list[View] = []
        self.buffers: list[Buffer] = []  # those by heads
        # All of them, for a graph that changes them itself, and of each kind the layers'.
        self.whole: list[Buffer] = []
        self.stacks: list[Buffer] = []
        for name, entries in stack_entries(info):
            stack = _empty_stack(len(entries), self._rows_shape(entries[0], capacity), np.dtype(entries[0].dtype))
            self.stacks.append(Buffer(name, stack.shape, stack.dtype.type, stack.ctypes.data))
            self._cache |= zip((entry.name for entry in entries), stack, strict=True)
        for entry in info.cache:
            array = self._cache[entry.name]
            kind, address = array.dtype.type, array.ctypes.data
            self.whole.append(Buffer(entry.name, array.shape, kind, address))
            if entry.heads:
                self.buffers.append(self.whole[-1])
            else:
                row = entry.width * array.itemsize
                self.views.append(View(entry.name, entry.width, kind, address, row, entry.parts))

    def free(self) -> None:
        """Let go of the buffers; they are freed with the last view of them."""
        self._cache.clear()
        self.views.clear()
        self.buffers.clear()
        self.whole.clear()
        self.stacks.clear()

    def _read_cache(self, entry: CacheEntry) -> NDArray[Any]:
        return self._cache[entry.name]

    def _write_cache(self, entry: CacheEntry, start: int, rows: NDArray[Any]) -> None:
        self._cache[entry.name][..., start : start + rows.shape[-2], :] = rows


def stack_entries(info: EngineInfo) -> list[tuple[str, list[CacheEntry]]]:
    """The cache's entries by kind (key, scale.key, latent ...) and size, each kind's in the order of their layers."""
    found: dict[CacheEntry, list[CacheEntry]] = {}
    for entry in info.cache:
        found.setdefault(replace(entry, name=stack_of(entry.name)), []).append(entry)
    return [(kind.name, entries) for kind, entries in found.items()]


def _empty_stack(layers: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Caches [layers, *shape], which take what as many arrays would: no more pages for a token, and no less room."""
    size = math.prod(shape) * dtype.itemsize
    try:
        stack = aligned_empty((layers, *shape), dtype)
    except EngineError as refused:
        # Linux grants no more at once than there is memory, although little of it may ever be written.
        if sys.platform != "linux":
            raise
        aligned_empty(shape, dtype)  # raises where a layer alone is too much
        try:
            mapped = mmap.mmap(-1, layers * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except OSError:  # memory is counted when it is asked for here
            raise refused from None
        return np.frombuffer(mapped, dtype).reshape(layers, *shape)
    if size < _HUGE_FROM:
        _use_small_pages(stack)
    return stack


def _use_small_pages(stack: NDArray[Any]) -> None:
    """numpy asks for huge pages, of which a first token would take one for each head of each layer."""
    page = mmap.PAGESIZE
    start, end = -(-stack.ctypes.data // page) * page, (stack.ctypes.data + stack.nbytes) // page * page
    if sys.platform == "linux" and end > start:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        advise(start, end - start, mmap.MADV_NOHUGEPAGE)  # refused where there are none: nothing is lost


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An uninitialized array whose first byte is aligned to a cache line; pages are taken when they are written."""
    size = math.prod(shape) * dtype.itemsize
    try:
        raw = np.empty(size + _ALIGNMENT, np.uint8)
    except (MemoryError, ValueError):  # the latter where no address is so large
        raise EngineError(
            f"a cache of {size / 2**20:,.0f} MiB does not fit the memory; load with a smaller max_seq_len"
        ) from None
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
