"""Reading weights.bin back, independently of how it was written: for the parity check and for targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .layout import Layout, Slot, Stored

Array = np.ndarray[Any, Any]


class WeightsReader:
    """Canonical tensors out of a weights.bin, each read when asked for."""

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path = path
        self.layout = layout

    def read(self, name: str) -> Array:
        """float32 [shape]: a whole canonical tensor, dequantized."""
        stored = self.layout[name]
        rows = int(np.prod(stored.data.shape[:-1], dtype=np.int64))
        return self.read_rows(stored, 0, rows).reshape(stored.data.shape)

    def read_rows(self, stored: Stored, start: int, stop: int) -> Array:
        """float32 [stop - start, in]: rows of the flattened [rows, in] view, dequantized."""
        width = stored.data.shape[-1]
        codes = self.read_flat(stored.data, start * width, stop * width)
        values = codes.astype(np.float32).reshape(stop - start, width)
        if stored.scales is None or stored.zero_points is None:
            return values
        groups = stored.scales.shape[-1]
        scales = self.read_flat(stored.scales, start * groups, stop * groups).reshape(-1, groups, 1)
        zero_points = self.read_flat(stored.zero_points, start * groups, stop * groups).reshape(-1, groups, 1)
        grouped = values.reshape(stop - start, groups, stored.group_size)
        grouped -= zero_points.astype(np.float32)
        grouped *= scales
        return grouped.reshape(stop - start, width)

    def read_flat(self, slot: Slot, start: int, stop: int) -> Array:
        """Elements `start` to `stop` of a slot in its own dtype; int4 as one uint8 each."""
        if slot.dtype == "uint4":
            first, last = start // 2, (stop + 1) // 2
            packed = np.fromfile(self.path, np.uint8, last - first, offset=slot.offset + first)
            both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)
            return both[start - 2 * first : stop - 2 * first]
        dtype = np.dtype(slot.dtype)
        return np.fromfile(self.path, dtype, stop - start, offset=slot.offset + start * dtype.itemsize)
