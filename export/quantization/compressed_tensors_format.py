"""compressed-tensors checkpoints (https://github.com/vllm-project/compressed-tensors), as llm-compressor writes them.

For a matrix [out, in]: pack-quantized has weight_packed int32 [out, in*b/32] (lowest bits first, codes less half the
range), weight_scale [out, groups], weight_zero_point int32 [out*b/32, groups], weight_g_idx int32 [in];
int-quantized and float-quantized have weight int8 or float8 with weight_scale of a tensor, channels, groups or blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from . import Array, Integers, PackedMatrix, Quantized
from ._packed import (
    FLOATS,
    IntegerMatrix,
    bind_ordered,
    check_packed,
    find_bits,
    find_companion,
    find_groups,
    list_activations,
    read_order,
    read_scales,
    unpack_words,
)
from .fp8_block_format import FLOAT8, bind_float8

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


def check_settings(settings: dict[str, Any], where: str) -> None:
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise CheckpointError(f"{where}: config_groups is {groups!r}, an object was expected")
    own = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    for name in (settings.get("format", "dense"), *own):
        if name is not None and name not in _FORMATS:
            raise CheckpointError(f"{where}: format {name!r} is not read; read are: {', '.join(_FORMATS)}")
    sparsity = settings.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        raise CheckpointError(f"{where}: sparsity format {sparsity['format']!r} is not read; read are: dense")


def find_packed(checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
    stem = name.removesuffix(".weight")
    if stem == name:
        return None
    packed = f"{stem}.weight_packed"
    if packed in checkpoint:
        return _bind_packed(checkpoint, stem, packed)
    if name not in checkpoint:
        return None
    kind = checkpoint.entries[name].dtype.name
    also = list_activations(checkpoint, stem)
    if kind in FLOAT8:
        scales = find_companion(checkpoint, f"{stem}.weight_scale", name)
        return bind_float8(checkpoint, name, scales, _find_block(settings), also)
    return _bind_int8(checkpoint, stem, name) if kind == "int8" else None


def _find_block(settings: dict[str, Any]) -> tuple[int, int] | None:
    for group in (settings.get("config_groups") or {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        block = weights.get("block_structure") if isinstance(weights, dict) else None
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            return block[0], block[1]
    return None


def _bind_packed(checkpoint: Checkpoint, stem: str, codes: str) -> PackedMatrix:
    scales, size = (find_companion(checkpoint, f"{stem}.weight_{part}", codes) for part in ("scale", "shape"))
    found = checkpoint.entries[codes].shape
    if len(found) != 2:
        raise CheckpointError(f"{checkpoint.path}: tensor {codes!r} has shape {list(found)}, a matrix was expected")
    check_packed(checkpoint, size, (2,), ("int64", "int32"), "a matrix")
    rows, width = (int(value) for value in checkpoint.read(size))
    bits = find_bits(checkpoint, codes, checkpoint.entries[codes].shape[1], width)
    what = f"a matrix of {width} input and {rows} output channels in {bits} bits"
    check_packed(checkpoint, codes, (rows, -(-width * bits // 32)), ("int32",), what)
    grid = _Grid(checkpoint, stem, scales, rows, width)
    zeros = f"{stem}.weight_zero_point"
    own = zeros in checkpoint
    if own:
        check_packed(checkpoint, zeros, (-(-rows * bits // 32), grid.groups), ("int32",), what)
    order = f"{stem}.weight_g_idx"
    channels = read_order(checkpoint, order, grid.groups, width) if order in checkpoint else None

    def read(start: int, stop: int) -> Quantized:
        values = np.ascontiguousarray(unpack_words(checkpoint.read(codes, start, stop), bits)[:, :width])
        kept = None
        if own:
            kept = np.ascontiguousarray(unpack_words(checkpoint.read(zeros).T, bits)[:, start:stop].T)
        return Quantized(values, grid.read(start, stop), kept, bits, grid.size)

    names = [codes, scales, size, *(name for name in (zeros, order) if name in checkpoint)]
    names += list_activations(checkpoint, stem)
    origin = f"compressed-tensors, {bits} bits, {grid.origin}{', zero points' if own else ''}"
    matrix = IntegerMatrix(tuple(names), (rows, width), Integers(bits, grid.size, own), origin, read)
    return matrix if channels is None else bind_ordered(matrix, channels)


def _bind_int8(checkpoint: Checkpoint, stem: str, codes: str) -> PackedMatrix:
    scales = find_companion(checkpoint, f"{stem}.weight_scale", codes)
    shape = checkpoint.entries[codes].shape
    if len(shape) != 2:
        raise CheckpointError(f"{checkpoint.path}: tensor {codes!r} has shape {list(shape)}, a matrix was expected")
    rows, width = shape
    grid = _Grid(checkpoint, stem, scales, rows, width)
    zeros = f"{stem}.weight_zero_point"
    own = zeros in checkpoint
    if own:
        grid.check(zeros, ("int8",))

    def read(start: int, stop: int) -> Quantized:
        values = checkpoint.read(codes, start, stop).view(np.uint8) ^ np.uint8(0x80)
        kept = grid.spread(checkpoint.read(zeros), start, stop).view(np.uint8) ^ np.uint8(0x80) if own else None
        return Quantized(values, grid.read(start, stop), kept, 8, grid.size)

    names = (codes, scales, *([zeros] if own else []), *list_activations(checkpoint, stem))
    origin = f"compressed-tensors, int8, {grid.origin}{', zero points' if own else ''}"
    return IntegerMatrix(names, (rows, width), Integers(8, grid.size, own), origin, read)


class _Grid:
    """The scales of a matrix [out, in]: [1] for the tensor, [out, 1] by channel, or [out, groups]."""

    def __init__(self, checkpoint: Checkpoint, stem: str, name: str, rows: int, width: int) -> None:
        self.checkpoint, self.name, self.rows, self.width = checkpoint, name, rows, width
        shape = checkpoint.entries[name].shape
        self.whole = shape in ((), (1,), (1, 1)) and rows > 1
        self.groups = 1 if self.whole or len(shape) < 2 else shape[1]
        self.check(name, FLOATS)
        self.size = find_groups(checkpoint, name, self.groups, width)
        by_group = f"group {self.size}" if self.groups > 1 else "by channel"
        self.origin = "one scale" if self.whole else by_group

    def check(self, name: str, dtypes: tuple[str, ...]) -> None:
        """Scales or zero points have the shape of the scales."""
        found = self.checkpoint.entries[name].shape
        shape = found if self.whole and found in ((), (1,), (1, 1)) else (self.rows, self.groups)
        if found == (self.rows,) and self.groups == 1:
            shape = found
        what = f"a matrix of {self.width} input and {self.rows} output channels"
        check_packed(self.checkpoint, name, shape, dtypes, what)

    def read(self, start: int, stop: int) -> Array:
        """float32 [stop - start, groups]."""
        return self.spread(read_scales(self.checkpoint, self.name), start, stop)

    def spread(self, values: Array, start: int, stop: int) -> Array:
        spread: Array = np.broadcast_to(values.reshape(-1, self.groups), (self.rows, self.groups))[start:stop].copy()
        return spread
