"""GPTQ checkpoints (Frantar et al. 2022, arXiv:2210.17323) as AutoGPTQ and GPTQModel write them.

For a matrix [out, in] of b bits: qweight int32 [in*b/32, out], packed down the input channels, lowest bits first;
qzeros int32 [groups, out*b/32]; scales [groups, out]; g_idx int32 [in], each channel's group. Format v1 stores zero
points less one; v2 as they are.
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
    read_columns,
    read_order,
    read_turned_codes,
    read_turned_scales,
    unpack_words,
)

_VERSIONS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format: what is to be added to stored zero points


def check_settings(settings: dict[str, Any], where: str) -> None:
    version = settings.get("checkpoint_format") or "gptq"
    if not isinstance(version, str) or version not in _VERSIONS:
        raise CheckpointError(f"{where}: checkpoint_format {version!r} is not read; read are: {', '.join(_VERSIONS)}")
    bits = settings.get("bits")
    if type(bits) is not int or bits not in (4, 8):
        raise CheckpointError(f"{where}: GPTQ of {bits!r} bits is not read; read are: 4, 8")


def find_packed(checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
    stem = name.removesuffix(".weight")
    codes = f"{stem}.qweight"
    if stem == name or codes not in checkpoint:
        return None
    scales, zeros = (find_companion(checkpoint, f"{stem}.{part}", codes) for part in ("scales", "qzeros"))
    shape = checkpoint.entries[scales].shape
    order_name = f"{stem}.g_idx"
    words = checkpoint.entries[codes].shape
    if len(shape) != 2 or len(words) != 2:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {codes!r} has shape {list(words)} and {scales!r} {list(shape)}, two matrices "
            "were expected; download the checkpoint again"
        )
    groups, rows = shape
    width, bits = _find_width(checkpoint, settings, codes, order_name, words[0])
    what = f"a matrix of {width} input and {rows} output channels in {bits} bits"
    check_packed(checkpoint, codes, (width * bits // 32, rows), ("int32",), what)
    check_packed(checkpoint, scales, (groups, rows), FLOATS, what)
    check_packed(checkpoint, zeros, (groups, rows * bits // 32), ("int32",), what)
    size = find_groups(checkpoint, scales, groups, width)
    order = read_order(checkpoint, order_name, groups, width) if order_name in checkpoint else None
    add = _VERSIONS[settings.get("checkpoint_format") or "gptq"]
    # Whatever the config's `sym` says.
    own = bool((_unpack_zeros(checkpoint.read(zeros), bits, add) != 1 << (bits - 1)).any())
    origin = f"GPTQ, {bits} bits, group {size}{', zero points' if own else ''}"

    def read(start: int, stop: int) -> Quantized:
        packed = unpack_words(read_columns(checkpoint, codes, start, stop).T, bits)
        kept = None
        if own:
            kept = read_turned_codes(
                checkpoint, zeros, start, stop, lambda words: _unpack_zeros(words, bits, add), 32 // bits
            )
        return Quantized(packed, read_turned_scales(checkpoint, scales, start, stop), kept, bits, size)

    names = (codes, scales, zeros, *_list_also(checkpoint, stem))
    matrix = IntegerMatrix(names, (rows, width), Integers(bits, size, own), origin, read)
    return matrix if order is None else bind_ordered(matrix, order)


def _find_width(
    checkpoint: Checkpoint, settings: dict[str, Any], codes: str, order: str, words: int
) -> tuple[int, int]:
    """(input channels, bits): g_idx knows the width, and so the bits where modules differ; else the config's bits."""
    if order in checkpoint and len(checkpoint.entries[order].shape) == 1:
        width = checkpoint.entries[order].shape[0]
        return width, find_bits(checkpoint, codes, words, width)
    bits = int(settings["bits"])
    return words * 32 // bits, bits


def _unpack_zeros(words: Array, bits: int, add: int) -> Array:
    """int32 [groups, n] -> uint8 [groups, n * 32 / bits]; v1 wraps around, as the kernels that read it do."""
    zeros: Array = (unpack_words(words, bits) + np.uint8(add)) & np.uint8((1 << bits) - 1)
    return zeros


def _list_also(checkpoint: Checkpoint, stem: str) -> list[str]:
    """g_idx, and the bias of zeros that AutoGPTQ gives to every matrix."""
    also = [f"{stem}.g_idx"] if f"{stem}.g_idx" in checkpoint else []
    bias = f"{stem}.bias"
    if bias in checkpoint and not checkpoint.read(bias).any():
        also.append(bias)
    return also
