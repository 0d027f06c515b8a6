"""A sequence in TensorRT engines: its buffers on the device, the shapes of each run, engines by layer range in a chain.

Whatever touches a GPU stands behind `Device` and `Plan`; this file knows addresses and shapes alone, so it runs, and is
tested, wherever something else takes their place. T = new tokens, H = hidden size, L = slots of the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import EngineError
from . import OneLane, Routing, check_room

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo

ONE_TOKEN, CHUNK = 0, 1  # the engine's optimization profiles


class Plan(Protocol):
    """An engine on the device, with one execution context."""

    def bind(self, name: str, address: int) -> None:
        """The device address of an input or output."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """The shape of an input, within the profile's range."""

    def set_profile(self, index: int) -> None:
        """The optimization profile of the runs that follow; shapes are to be set again."""

    def enqueue(self) -> None:
        """Run, in order with everything else of the device."""

    def close(self) -> None: ...


class Device(Protocol):
    """Memory of a device and the engines on it. Copies and runs happen in the order of the calls."""

    def allocate(self, nbytes: int) -> int:
        """The address of so many bytes, zeros.

        Raises:
            EngineError: they are not there.
        """

    def free(self, address: int) -> None: ...

    def write(self, address: int, values: NDArray[Any]) -> None: ...

    def read(self, address: int, values: NDArray[Any]) -> None:
        """Fill `values`; waits for what was enqueued before."""

    def load(self, path: Path) -> Plan:
        """Raises EngineError where the device refuses the engine, with its own words."""

    def run(self, plans: Sequence[Plan], *, repeats: bool) -> None:
        """Enqueue plans in a row. `repeats`: the same will follow, with the same shapes and addresses."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Part:
    """One engine: what it takes and gives."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    hidden_size: int
    path: Path


class TensorrtSession(OneLane):
    """One sequence; see `Session` for what the members do.

    A run is of one token or of a chunk, and gives the logits of one of its tokens: more rows than one are runs of their
    own. Sequences over the same engines (`another`) wait for one another.
    """

    def __init__(
        self, device: Device, folder: Path, info: EngineInfo, capacity: int, shared: _Loaded | None = None
    ) -> None:
        self._info = info
        self._device = device
        self._capacity = capacity
        self._length = 0
        self._closed = False
        self._chunk = int(info.session["chunk"])
        self._owned: list[int] = []
        self._cache: dict[str, int] = {}
        self._routing = _empty_routing(info, 0)
        try:
            self._loaded = shared or _load(device, folder, info)
        except BaseException:
            device.close()
            raise
        self._loaded.users += 1
        try:
            self._allocate_cache()
        except BaseException:
            self.close()
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
        for start, stop in split_runs(count, rows, self._chunk):
            wanted = [index for index, row in enumerate(rows) if row == stop - 1]
            with self._loaded.lock:
                self._run(tokens[start:stop], logits[wanted[0]] if wanted else None)
                self._read_routing(routing, start, stop)
            for index in wanted[1:]:
                logits[index] = logits[wanted[0]]
            self._length = first + stop
        self._routing = routing
        return logits

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate {self._length} tokens to {length}")
        self._length = length

    def another(self) -> TensorrtSession:
        return TensorrtSession(self._device, Path(), self._info, self._capacity, self._loaded)

    def read_rows(self, start: int, stop: int) -> list[NDArray[Any]]:
        if not 0 <= start <= stop <= self._length:
            raise ValueError(f"cannot read tokens {start} to {stop} of {self._length}")
        return [self._read_cache(entry)[..., start:stop, :].copy() for entry in self._info.cache]

    def append_rows(self, rows: Sequence[NDArray[Any]]) -> None:
        count = rows[0].shape[-2] if rows and rows[0].ndim >= 2 else 0
        if self._length + count > self._capacity:
            raise ValueError(f"no room for {count} tokens: {self._length} of {self._capacity} are taken")
        wanted = [(_row_shape(entry, count), np.dtype(entry.dtype)) for entry in self._info.cache]
        if [(part.shape, part.dtype) for part in rows] != wanted:
            raise ValueError("these rows are of another cache")
        for entry, part in zip(self._info.cache, rows, strict=True):
            values = self._read_cache(entry)
            values[..., self._length : self._length + count, :] = part
            self._device.write(self._cache[entry.name], values)
        self._length += count

    def close(self) -> None:
        for address in self._owned:
            self._device.free(address)
        self._owned.clear()
        self._cache.clear()
        if self._closed:
            return
        self._closed = True
        self._loaded.users -= 1
        if not self._loaded.users:
            self._loaded.close()
            self._device.close()

    # one run

    def _run(self, tokens: NDArray[np.int64], logits: NDArray[np.float32] | None) -> None:
        """Put tokens behind the sequence; `logits` [vocab] of the last one are read where they are wanted."""
        loaded, count = self._loaded, len(tokens)
        profile = ONE_TOKEN if count == 1 else CHUNK
        loaded.prepare(self._cache, profile, count)
        self._device.write(loaded.buffers["input_ids"], tokens)
        self._device.write(loaded.buffers["start"], np.array([self._length], np.int64))
        self._device.write(loaded.buffers["rows"], np.array([count - 1], np.int64))
        self._device.run(loaded.plans, repeats=count == 1)
        if logits is not None:
            self._device.read(loaded.buffers["logits"], logits)

    def _read_routing(self, routing: Routing, start: int, stop: int) -> None:
        for index, layer in enumerate(self._info.moe_layers):
            for name, values in routing._asdict().items():
                part = np.empty((stop - start, self._info.num_experts_per_tok), values.dtype)
                self._device.read(self._loaded.buffers[f"{name}.{layer}"], part)
                values[index, start:stop] = part

    # the cache

    def _allocate_cache(self) -> None:
        for entry in self._info.cache:
            address = self._device.allocate(int(np.prod(self._cache_shape(entry))) * np.dtype(entry.dtype).itemsize)
            self._owned.append(address)
            self._cache[entry.name] = address

    def _cache_shape(self, entry: CacheEntry) -> tuple[int, ...]:
        return _row_shape(entry, self._info.max_seq_len)

    def _read_cache(self, entry: CacheEntry) -> NDArray[Any]:
        values = np.empty(self._cache_shape(entry), np.dtype(entry.dtype))
        self._device.read(self._cache[entry.name], values)
        return values


