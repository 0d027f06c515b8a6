"""`rtn`: round to nearest; one scale a group, from its largest magnitude or, with zero points, from its range."""

from __future__ import annotations

import numpy as np

from . import Array, Quantized, round_scales

ZERO_POINTS = False
# Below this a group counts as zeros: its scale would be subnormal.
TINIEST = np.float32(1e-30)


def quantize(values: Array, bits: int, group_size: int, *, zero_points: bool = False) -> Quantized:
    rows, columns = values.shape
    grouped = values.reshape(rows, columns // group_size, group_size)
    scales, zeros = find_range(grouped, bits) if zero_points else (find_magnitude(grouped, bits), None)
    scales = round_scales(scales, bits)
    offset = np.float32(1 << (bits - 1)) if zeros is None else zeros[..., None]
    codes = np.rint(grouped / scales[..., None]) + offset
    np.clip(codes, 0, (1 << bits) - 1, out=codes)
    packed_zeros = None if zeros is None else zeros.astype(np.uint8)
    return Quantized(codes.astype(np.uint8).reshape(rows, columns), scales, packed_zeros, bits, group_size)


def find_magnitude(grouped: Array, bits: int) -> Array:
    """Scales float32 [..., groups] of the symmetric grid, for float32 [..., groups, group size]."""
    largest = np.abs(grouped).max(axis=-1)
    # A group of zeros gets scale 1: any positive scale is right, and TensorRT refuses zero scales.
    scales: Array = np.where(largest > TINIEST, largest / np.float32((1 << (bits - 1)) - 1), np.float32(1))
    return scales.astype(np.float32)


def find_range(grouped: Array, bits: int) -> tuple[Array, Array]:
    """(scales, zero points), float32 [..., groups] both, of the grid from each group's least to its greatest value."""
    low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
    steps = np.float32((1 << bits) - 1)
    span = high - low
    empty = span <= TINIEST
    scales: Array = np.where(empty, np.float32(1), span / steps).astype(np.float32)
    zeros: Array = np.where(empty, np.float32(1 << (bits - 1)), np.rint(-low / scales)).astype(np.float32)
    return scales, np.clip(zeros, 0, steps)
