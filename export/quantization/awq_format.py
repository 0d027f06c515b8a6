"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978) in AutoAWQ's gemm layout, 4 bits.

For a matrix [out, in]: qweight int32 [in, out/8], packed along the output channels; qzeros int32 [groups, out/8];
scales [groups, out]. The nibbles of a word, lowest first, hold output channels 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
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
    check_packed,
    find_companion,
    find_groups,
    read_turned_codes,
    read_turned_scales,
    unpack_words,
)

_PLACE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])  # which nibble holds each of a word's eight channels


def check_settings(settings: dict[str, Any], where: str) -> None:
    version = str(settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise CheckpointError(f"{where}: AWQ version {version!r} is not read; read are: gemm")
    bits = settings.get("bits", settings.get("w_bit", 4))
    if bits != 4:
        raise CheckpointError(f"{where}: AWQ of {bits!r} bits is not read; read are: 4")


def find_packed(checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
    stem = name.removesuffix(".weight")
    codes = f"{stem}.qweight"
    if stem == name or codes not in checkpoint:
        return None
    scales, zeros = (find_companion(checkpoint, f"{stem}.{part}", codes) for part in ("scales", "qzeros"))
    shape, words = checkpoint.entries[scales].shape, checkpoint.entries[codes].shape
    if len(shape) != 2 or len(words) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {codes!r} has shape {list(words)} and {scales!r} {list(shape)}, two matrices "
            "were expected; download the checkpoint again"
        )
    (groups, rows), width = shape, words[0]
    what = f"a matrix of {width} input and {rows} output channels"
    check_packed(checkpoint, codes, (width, rows // 8), ("int32",), what)
    check_packed(checkpoint, scales, (groups, rows), FLOATS, what)
    check_packed(checkpoint, zeros, (groups, rows // 8), ("int32",), what)
    size = find_groups(checkpoint, scales, groups, width)
    own = bool((_unpack(checkpoint.read(zeros)) != 8).any())
    origin = f"AWQ, 4 bits, group {size}{', zero points' if own else ''}"

    def read(start: int, stop: int) -> Quantized:
        packed = read_turned_codes(checkpoint, codes, start, stop, _unpack, 8)
        kept = read_turned_codes(checkpoint, zeros, start, stop, _unpack, 8) if own else None
        return Quantized(packed, read_turned_scales(checkpoint, scales, start, stop), kept, 4, size)

    return IntegerMatrix((codes, scales, zeros), (rows, width), Integers(4, size, own), origin, read)


def _unpack(words: Array) -> Array:
    """int32 [rows, n] -> uint8 [rows, 8n] in the order of the channels."""
    nibbles = unpack_words(words, 4).reshape(*words.shape, 8)
    unpacked: Array = nibbles[..., _PLACE].reshape(words.shape[0], -1)
    return unpacked
