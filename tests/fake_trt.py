"""A device without a GPU: memory that is numpy's, engines that are the lowered ONNX on onnxruntime.

It is stricter than TensorRT where that would be silent: every address must lie in one allocation and have room for what
is bound to it, shapes must be in the profile's range, and the cache must come out where it went in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moedge.profiles.targets._trt_check import open_plain_session

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


class FakeDevice:
    """`profiles`: by engine file, what engine.json says of it; `most` bytes of memory."""

    def __init__(self, parts: list[dict[str, Any]], most: int = 1 << 30) -> None:
        self.parts = {part["engine"]: part for part in parts}
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.next = 4096
        self.most = most
        self.plans: list[FakePlan] = []
        self.runs: list[tuple[int, int, bool]] = []  # profile, tokens, repeats
        self.closed = False

    def allocate(self, nbytes: int) -> int:
        from moedge.errors import EngineError

        if nbytes + sum(block.nbytes for block in self.memory.values()) > self.most:
            raise EngineError("CUDA refuses cudaMalloc: out of memory (error 2)")
        address = self.next
        self.next += -(-nbytes // 256) * 256 + 4096
        self.memory[address] = np.zeros(nbytes, np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def view(self, address: int, nbytes: int) -> np.ndarray[Any, Any]:
        start = max(known for known in self.memory if known <= address)
        block = self.memory[start][address - start :]
        assert 0 < nbytes <= block.nbytes, f"{nbytes} bytes at an address that has {block.nbytes}"
        return block[:nbytes]

    def clear(self, address: int, nbytes: int) -> None:
        self.view(address, nbytes)[:] = 0

    def write(self, address: int, values: np.ndarray[Any, Any]) -> None:
        self.view(address, values.nbytes)[:] = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

    def read(self, address: int, values: np.ndarray[Any, Any]) -> None:
        assert values.flags.c_contiguous
        values.reshape(-1).view(np.uint8)[:] = self.view(address, values.nbytes)

    def load(self, path: Path) -> FakePlan:
        plan = FakePlan(self, path.parent, self.parts[path.name])
        self.plans.append(plan)
        return plan

    def run(self, plans: Sequence[Any], *, repeats: bool) -> None:
        for plan in plans:
            plan.enqueue()
        self.runs.append((plans[0].profile, plans[0].tokens, repeats))

    def close(self) -> None:
        self.closed = True


class FakePlan:
    def __init__(self, device: FakeDevice, folder: Path, part: dict[str, Any]) -> None:
        self.device = device
        self.part = part
        self.session = open_plain_session(folder / part["model"])
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.profile = 0
        self.binds = 0

    @property
    def tokens(self) -> int:
        return (self.shapes.get("input_ids") or self.shapes["hidden"])[0]

    def bind(self, name: str, address: int) -> None:
        assert name in self.part["inputs"] or name in self.part["outputs"], name
        assert address % 256 == 0, f"{name} at {address}: TensorRT wants tensors to begin at a multiple of 256"
        self.addresses[name] = address
        self.binds += 1

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        low, _, high = self.part["profiles"][self.profile][name]
        assert all(least <= each <= most for least, each, most in zip(low, shape, high, strict=True)), (name, shape)
        self.shapes[name] = shape

    def set_profile(self, index: int) -> None:
        self.profile = index
        self.shapes = {}

    def enqueue(self) -> None:
        feeds = {}
        for value in self.session.get_inputs():
            shape = self.shapes.get(value.name) or tuple(value.shape)
            assert all(isinstance(size, int) for size in shape), f"{value.name} {shape}: no shape was set"
            feeds[value.name] = self._tensor(value, shape).copy()
        outputs = self.session.get_outputs()
        results = self.session.run([value.name for value in outputs], feeds)
        for value, result in zip(outputs, results, strict=True):
            if value.name.startswith("present."):
                assert self.addresses[value.name] == self.addresses[value.name.replace("present.", "past.", 1)]
            self._tensor(value, result.shape)[...] = result

    def _tensor(self, value: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = np.dtype(_DTYPES[value.type])
        nbytes = int(np.prod(shape)) * dtype.itemsize
        return self.device.view(self.addresses[value.name], nbytes).view(dtype).reshape(shape)

    def close(self) -> None:
        self.session = None
