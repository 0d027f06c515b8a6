"""FP8 checkpoints: DeepSeek-V3's (arXiv:2412.19437, section 3.3) with a scale for each block, usually 128x128.

For a matrix [out, in]: weight float8_e4m3fn, and weight_scale_inv float32 [out/128, in/128], by which it is multiplied
whatever its name says. Scales by channel or for the whole tensor (weight_scale) are read as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from . import Array, PackedMatrix, check_finite
from ._packed import FLOATS, FloatMatrix, find_companion, list_activations, read_scales

FLOAT8 = ("float8_e4m3fn", "float8_e5m2")
_SCALES = (*FLOATS, "float8_e8m0fnu")
_SUFFIXES = ("_scale_inv", "_scale")


def check_settings(settings: dict[str, Any], where: str) -> None:
    block = settings.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if block is not None and not (len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        raise CheckpointError(f"{where}: weight_block_size is {block!r}, two positive integers were expected")


def find_packed(checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
    if name not in checkpoint or checkpoint.entries[name].dtype.name not in FLOAT8:
        return None
    scales = next((f"{name}{suffix}" for suffix in _SUFFIXES if f"{name}{suffix}" in checkpoint), None)
    scales = scales or find_companion(checkpoint, f"{name}{_SUFFIXES[0]}", name)
    block = settings.get("weight_block_size")
    stem = name.removesuffix(".weight")
    return bind_float8(
        checkpoint,
        name,
        scales,
        None if block is None else (block[0], block[1]),
        list_activations(checkpoint, stem),
    )


def bind_float8(
    checkpoint: Checkpoint, name: str, scales: str, block: tuple[int, int] | None, also: tuple[str, ...]
) -> PackedMatrix:
    """A float8 matrix with its scales; `also`: tensors beside it that are accounted for.

    Raises:
        CheckpointError: the scales fit neither the tensor, nor its channels, nor its blocks.
    """
    shape, entry = checkpoint.entries[name].shape, checkpoint.entries[scales]
    if len(shape) != 2 or entry.dtype.name not in _SCALES:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} has shape {list(shape)} and {scales!r} is {entry.dtype.name}; a "
            f"matrix with scales of {', '.join(_SCALES)} was expected"
        )
    rows, width = shape
    blocks = {(): (rows, width), (1,): (rows, width), (1, 1): (rows, width), (rows,): (1, width), (rows, 1): (1, width)}
    kind = "one scale" if entry.shape in ((), (1,), (1, 1)) else "by channel"
    tall, wide = blocks.get(entry.shape, (0, 0))
    if not tall and block is not None and entry.shape == (-(-rows // block[0]), -(-width // block[1])):
        (tall, wide), kind = block, f"blocks of {block[0]}x{block[1]}"
    if not tall:
        known = "" if block is None else f", blocks of {block[0]}x{block[1]} imply {_count(shape, block)}"
        raise CheckpointError(
            f"{checkpoint.path}: tensor {scales!r} has shape {list(entry.shape)} for a matrix {list(shape)}{known}; "
            "correct config.json or download the checkpoint again"
        )

    def read(start: int, stop: int) -> Array:
        values = checkpoint.read(name, start, stop).astype(np.float32)
        check_finite(checkpoint, name, values, start)
        grid = read_scales(checkpoint, scales).reshape(-(-rows // tall), -(-width // wide))
        by_row = grid[np.arange(start, stop) // tall]
        for column in range(by_row.shape[1]):
            values[:, column * wide : (column + 1) * wide] *= by_row[:, column : column + 1]
        return values

    return FloatMatrix((name, scales, *also), shape, f"float8 ({kind})", read)


def _count(shape: tuple[int, ...], block: tuple[int, int]) -> list[int]:
    return [-(-size // step) for size, step in zip(shape, block, strict=True)]
