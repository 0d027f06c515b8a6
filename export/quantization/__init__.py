"""Weight quantization: one file per algorithm, and one per quantized checkpoint format."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...errors import CheckpointError
from ..options import ALGORITHMS, GROUP_SIZES

Array = np.ndarray[Any, Any]



@dataclass(frozen=True)
class Quantized:
    """Codes uint8 [rows, in] (one a byte), scales float32 [rows, in/group], zero points uint8 like scales, or None
    for the symmetric middle (8 of int4, 128 of int8). value = (code - zero point) * scale."""

    codes: Array
    scales: Array
    zero_points: Array | None
    bits: int
    group_size: int

    def dequantize(self) -> Array:
        """float32 [rows, in]."""
        rows, columns = self.codes.shape
        zero: Any = 1 << (self.bits - 1) if self.zero_points is None else self.zero_points.astype(np.float32)[..., None]
        grouped = self.codes.reshape(rows, -1, self.group_size).astype(np.float32) - zero
        values: Array = (grouped * self.scales[..., None]).reshape(rows, columns)
        return values


class Algorithm(Protocol):
    """What an algorithm's module offers."""

    def quantize(self, values: Array, bits: int, group_size: int) -> Quantized:
        """values float32 [rows, in], in divisible by group_size."""


def find_algorithm(name: str) -> Algorithm:
    """The module of an algorithm; raises CheckpointError for an unknown one, listing the known."""
    if name not in ALGORITHMS:
        raise CheckpointError(f"algorithm {name!r} is not known; known: {', '.join(ALGORITHMS)}")
    algorithm: Algorithm = importlib.import_module(f".{name}", __name__)
    return algorithm


def pick_group_size(wanted: int, *widths: int) -> int | None:
    """The largest group size up to `wanted` that divides every width; None when none does."""
    return next((size for size in GROUP_SIZES if size <= wanted and all(width % size == 0 for width in widths)), None)


def pack_int4(codes: Array) -> Array:
    """uint8 [..., n] of values 0 to 15 -> uint8 [..., n/2], low nibble first."""
    flat = codes.reshape(-1)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    packed = flat[0::2] | (flat[1::2] << 4)
    shape = (*codes.shape[:-1], codes.shape[-1] // 2) if codes.shape[-1] % 2 == 0 else packed.shape
    result: Array = packed.reshape(shape)
    return result


def unpack_int4(packed: Array) -> Array:
    """The inverse of `pack_int4` for an even last axis: uint8 [..., n/2] -> uint8 [..., n]."""
    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[..., 0] = packed & 15
    codes[..., 1] = packed >> 4
    unpacked: Array = codes.reshape(*packed.shape[:-1], packed.shape[-1] * 2)
    return unpacked
