"""MXFP4 checkpoints (OCP microscaling formats 1.0), as gpt_oss stores its experts.

For a stack of experts `NAME` that is [E, in, out] when stored plainly: NAME_blocks uint8 [E, out, in/32, 16] with two
e2m1 numbers to a byte, low nibble first, and NAME_scales uint8 [E, out, in/32], powers of two biased by 127 (e8m0).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from . import Array, PackedMatrix, unpack_int4
from ._packed import FloatMatrix, check_packed, check_scales, find_companion

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_NAN = 255


def check_settings(settings: dict[str, Any], where: str) -> None:
    """There is one variant."""


def find_packed(checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
    blocks = f"{name}_blocks"
    if blocks not in checkpoint:
        return None
    scales = find_companion(checkpoint, f"{name}_scales", blocks)
    shape = checkpoint.entries[blocks].shape
    if len(shape) != 4 or shape[-1] != 16:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {blocks!r} has shape {list(shape)}, [experts, out, in/32, 16] was expected; "
            "download the checkpoint again"
        )
    experts, rows, groups, _ = shape
    for part, wanted in ((blocks, shape), (scales, shape[:3])):
        check_packed(checkpoint, part, wanted, ("uint8",), f"a stack of {experts} matrices of {groups} groups")

    def read(start: int, stop: int) -> Array:
        exponents = checkpoint.read(scales, start, stop)
        if (exponents == _NAN).any():
            expert = start + int(np.argwhere(exponents == _NAN)[0][0])
            raise CheckpointError(f"{checkpoint.path}: tensor {scales!r} holds NaN in row {expert}; download it again")
        check_scales(checkpoint, scales, np.ldexp(np.float32(1), exponents.astype(np.int32) - 127))
        values = _E2M1[unpack_int4(checkpoint.read(blocks, start, stop))]
        values = np.ldexp(values, exponents.astype(np.int32)[..., None] - 127)
        stack: Array = values.reshape(stop - start, rows, groups * 32).swapaxes(1, 2)
        return stack

    return FloatMatrix((blocks, scales), (experts, groups * 32, rows), "MXFP4", read)