class _Loaded:
    """The engines of a folder and the buffers between them, for one or more sequences that run in turns."""

    def __init__(self, device: Device, info: EngineInfo, parts: list[_Part]) -> None:
        self.users = 0
        self.lock = threading.Lock()
        self.parts = parts
        self.plans: list[Plan] = []
        self.buffers: dict[str, int] = {}
        self._device = device
        self._sequence: dict[str, int] | None = None
        self._profile = -1
        self._tokens = -1
        try:
            for part in parts:
                self.plans.append(device.load(part.path))
            self._allocate(info)
        except BaseException:
            self.close()
            raise

    def prepare(self, cache: dict[str, int], profile: int, tokens: int) -> None:
        """Bind what changed since the last run: another sequence's cache, the profile, the count of tokens."""
        if cache is not self._sequence:
            for part, plan in zip(self.parts, self.plans, strict=True):
                for name in part.inputs:
                    if name.startswith("past."):
                        address = cache[name.removeprefix("past.")]
                        plan.bind(name, address)
                        plan.bind(name.replace("past.", "present.", 1), address)
            self._sequence = cache
        if profile != self._profile:
            for plan in self.plans:
                plan.set_profile(profile)
            self._profile, self._tokens = profile, -1
        if tokens != self._tokens:
            for part, plan in zip(self.parts, self.plans, strict=True):
                for name, shape in (("input_ids", (tokens,)), ("hidden", (tokens, part.hidden_size)), ("rows", (1,))):
                    if name in part.inputs:
                        plan.set_shape(name, shape)
            self._tokens = tokens

    def _allocate(self, info: EngineInfo) -> None:
        chunk, k = int(info.session["chunk"]), info.num_experts_per_tok
        sizes = {"input_ids": 8 * chunk, "start": 8, "rows": 8, "logits": 4 * info.vocab_size}
        for layer in info.moe_layers:
            sizes |= {f"experts.{layer}": 8 * chunk * k, f"weights.{layer}": 4 * chunk * k}
        hidden = [4 * chunk * part.hidden_size for part in self.parts if "hidden" in part.inputs]
        for index, nbytes in enumerate(hidden[:2]):  # one is read while the other is written
            sizes[f"hidden.{index}"] = nbytes
        for name, nbytes in sizes.items():
            self.buffers[name] = self._device.allocate(nbytes)
        for index, (part, plan) in enumerate(zip(self.parts, self.plans, strict=True)):
            for name in (*part.inputs, *part.outputs):
                if name == "hidden":
                    plan.bind(name, self.buffers[f"hidden.{(index - 1) % 2}"])
                elif name == "hidden.next":
                    plan.bind(name, self.buffers[f"hidden.{index % 2}"])
                elif not name.startswith(("past.", "present.")):
                    plan.bind(name, self.buffers[name])

    def close(self) -> None:
        for plan in self.plans:
            plan.close()
        for address in self.buffers.values():
            self._device.free(address)
        self.plans.clear()
        self.buffers.clear()


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


def _load(device: Device, folder: Path, info: EngineInfo) -> _Loaded:
    """Raises EngineError where engine.json does not describe engines that chain."""
    parts = []
    for entry in info.session["parts"]:
        shapes = entry["profiles"][ONE_TOKEN]
        hidden = int(shapes["hidden"][0][1]) if "hidden" in shapes else 0
        parts.append(_Part(tuple(entry["inputs"]), tuple(entry["outputs"]), hidden, folder / entry["engine"]))
    _check_chain(parts, info)
    return _Loaded(device, info, parts)


def _check_chain(parts: list[_Part], info: EngineInfo) -> None:
    """A mix-up of engines would read and write past buffers: each name must be there, once, where it belongs."""
    taken = [name for part in parts for name in part.inputs if name.startswith("past.")]
    given = [name for part in parts for name in part.outputs]
    wanted = [f"{kind}.{layer}" for layer in info.moe_layers for kind in ("experts", "weights")]
    wanted += [f"present.{entry.name}" for entry in info.cache] + ["logits"] + ["hidden.next"] * (len(parts) - 1)
    chained = parts and "input_ids" in parts[0].inputs and "logits" in parts[-1].outputs
    chained = chained and all("hidden" in part.inputs for part in parts[1:])
    if not chained or sorted(given) != sorted(wanted) or sorted(taken) != sorted(
        f"past.{entry.name}" for entry in info.cache
    ):
        raise EngineError(
            f"engine '{info.profile}' is not what its engine.json says (its engines do not chain); build it again: "
            f"moedge build BUNDLE --profile {info.profile}"
        )


def _row_shape(entry: CacheEntry, tokens: int) -> tuple[int, ...]:
    heads = entry.heads or 1
    return (1, heads, tokens, entry.width // heads)


def _empty_routing(info: EngineInfo, count: int) -> Routing:
    shape = (len(info.moe_layers), count, info.num_experts_per_tok)
    return Routing(np.empty(shape, np.int64), np.empty(shape, np.float32))
