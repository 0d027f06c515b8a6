"""Reading weights.bin back, independently of how it was written: for the parity check and for targets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .layout import Layout, Slot, Stored
from .quantization import FLOAT8, widen_int6

Array = np.ndarray[Any, Any]
CHUNK_BYTES = 512 << 10  # float32 bytes dequantized at once: what stays in the processor's cache
# Both codes of a byte as two float32, low nibble first, seen as one 8-byte number.
_CODES = np.arange(256, dtype=np.uint8)
_PAIRS = np.stack([_CODES & 15, _CODES >> 4], axis=-1).astype(np.float32).view(np.uint64).reshape(-1)


class WeightsReader:
    """Canonical tensors out of a weights.bin, each read when asked for."""

    def __init__(self, path: Path, layout: Layout, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.path = path
        self.layout = layout
        self.chunk_bytes = chunk_bytes

    def read(self, name: str) -> Array:
        """float32 [shape]: a whole canonical tensor, dequantized."""
        stored = self.layout[name]
        values = self.read_channels(stored, 0, math.prod(stored.data.shape[:-1]))
        return values.reshape(*stored.data.shape[:-1], values.shape[-1])

    def open(self, name: str) -> Any:
        """A canonical tensor: an array where it is small, else a `StoredMatrix`, read as it is used."""
        stored = self.layout[name]
        if len(stored.data.shape) < 2 or 4 * math.prod(stored.data.shape) <= self.chunk_bytes:
            return self.read(name)
        return StoredMatrix(self, stored, 0, (*stored.data.shape[:-1], stored.channels))

    def read_channels(self, stored: Stored, start: int, stop: int) -> Array:
        """float32 [stop - start, channels]: as `read_rows`, columns where the `order` in the file says they belong."""
        if stored.order is None:
            return self.read_rows(stored, start, stop)
        each = math.prod(stored.weight.unit_shape[:-1])
        values = np.zeros((stop - start, stored.channels), np.float32)
        for unit in range(start // each, -(-stop // each)):
            first, last = max(start, unit * each), min(stop, (unit + 1) * each)
            rows, order = self.read_rows(stored, first, last), self.read_order(stored, unit)
            # A channel may stand behind several columns, of which zeros fill all but one.
            np.add.at(values[first - start : last - start].T, order, rows.T)
        return values

    def read_order(self, stored: Stored, unit: int) -> Array:
        """int64 [in]: the input channel behind each column of a unit."""
        assert stored.order is not None
        width = stored.order.shape[-1]
        first = unit * width if len(stored.order.shape) == 2 else 0
        return self.read_flat(stored.order, first, first + width)

    def read_rows(self, stored: Stored, start: int, stop: int) -> Array:
        """float32 [stop - start, in]: rows of the flattened [rows, in] view, dequantized."""
        width = stored.data.shape[-1]
        values = self.read_codes(stored.data, start * width, stop * width).reshape(stop - start, width)
        if stored.scales is None or stored.zero_points is None:
            return values
        groups = stored.scales.shape[-1]
        scales = self.read_codes(stored.scales, start * groups, stop * groups).reshape(-1, groups, 1)
        zero_points = self.read_codes(stored.zero_points, start * groups, stop * groups).reshape(-1, groups, 1)
        grouped = values.reshape(stop - start, groups, stored.group_size)
        grouped -= zero_points
        grouped *= scales
        return values

    def read_codes(self, slot: Slot, start: int, stop: int) -> Array:
        """Elements `start` to `stop` of a slot as float32; int6, by whole rows, as the 8-bit codes of the graph."""
        if slot.dtype == "uint6":
            behind, count = slot.offset + math.prod(slot.shape) // 2, stop - start
            upper = np.fromfile(self.path, np.uint8, count // 2, offset=slot.offset + start // 2)
            lower = np.fromfile(self.path, np.uint8, count // 4, offset=behind + start // 4)
            return widen_int6(upper, lower).astype(np.float32)
        if slot.dtype == "uint4":
            first, last = start // 2, (stop + 1) // 2
            packed = np.fromfile(self.path, np.uint8, last - first, offset=slot.offset + first)
            return _PAIRS[packed].view(np.float32)[start - 2 * first : stop - 2 * first]
        return self.read_flat(slot, start, stop).astype(np.float32, copy=False)

    def read_flat(self, slot: Slot, start: int, stop: int) -> Array:
        """Elements `start` to `stop` of a slot in its own dtype; int4 as one uint8 each, float8 as float32."""
        if slot.dtype == "uint4":
            return self.read_codes(slot, start, stop).astype(np.uint8)
        if slot.dtype == "float8":
            values: Array = FLOAT8[np.fromfile(self.path, np.uint8, stop - start, offset=slot.offset + start)]
            return values
        dtype = np.dtype(ml_dtypes.bfloat16 if slot.dtype == "bfloat16" else slot.dtype)
        return np.fromfile(self.path, dtype, stop - start, offset=slot.offset + start * dtype.itemsize)


class StoredMatrix:
    """A stored tensor of two or three axes whose rows are read as they are used.

    As much of an array as the reference decoder needs: an entry or rows by index, and the product with its transpose.
    """

    __array_ufunc__ = None  # so that `array @ matrix.T` asks the matrix and does not read it whole

    def __init__(self, reader: WeightsReader, stored: Stored, first: int, shape: tuple[int, ...]) -> None:
        self.reader, self.stored, self.first, self.shape = reader, stored, first, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        rows = math.prod(self.shape[:-1])
        values = self.reader.read_channels(self.stored, self.first, self.first + rows).reshape(self.shape)
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, index: Any) -> Any:
        """An entry of the first axis by its number, or rows [n, in] by an array of theirs."""
        if len(self.shape) == 2:
            rows = [self.first + int(row) for row in index]
            return np.concatenate([self.reader.read_channels(self.stored, row, row + 1) for row in rows])
        entry = StoredMatrix(self.reader, self.stored, self.first + int(index) * self.shape[1], self.shape[1:])
        return np.asarray(entry) if 4 * math.prod(entry.shape) <= self.reader.chunk_bytes else entry

    @property
    def T(self) -> _Transposed:
        return _Transposed(self)


class _Transposed:
    __array_ufunc__ = None

    def __init__(self, matrix: StoredMatrix) -> None:
        self.matrix = matrix

    def __rmatmul__(self, x: Array) -> Array:
        """x float32 [n, in] -> [n, rows], read some rows at a time."""
        matrix, reader = self.matrix, self.matrix.reader
        rows, width = matrix.shape
        result = np.empty((len(x), rows), np.float32)
        step = max(1, reader.chunk_bytes // (4 * width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = reader.read_channels(matrix.stored, matrix.first + start, matrix.first + stop)
            result[:, start:stop] = x @ part.T  # not `out=`: numpy multiplies into strided memory without BLAS
        return result
