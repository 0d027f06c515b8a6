"""Where each canonical tensor lies in weights.bin, decided from shapes alone, before a byte is read.

Every tensor is stored once, 64-byte aligned. int4 is unsigned, two to a byte, low nibble first, blocks along the
input dimension, so that one offset serves `DequantizeLinear`, `MatMulNBits` and `QMoE`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .quantization import pick_group_size
from .weights import Weight

ALIGNMENT = 64
Dtype = Literal["float32", "float16", "uint8", "uint4"]
_BITS = {"float32": 32, "float16": 16, "uint8": 8, "uint4": 4}


@dataclass(frozen=True)
class Slot:
    """A tensor in weights.bin: bytes `offset` to `offset + nbytes`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return (math.prod(self.shape) * _BITS[self.dtype] + 7) // 8


@dataclass(frozen=True)
class Stored:
    """A canonical tensor as it is stored: floating point, or codes with scales and zero points."""

    weight: Weight
    data: Slot
    scales: Slot | None = None
    zero_points: Slot | None = None
    group_size: int = 0
    shared_zero_points: bool = False

    @property
    def bits(self) -> int:
        return _BITS[self.data.dtype]

    @property
    def quantized(self) -> bool:
        return self.scales is not None

    @property
    def nbytes(self) -> int:
        """What reading this tensor costs; a shared constant of zero points counts for nothing."""
        slots = [self.data, self.scales, None if self.shared_zero_points else self.zero_points]
        return sum(slot.nbytes for slot in slots if slot is not None)


@dataclass(frozen=True)
class Layout:
    """Every stored tensor by canonical name, and the file's size."""

    stored: dict[str, Stored]
    constants: tuple[tuple[Slot, int], ...]  # (slot, byte value): zero points that every symmetric tensor shares
    nbytes: int

    def __getitem__(self, name: str) -> Stored:
        return self.stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    def sizes_by_role(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for stored in self.stored.values():
            sizes[stored.weight.role] = sizes.get(stored.weight.role, 0) + stored.nbytes
        return sizes


def plan_layout(plan: list[Weight], weights: str, group_size: int, *, zero_points: bool) -> Layout:
    """Give each tensor its dtype, group size and place. `zero_points`: the algorithm makes its own for int4."""
    allocator = _Allocator()
    symmetric: dict[Dtype, int] = {}
    choices = [(weight, *_choose(weight, weights, group_size)) for weight in plan]
    for weight, dtype, group in choices:
        if group and not _owns_zero_points(dtype, zero_points):
            symmetric[dtype] = max(symmetric.get(dtype, 0), math.prod(weight.shape) // group)
    constants = {dtype: allocator.take(f"symmetric.{dtype}", dtype, (count,)) for dtype, count in symmetric.items()}
    stored = {}
    for weight, dtype, group in choices:
        data = allocator.take(weight.name, dtype, weight.shape)
        if not group:
            stored[weight.name] = Stored(weight, data)
            continue
        shape = (*weight.shape[:-1], weight.shape[-1] // group)
        scales = allocator.take(f"{weight.name}.scales", "float32", shape)
        if shared := not _owns_zero_points(dtype, zero_points):
            zero = Slot(f"{weight.name}.zero_points", dtype, shape, constants[dtype].offset)
        else:
            zero = allocator.take(f"{weight.name}.zero_points", dtype, shape)
        stored[weight.name] = Stored(weight, data, scales, zero, group, shared)
    fill = tuple((slot, 0x88 if slot.dtype == "uint4" else 0x80) for slot in constants.values())
    return Layout(stored, fill, allocator.end)


def _owns_zero_points(dtype: Dtype, zero_points: bool) -> bool:
    return zero_points and dtype == "uint4"


def _choose(weight: Weight, weights: str, group_size: int) -> tuple[Dtype, int]:
    """(dtype, group size or 0). A matrix that no group size divides stays float32."""
    if weight.precision == "keep" or weights == "fp32":
        return "float32", 0
    if weights == "fp16":
        return "float16", 0
    group = pick_group_size(group_size, weight.shape[-1], *weight.group_with)
    if group is None:
        return "float32", 0
    return ("uint8" if weights == "int8" or weight.precision == "table" else "uint4"), group


class _Allocator:
    def __init__(self) -> None:
        self.end = 0

    def take(self, name: str, dtype: Dtype, shape: tuple[int, ...]) -> Slot:
        slot = Slot(name, dtype, shape, self.end)
        self.end = -(-(self.end + slot.nbytes) // ALIGNMENT) * ALIGNMENT
        return slot
