"""What a TensorRT build log says of the engine: its memory, and whether a kernel writes matrices out.

The log prints, with `profiling_verbosity` DETAILED, every kernel with its inputs, constants and outputs; once the bytes
of all weights; for each optimization profile the bytes of activations. No GPU is needed for any of it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KERNEL = re.compile(
    r"^Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*)\]"
)
_TENSOR = re.compile(r"Name: (?P<name>[^,]+), Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
_FLOATS = ("Half", "Float", "BFloat16")


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]  # -1 where it is dynamic
    dtype: str

    @property
    def elements(self) -> int:
        return math.prod(self.shape) if all(size >= 0 for size in self.shape) else 0


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine; `kind` is kgen (generated), runtime_fusion or gemm."""

    name: str
    kind: str
    profile: int
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def writes_out(self, elements: int) -> bool:
        """Whether it reads a stored matrix and writes a floating point one, both of at least `elements`."""
        read = any(each.elements >= elements for each in self.constants)
        return read and any(each.dtype in _FLOATS and each.elements >= elements for each in self.outputs)


@dataclass(frozen=True)
class BuildLog:
    """`activation_bytes`: scratch and activations, by optimization profile."""

    weights_bytes: int | None
    activation_bytes: tuple[int, ...]
    kernels: tuple[Kernel, ...]

    def materialized(self, profile: int, elements: int) -> list[str]:
        """Names of the kernels of a profile that write a matrix of at least `elements` out on every run."""
        return [each.name for each in self.kernels if each.profile == profile and each.writes_out(elements)]

    def to_json(self, elements: int) -> dict[str, Any]:
        """For engine.json; `elements` of the smallest expert matrix."""
        profiles = range(len(self.activation_bytes))
        return {
            "weights_bytes": self.weights_bytes,
            "activation_bytes": list(self.activation_bytes),
            "kernels": [sum(each.profile == profile for each in self.kernels) for profile in profiles],
            "materialized_matrices": [len(self.materialized(profile, elements)) for profile in profiles],
        }


def read_build_log(path: Path) -> BuildLog:
    """Read a log that `_trt_builder` kept."""
    weights: int | None = None
    activations: list[int] = []
    kernels: list[Kernel] = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.startswith("Name: "):
                kernel = _parse_kernel(line)
                if kernel is not None:
                    kernels.append(kernel)
            elif found := _ACTIVATIONS.search(line):
                activations.append(int(found[1]))
            elif found := _WEIGHTS.search(line):
                weights = int(found[1])
    return BuildLog(weights, tuple(activations), tuple(kernels))


def _parse_kernel(line: str) -> Kernel | None:
    found = _KERNEL.match(line)
    if found is None:
        return None
    profile = _PROFILE.search(found["name"])
    constants, outputs = _parse_tensors(found["constants"]), _parse_tensors(found["outputs"])
    return Kernel(found["name"], found["kind"], int(profile[1]) if profile else 0, constants, outputs)


def _parse_tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(found["name"], tuple(int(size) for size in found["shape"].split(",") if size.strip()), found["dtype"])
        for found in _TENSOR.finditer(text)
    )
