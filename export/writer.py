"""Streaming a checkpoint into weights.bin: one unit of one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np

from ..bundle import Progress
from ..errors import CheckpointError
from .checkpoint import Array, Checkpoint
from .digests import Digest, Key
from .layout import Layout, Slot, Stored
from .memory import rows_at_once
from .quantization import FLOAT8, Algorithm, Calibrated, Quantized, fit_scales, pack_float8, pack_int4, pack_int6
from .weights import list_rows, read_rows, read_unit

CHUNK_BYTES = 512 << 10  # float32 bytes that are converted at once: what stays in the processor's cache


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
    """Rows `start` to `stop` (of the flattened [rows, in] view) of a stored tensor, with their float32 values.

    `kept`: (rows counted from `start`, integers) of a quantized checkpoint, which are written as they are.
    """

    start: int
    stop: int
    values: Array
    kept: tuple[tuple[slice, Quantized], ...] = ()


def write_weights(
    checkpoint: Checkpoint,
    layout: Layout,
    path: Path,
    algorithm: Algorithm,
    progress: Progress | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    digests: dict[Key, Digest] | None = None,
) -> tuple[Layout, dict[str, ClassError]]:
    """Write every tensor of `layout` to `path`; returns where they lie, and the quantization error by role.

    The layout is another one only where some matrix's scales need a wider type than it gives them.

    `chunk_bytes`: float32 bytes that are converted at once. `digests`: filled with what was quantized, for the check.

    Raises:
        CheckpointError: a value is not finite, or does not fit float16.
        OSError: the disk is full; the caller's staging removes what was written.
    """
    errors: dict[str, ClassError] = {}
    total = sum(math.prod(stored.data.shape) for stored in layout.stored.values())
    done = 0
    with path.open("w+b") as stream:
        file = _File(stream, layout)
        stream.truncate(layout.nbytes)
        for slot, value in layout.constants:
            _write_at(stream, slot.offset, np.full(slot.nbytes, value, np.uint8))
        for name, stored in layout.stored.items():
            if stored.order is not None and stored.weight.order is not None:
                _write_at(stream, stored.order.offset, stored.weight.order)
            for part in read_parts(checkpoint, stored, chunk_bytes):
                error = errors.setdefault(stored.weight.role, ClassError())
                _write_part(file, file.layout[name], part, algorithm, error, digests)
                done += part.values.size
                if progress is not None:
                    progress("writing weights", done, total)
    return file.layout, errors


def read_parts(checkpoint: Checkpoint, stored: Stored, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Part]:
    """A tensor in parts of one expert or of `chunk_bytes`."""
    weight = stored.weight
    width = weight.shape[-1]
    if len(weight.shape) == 1:
        yield Part(0, 1, read_unit(checkpoint, weight, 0).reshape(1, width))
        return
    rows = math.prod(weight.unit_shape[:-1])
    step = rows_at_once(weight, chunk_bytes)
    for unit in range(len(weight.units)):
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            values, kept = _read_part(checkpoint, stored, unit, start, stop)
            yield Part(unit * rows + start, unit * rows + stop, values, kept)


def _read_part(
    checkpoint: Checkpoint, stored: Stored, unit: int, start: int, stop: int
) -> tuple[Array, tuple[tuple[slice, Quantized], ...]]:
    """Values of rows of a unit, and the integers among them that are kept."""
    pieces = list_rows(stored.weight, unit, start, stop)
    if not stored.quantized or all(rows.piece.integers is None for rows in pieces):
        return read_rows(checkpoint, stored.weight, unit, start, stop), ()
    values = np.zeros((stop - start, stored.weight.shape[-1]), np.float32)
    kept = []
    for rows in pieces:
        if rows.piece.integers is None:
            values[rows.target] = rows.read_values(checkpoint)
        else:
            codes = rows.read_codes(checkpoint)
            values[rows.target] = codes.dequantize()
            own = not stored.shared_zero_points
            kept.append((rows.target, codes.regroup(stored.bits, stored.group_size, zero_points=own)))
    return values, tuple(kept)


class _File:
    """weights.bin while it is written, and where its tensors lie."""

    def __init__(self, stream: BinaryIO, layout: Layout) -> None:
        self.stream, self.layout = stream, layout

    def make_room(self, stored: Stored, start: int, scales: Array) -> Stored:
        """The tensor with room for the scales of rows `start` on: where their type does not hold them, those of all
        rows move to the next wider one that does, what is written of them included."""
        narrow = stored.scales
        assert narrow is not None
        while stored.scales is not None and stored.scales.dtype != "float32":
            if fit_scales(scales, stored.scales.dtype):
                break
            self.layout = self.layout.widen_scales(stored.weight.name)
            stored = self.layout[stored.weight.name]
        wide = stored.scales
        assert wide is not None
        if wide is narrow:
            return stored
        self.stream.truncate(self.layout.nbytes)
        count, step = start * narrow.shape[-1], CHUNK_BYTES // 4
        size = np.dtype(wide.dtype).itemsize
        for first in range(0, count, step):
            held = _read_scales(self.stream, narrow, first, min(step, count - first))
            _write_at(self.stream, wide.offset + size * first, held.astype(wide.dtype))
        return stored


def _read_scales(stream: BinaryIO, slot: Slot, first: int, count: int) -> Array:
    """float32 [count] of a slot in float8 or float16."""
    kind = np.dtype(np.uint8 if slot.dtype == "float8" else np.float16)
    stream.seek(slot.offset + kind.itemsize * first)
    held = np.frombuffer(stream.read(kind.itemsize * count), kind)
    return FLOAT8[held] if slot.dtype == "float8" else held.astype(np.float32)


def _write_part(
    file: _File,
    stored: Stored,
    part: Part,
    algorithm: Algorithm,
    error: ClassError,
    digests: dict[Key, Digest] | None = None,
) -> None:
    if not stored.quantized:
        values = part.values
        if stored.data.dtype == "float16":
            with np.errstate(over="ignore"):
                values = values.astype(np.float16)
            if not np.isfinite(values).all():
                raise CheckpointError(
                    f"tensor {stored.weight.name!r} holds values beyond float16's 65504; export with --weights fp32"
                )
        if stored.data.dtype == "bfloat16":
            values = values.astype(ml_dtypes.bfloat16)  # which they were before
        width = stored.weight.shape[-1]
        _write_at(file.stream, stored.data.offset + part.start * width * values.itemsize, values)
        return
    quantized = _quantize(stored, part, algorithm)
    difference = quantized.dequantize()
    if digests is not None:
        _note_digests(digests, stored, part, difference)
    difference -= part.values
    error.noise += float(np.square(difference, out=difference).sum(dtype=np.float64))
    error.signal += float(np.square(part.values).sum(dtype=np.float64))
    stored = file.make_room(stored, part.start, quantized.scales)
    _write_quantized(file.stream, stored, part.start, quantized)


def _note_digests(digests: dict[Key, Digest], stored: Stored, part: Part, values: Array) -> None:
    """Of the pieces that were quantized here; integers that came are compared with the checkpoint to the bit."""
    weight = stored.weight
    rows = math.prod(weight.unit_shape[:-1])
    unit, start = divmod(part.start, rows)
    for piece in list_rows(weight, unit, start, start + part.stop - part.start):
        if piece.piece.integers is None:
            key = weight.name, unit, weight.units[unit].index(piece.piece)
            digests.setdefault(key, Digest()).add(part.values[piece.target], values[piece.target])


def _quantize(stored: Stored, part: Part, algorithm: Algorithm) -> Quantized:
    """The integers that came, and the algorithm's for the rows that came without."""
    own, shape = not stored.shared_zero_points, part.values.shape
    if sum(len(kept.codes) for _, kept in part.kept) < len(part.values):
        if isinstance(algorithm, Calibrated):
            unit_rows = math.prod(stored.weight.unit_shape[:-1])
            algorithm = algorithm.at(stored.weight.name, part.start // unit_rows)
        group = shape[1] if stored.by_channel else stored.group_size
        quantized = algorithm.quantize(part.values, stored.bits, group, zero_points=own)
        quantized = quantized.regroup(stored.bits, stored.group_size, zero_points=own)
    else:
        groups = (shape[0], shape[1] // stored.group_size)
        zeros = np.empty(groups, np.uint8) if own else None
        quantized = Quantized(
            np.empty(shape, np.uint8), np.empty(groups, np.float32), zeros, stored.bits, stored.group_size
        )
    for rows, kept in part.kept:
        quantized.codes[rows], quantized.scales[rows] = kept.codes, kept.scales
        if quantized.zero_points is not None:
            quantized.zero_points[rows] = kept.zero_points
    return quantized


def _write_quantized(stream: BinaryIO, stored: Stored, start: int, quantized: Quantized) -> None:
    """Codes, scales and (where the tensor owns them) zero points of rows `start` on."""
    assert stored.scales is not None and stored.zero_points is not None
    width, groups = stored.weight.shape[-1], stored.scales.shape[-1]
    _write_codes(stream, stored.data, start * width, quantized.codes)
    narrow = stored.scales.dtype
    scales = pack_float8(quantized.scales) if narrow == "float8" else quantized.scales.astype(narrow, copy=False)
    _write_at(stream, stored.scales.offset + start * groups * scales.itemsize, scales)
    if not stored.shared_zero_points:
        assert quantized.zero_points is not None
        _write_codes(stream, stored.zero_points, start * groups, quantized.zero_points)


def _write_codes(stream: BinaryIO, slot: Slot, first: int, codes: Array) -> None:
    if slot.dtype == "uint4":
        _write_at(stream, slot.offset + first // 2, pack_int4(codes.reshape(-1)))
    elif slot.dtype == "uint6":
        upper, lower = pack_int6(codes)
        _write_at(stream, slot.offset + first // 2, upper)
        _write_at(stream, slot.offset + math.prod(slot.shape) // 2 + first // 4, lower)
    else:
        _write_at(stream, slot.offset + first, codes)


def _write_at(stream: BinaryIO, offset: int, values: Array) -> None:
    stream.seek(offset)
    stream.write(np.ascontiguousarray(values).view(np.uint8).data)
