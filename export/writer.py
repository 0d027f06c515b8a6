"""Streaming a checkpoint into weights.bin: one unit of one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..bundle import Progress
from ..errors import CheckpointError
from .checkpoint import Array, Checkpoint
from .layout import Layout, Slot, Stored
from .quantization import Algorithm, Quantized, pack_int4
from .weights import Piece, read_piece, read_unit

CHUNK_BYTES = 64 << 20  # float32 bytes of a large matrix that are converted at once


@dataclass
class ClassError:
    """Squared sums over a class of tensors: what quantization took away, and what there was."""

    noise: float = 0.0
    signal: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square error over root mean square value."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0


@dataclass(frozen=True)
class Part:
    """Rows `start` to `stop` (of the flattened [rows, in] view) of a stored tensor, with their float32 values."""

    start: int
    stop: int
    values: Array


def write_weights(
    checkpoint: Checkpoint, layout: Layout, path: Path, algorithm: Algorithm, progress: Progress | None = None
) -> dict[str, ClassError]:
    """Write every tensor of `layout` to `path`; returns the quantization error by role.

    Raises:
        CheckpointError: a value is not finite, or does not fit float16.
        OSError: the disk is full; the caller's staging removes what was written.
    """
    errors: dict[str, ClassError] = {}
    total = sum(math.prod(stored.data.shape) for stored in layout.stored.values())
    done = 0
    with path.open("wb") as stream:
        stream.truncate(layout.nbytes)
        for slot, value in layout.constants:
            _write_at(stream, slot.offset, np.full(slot.nbytes, value, np.uint8))
        for stored in layout.stored.values():
            for part in read_parts(checkpoint, stored):
                error = errors.setdefault(stored.weight.role, ClassError())
                _write_part(stream, stored, part, algorithm, error)
                done += part.values.size
                if progress is not None:
                    progress("writing weights", done, total)
    return errors


def read_parts(checkpoint: Checkpoint, stored: Stored) -> Iterator[Part]:
    """The float32 values of a tensor, in parts of one expert or of `CHUNK_BYTES`."""
    weight = stored.weight
    width = weight.shape[-1]
    for unit, pieces in enumerate(weight.units):
        rows = math.prod(weight.unit_shape) // width if width else 0
        step = max(2, CHUNK_BYTES // (4 * max(width, 1)) // 2 * 2)  # even: int4 zero points share bytes between rows
        piece = pieces[0]
        if len(pieces) > 1 or piece.at != (Ellipsis,) or piece.view is not None or len(weight.unit_shape) < 2:
            values = read_unit(checkpoint, weight, unit).reshape(rows, width)
            yield Part(unit * rows, (unit + 1) * rows, values)
            continue
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Part(unit * rows + start, unit * rows + stop, _read_rows(checkpoint, piece, start, stop))


def _read_rows(checkpoint: Checkpoint, piece: Piece, start: int, stop: int) -> Array:
    if start == 0 and stop == piece.shape[0]:
        return read_piece(checkpoint, piece)
    return read_piece(checkpoint, piece, start, stop)


def _write_part(stream: BinaryIO, stored: Stored, part: Part, algorithm: Algorithm, error: ClassError) -> None:
    if not stored.quantized:
        values = part.values
        if stored.data.dtype == "float16":
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"tensor {stored.weight.name!r} holds values beyond float16's 65504; export with --weights fp32"
                )
        width = stored.weight.shape[-1]
        _write_at(stream, stored.data.offset + part.start * width * values.itemsize, values)
        return
    quantized = algorithm.quantize(part.values, stored.bits, stored.group_size)
    difference = quantized.dequantize()
    difference -= part.values
    error.noise += float(np.square(difference, out=difference).sum(dtype=np.float64))
    error.signal += float(np.square(part.values).sum(dtype=np.float64))
    _write_quantized(stream, stored, part.start, quantized)


def _write_quantized(stream: BinaryIO, stored: Stored, start: int, quantized: Quantized) -> None:
    """Codes, scales and (where the tensor owns them) zero points of rows `start` on."""
    assert stored.scales is not None and stored.zero_points is not None
    width, groups = stored.weight.shape[-1], stored.scales.shape[-1]
    _write_codes(stream, stored.data, start * width, quantized.codes)
    _write_at(stream, stored.scales.offset + start * groups * 4, quantized.scales)
    if not stored.shared_zero_points:
        assert quantized.zero_points is not None
        _write_codes(stream, stored.zero_points, start * groups, quantized.zero_points)


def _write_codes(stream: BinaryIO, slot: Slot, first: int, codes: Array) -> None:
    if slot.dtype == "uint4":
        _write_at(stream, slot.offset + first // 2, pack_int4(codes.reshape(-1)))
    else:
        _write_at(stream, slot.offset + first, codes)


def _write_at(stream: BinaryIO, offset: int, values: Array) -> None:
    stream.seek(offset)
    stream.write(np.ascontiguousarray(values).data)
