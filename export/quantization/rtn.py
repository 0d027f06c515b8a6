"""`rtn`: round to nearest, symmetric, one scale a group from its largest magnitude."""

from __future__ import annotations

import numpy as np

from . import Array, Quantized


def quantize(values: Array, bits: int, group_size: int) -> Quantized:
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // group_size, group_size)
    middle = 1 << (bits - 1)
    largest = np.abs(grouped).max(axis=-1)
    # A group of zeros gets scale 1: any positive scale is right, and TensorRT refuses zero scales.
    scales = np.where(largest > 0, largest / np.float32(middle - 1), np.float32(1)).astype(np.float32)
    codes = np.rint(grouped / scales[..., None]) + middle
    np.clip(codes, 0, 2 * middle - 1, out=codes)
    return Quantized(codes.astype(np.uint8).reshape(rows, columns), scales, None, bits, group_size)
