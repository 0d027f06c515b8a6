"""TensorRT engines on a device with the buffers between them, and the caches of the sequences that they run.

Whatever touches a GPU stands behind `Device` and `Plan`; this file knows addresses and shapes alone, so it runs, and is
tested, wherever something else takes their place. H = hidden size, L = slots of the cache, B = lanes.
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

if TYPE_CHECKING:
    from ..preflight import CacheEntry, EngineInfo

ONE_TOKEN, CHUNK, LANES = 0, 1, 2  # the engine's optimization profiles


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

    def clear(self, address: int, nbytes: int) -> None:
        """Make bytes zeros."""

    def write(self, address: int, values: NDArray[Any]) -> None: ...

    def read(self, address: int, values: NDArray[Any]) -> None:
        """Fill `values`; waits for what was enqueued before."""

    def load(self, path: Path) -> Plan:
        """Raises EngineError where the device refuses the engine, with its own words."""

    def run(self, plans: Sequence[Plan], *, repeats: bool) -> None:
        """Enqueue plans in a row. `repeats`: the same will follow, with the same shapes and addresses."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """One engine: what it takes and gives, and by optimization profile the least and largest shapes of inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    profiles: tuple[dict[str, list[list[int]]], ...]
    path: Path


class CacheBlock:
    """The caches of B sequences side by side, [B, heads, L, dim] a tensor: a run takes one of them or all.

    Raises:
        EngineError: they do not fit the memory.
    """

    def __init__(self, device: Device, info: EngineInfo, lanes: int) -> None:
        self.lanes = lanes
        self.free = list(range(lanes))
        self._device = device
        self._bytes = {
            entry.name: int(np.prod(lane_shape(info, entry))) * np.dtype(entry.dtype).itemsize for entry in info.cache
        }
        self._addresses: dict[str, int] = {}
        try:
            for name, nbytes in self._bytes.items():
                self._addresses[name] = device.allocate(lanes * nbytes)
        except BaseException:
            self.close()
            raise

    def address(self, name: str, lane: int) -> int:
        return self._addresses[name] + lane * self._bytes[name]

    def take(self) -> int:
        """A free lane, nothing in it; what another sequence left might be no number."""
        lane = self.free.pop(0)
        for name, nbytes in self._bytes.items():
            self._device.clear(self.address(name, lane), nbytes)
        return lane

    def close(self) -> None:
        for address in self._addresses.values():
            self._device.free(address)
        self._addresses.clear()


class Engines:
    """The engines of a folder and the buffers between them, for one or more sequences that run in turns.

    `lanes`: sequences whose caches lie side by side, so that one run can step them; 1 or the engines' max_batch.

    Raises:
        EngineError: the device refuses an engine, has no memory for it, or engine.json describes no chain of engines.
    """

    def __init__(self, device: Device, folder: Path, info: EngineInfo, lanes: int = 1) -> None:
        self.device = device
        self.info = info
        self.lanes = info.max_batch if lanes > 1 else 1
        self.users = 0
        self.lock = threading.Lock()
        self.parts = [
            Part(tuple(each["inputs"]), tuple(each["outputs"]), tuple(each["profiles"]), folder / each["engine"])
            for each in info.session["parts"]
        ]
        self.plans: list[Plan] = []
        self.buffers: dict[str, int] = {}
        self._blocks: list[CacheBlock] = []
        self._bound: tuple[CacheBlock, int] | None = None
        self._profile = -1
        self._tokens = -1
        check_chain(self.parts, info)
        try:
            for part in self.parts:
                self.plans.append(device.load(part.path))
            self._allocate()
        except BaseException:
            self.close()
            raise

    # sequences

    def take_lane(self) -> tuple[CacheBlock, int]:
        """Room for a further sequence, beside others where there is some.

        Raises:
            EngineError: it does not fit the memory.
        """
        block = next((each for each in self._blocks if each.free), None)
        if block is None:
            block = CacheBlock(self.device, self.info, self.lanes)
            self._blocks.append(block)
        return block, block.take()

    def give_lane(self, block: CacheBlock, lane: int) -> None:
        block.free.append(lane)
        if len(block.free) == block.lanes:
            self._blocks.remove(block)
            block.close()
            if self._bound is not None and self._bound[0] is block:
                self._bound = None  # a new block may come to lie where this one was, or may not

    # one run

    def prepare(self, block: CacheBlock, lane: int, profile: int, tokens: int) -> None:
        """Bind what changed since the last run: another cache (from `lane` on), the profile, the count of tokens."""
        if (block, lane) != self._bound:
            for part, plan in zip(self.parts, self.plans, strict=True):
                for name in part.inputs:
                    if name.startswith("past."):
                        address = block.address(name.removeprefix("past."), lane)
                        plan.bind(name, address)
                        plan.bind(name.replace("past.", "present.", 1), address)
            self._bound = (block, lane)
        if profile != self._profile:
            for plan in self.plans:
                plan.set_profile(profile)
            self._profile, self._tokens = profile, -1
        if tokens != self._tokens:
            for part, plan in zip(self.parts, self.plans, strict=True):
                for name, (least, _, most) in part.profiles[profile].items():
                    plan.set_shape(name, tuple(most) if least == most else (tokens, *most[1:]))
            self._tokens = tokens

    def write(self, **values: Any) -> None:
        """Put int64 values into the buffers of inputs."""
        for name, numbers in values.items():
            self.device.write(self.buffers[name], np.ascontiguousarray(numbers, np.int64))

    def _allocate(self) -> None:
        info, lanes = self.info, self.info.max_batch
        rows, k = max(int(info.session["chunk"]), lanes), info.num_experts_per_tok
        sizes = {"input_ids": 8 * rows, "start": 8 * lanes, "source": 8 * lanes, "rows": 8 * lanes}
        sizes["logits"] = 4 * info.vocab_size * lanes
        for layer in info.moe_layers:
            sizes |= {f"experts.{layer}": 8 * rows * k, f"weights.{layer}": 4 * rows * k}
            if "load_decay" in info.session:
                sizes[f"load.{layer}"] = 4 * info.num_experts
        hidden = [4 * rows * part.profiles[0]["hidden"][0][1] for part in self.parts if "hidden" in part.inputs]
        for index, nbytes in enumerate(hidden[:2]):  # one is read while the other is written
            sizes[f"hidden.{index}"] = nbytes
        for name, nbytes in sizes.items():
            self.buffers[name] = self.device.allocate(nbytes)
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
            self.device.free(address)
        self.plans.clear()
        self.buffers.clear()


def lane_shape(info: EngineInfo, entry: CacheEntry) -> tuple[int, ...]:
    """[1, heads, L, dim]: a cache tensor of one sequence."""
    slots = int(info.session["cache"]["shape"][2])
    return rows_shape(entry, slots)


def rows_shape(entry: CacheEntry, tokens: int) -> tuple[int, ...]:
    """The same of so many tokens."""
    heads = entry.heads or 1
    return (1, heads, tokens, entry.width // heads)


def check_chain(parts: list[Part], info: EngineInfo) -> None:
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
