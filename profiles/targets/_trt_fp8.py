"""FP8 weights (E4M3, one scale a row), quantized again while a network is laid out, whatever the bundle stores.

A row is divided by its largest magnitude / 448, E4M3's largest number, and each quotient goes to the nearest number of
E4M3: 3 bits of mantissa, so a weight moves by 1/16 of itself at most (Micikevicius et al., arXiv:2209.05433, table 1).
N = out, K = in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

    from ._canonical import Matrix

Array = np.ndarray[Any, Any]

LARGEST = 448.0
LEAST_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix as they are stored; bytes among them are float8."""

    stored: ir.Value


class Values:
    """A stored matrix as float32, dequantized slice by slice: what indexing and slicing of its leading axes give."""

    def __init__(
        self, matrix: Matrix, data: Any, read: Callable[[Any], Array], zero_points: Callable[[Any], Array]
    ) -> None:
        self.shape = matrix.shape
        self.itemsize = 4
        self._matrix = matrix
        self._data = read(data)
        self._scales = None if matrix.scales is None else read(Scales(matrix.scales))
        self._zero_points: Array | None = None
        if self._scales is not None and matrix.zero_points is not None and not matrix.symmetric:
            self._zero_points = zero_points(matrix.zero_points).reshape(self._scales.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, key: Any) -> Array:
        data = self._data[key]
        if self._scales is None:
            return np.asarray(data, np.float32)
        if self._matrix.bits == 4:
            data = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
        middle = np.float32(128 if self._matrix.six_bits else 1 << (self._matrix.bits - 1))
        points = middle if self._zero_points is None else self._spread(self._zero_points[key])
        values: Array = (data.astype(np.float32) - points) * self._spread(self._scales[key])
        return values

    def reshape(self, *shape: int) -> Array:
        return self[:].reshape(shape)

    def _spread(self, part: Array) -> Array:
        """A number of each block for each of its inputs."""
        return np.repeat(part.astype(np.float32), self._matrix.block_size, axis=-1)


def scales_of(values: Array, real: type[np.generic]) -> Array:
    """[N, K] -> [N], in the precision that they are kept in, and never 0, which TensorRT refuses."""
    scales = (np.abs(values).max(axis=1) / LARGEST).astype(real)
    least = np.finfo(np.float16).smallest_subnormal
    clamped: Array = np.maximum(scales, np.array(least, real))
    return clamped


def codes_of(values: Array, real: type[np.generic]) -> Array:
    """[N, K] -> E4M3 codes as bytes."""
    import ml_dtypes

    quotients = values / scales_of(values, real).astype(np.float32)[:, None]
    codes: Array = np.clip(quotients, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return codes


def rounded(values: Array, real: type[np.generic]) -> Array:
    """[N, K] -> the float32 values that the codes stand for."""
    import ml_dtypes

    codes = codes_of(values, real).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    result: Array = codes * scales_of(values, real).astype(np.float32)[:, None]
    return result
