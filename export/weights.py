"""Canonical tensors: which checkpoint tensors each is made from, and reading them piece by piece.

Families name plain tensors. Where a quantized checkpoint holds one in another form, `quantization.sources` sets the
piece's `packed`, and all that reads or checks pieces goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError, ParityError
from .checkpoint import Array, Checkpoint
from .quantization import Integers, PackedMatrix, Quantized, check_finite

# The last two are of graphs whose parts have no names: a user's own torch model.
Role = Literal[
    "embedding", "norm", "attention", "dense_mlp", "router", "shared_experts", "experts", "head", "linear", "other"
]
# linear: quantized to the export's precision (the head to its own); wide: int8 when that is below, but integers that a
# quantized checkpoint brings as they came; table: int8 at least, those too (an embedding's rows are looked up, and
# onnxruntime looks up no nibbles); keep: exact always.
Precision = Literal["linear", "wide", "table", "keep"]
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """`target[at] = checkpoint[source][entry].T.reshape(view)[pick]`; `shape` is what the source must have.

    `entry`: one matrix of a stack, read alone. `transpose`: the last two axes are exchanged. `at`: all of the target,
    or a slice of its first axis. `packed`: how a quantized checkpoint holds the source instead. `rows` and `columns`
    (int64, -1 for zeros): which of what was picked comes in which order; integers lie from column `first_column` on.
    """

    source: str
    shape: tuple[int, ...]
    at: Index = (Ellipsis,)
    view: tuple[int, ...] | None = None
    pick: Index = (Ellipsis,)
    entry: int | None = None
    transpose: bool = False
    packed: PackedMatrix | None = None
    rows: Array | None = field(default=None, compare=False, repr=False)
    columns: Array | None = field(default=None, compare=False, repr=False)
    first_column: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that are read for it."""
        return (self.source,) if self.packed is None else self.packed.names

    @property
    def ranged(self) -> bool:
        """A range of the first axis (of `view`, where there is one) can be read alone."""
        whole = self.entry is not None or self.transpose or self.rows is not None
        return not whole and self.pick[0] in (Ellipsis, slice(None))

    @property
    def contributed(self) -> tuple[int, ...]:
        """The shape of what it contributes."""
        shape = self.shape if self.entry is None else self.shape[1:]
        if self.transpose:
            shape = (*shape[:-2], shape[-1], shape[-2])
        shape = np.broadcast_to(np.uint8(0), shape if self.view is None else self.view)[self.pick].shape
        rows = shape[:1] if self.rows is None else self.rows.shape
        return (*rows, *shape[1:-1], shape[-1] if self.columns is None else len(self.columns))

    @property
    def integers(self) -> Integers | None:
        """The integers that can be kept bit for bit; None for plain tensors, and where rows are cut or turned."""
        if self.packed is None or self.transpose or self.entry is not None:
            return None
        if self.view is not None and self.packed.columns is not None:
            return None  # heads of a latent, whose channels have one order for all that read it
        width = self.shape[-1]
        rows_only = self.view is None or self.view[-1] == width
        picked = len(self.pick) < len(self.view or self.shape) and Ellipsis not in self.pick
        return self.packed.integers if rows_only and (picked or self.pick == (Ellipsis,)) else None


@dataclass(frozen=True)
class Weight:
    """A canonical tensor.

    `shape`: [out, in], or [stack, out, in] for experts and heads, or [n]. `units`: the pieces of each part that is
    read, quantized and written by itself: one for each entry of a stack of experts, else one for the whole.
    `order`: the input channel that each column multiplies, int64 [in], or [units, in] where units differ; None for the
    channels in their order.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    precision: Precision
    units: tuple[tuple[Piece, ...], ...]
    group_with: tuple[int, ...] = field(default=())  # other input sizes that must share this tensor's group size
    kept_as: Literal["float32", "bfloat16"] = "float32"  # where its precision is `keep`
    order: Array | None = field(default=None, compare=False, repr=False)

    @property
    def unit_shape(self) -> tuple[int, ...]:
        return self.shape if len(self.units) == 1 else self.shape[1:]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def pieces(self) -> Iterator[Piece]:
        for unit in self.units:
            yield from unit


def plain(name: str, source: str, shape: tuple[int, ...], role: Role, precision: Precision) -> Weight:
    """A canonical tensor that is one checkpoint tensor as it is."""
    return Weight(name, shape, role, precision, ((Piece(source, shape),),))


def stacked_rows(name: str, sources: tuple[str, str], shape: tuple[int, int], role: Role) -> Weight:
    """[gate; up]: two matrices [shape] one above the other."""
    rows, columns = shape
    first = Piece(sources[0], shape, at=(slice(0, rows),))
    second = Piece(sources[1], shape, at=(slice(rows, 2 * rows),))
    return Weight(name, (2 * rows, columns), role, "linear", ((first, second),))


def expert_gate_up(name: str, sources: list[tuple[str, str]], shape: tuple[int, int]) -> Weight:
    """[E, 2I, H] from each expert's gate and up [I, H]; rows interleaved g0, u0, g1, u1 ... as `QMoE` wants them."""
    rows, columns = shape
    units = tuple(
        (Piece(gate, shape, at=(slice(0, None, 2),)), Piece(up, shape, at=(slice(1, None, 2),))) for gate, up in sources
    )
    return Weight(name, (len(sources), 2 * rows, columns), "experts", "linear", units, group_with=(rows,))


def expert_stack(name: str, sources: list[str], shape: tuple[int, int]) -> Weight:
    """[E, H, I] from each expert's down projection [H, I]."""
    units = tuple((Piece(source, shape),) for source in sources)
    return Weight(name, (len(sources), *shape), "experts", "linear", units, group_with=(shape[0],))


def keep_routers(checkpoint: Checkpoint, plan: list[Weight]) -> list[Weight]:
    """The plan with routers' matrices kept in bfloat16 where the checkpoint has them so: every token reads them."""

    def is_kept(weight: Weight) -> bool:
        pieces = list(weight.pieces()) if is_router(weight) else []
        return bool(pieces) and all(
            piece.packed is None and checkpoint.entries[piece.source].dtype.name == "bfloat16" for piece in pieces
        )

    return [replace(weight, kept_as="bfloat16") if is_kept(weight) else weight for weight in plan]


def is_router(weight: Weight) -> bool:
    """Whether it is the matrix of one."""
    return weight.role == "router" and weight.precision == "keep" and len(weight.shape) == 2


def check_sources(checkpoint: Checkpoint, plan: list[Weight]) -> None:
    """Every tensor that the plan reads is there, with the shape that the config implies.

    Raises:
        CheckpointError: names the first missing or contradicting tensor and how many there are.
    """
    pieces = list({piece.source: piece for weight in plan for piece in weight.pieces()}.values())
    missing = [name for piece in pieces for name in piece.names if name not in checkpoint]
    if missing:
        experts = sum(".experts." in name for name in missing)
        what = f", {experts} of them of experts" if experts else ""
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} of {len(pieces)} tensors are missing{what}, first {missing[0]!r}; "
            "download the checkpoint again, or correct config.json"
        )
    for piece in pieces:
        shape = checkpoint.entries[piece.source].shape if piece.packed is None else piece.packed.shape
        if shape != piece.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {piece.names[0]!r} has shape {list(shape)}, config.json implies "
                f"{list(piece.shape)}; correct config.json or download the checkpoint again"
            )


def check_unused(checkpoint: Checkpoint, plan: list[Weight], ignored: list[tuple[str, str]]) -> list[str]:
    """Tensors of the checkpoint that nothing reads fail the export; those left out on purpose are returned as notes.

    Raises:
        ParityError: names the unused tensors.
    """
    used = {name for weight in plan for piece in weight.pieces() for name in piece.names}
    notes: dict[str, int] = {}
    unused = []
    for name, entry in checkpoint.entries.items():
        if name in used or not math.prod(entry.shape):
            continue
        reason = next((why for prefix, why in ignored if name.startswith(prefix)), None)
        if reason is None:
            unused.append(name)
        else:
            notes[reason] = notes.get(reason, 0) + 1
    if unused:
        raise ParityError(
            f"{checkpoint.path}: {len(unused)} tensors of the checkpoint are not used by the graph, first "
            f"{sorted(unused)[0]!r}; config.json does not describe this checkpoint, or its family has a variant "
            "that is not supported"
        )
    return [f"{count} tensors left out: {reason}" for reason, count in notes.items()]


def read_unit(checkpoint: Checkpoint, weight: Weight, unit: int) -> Array:
    """float32 [unit_shape]: one unit of a canonical tensor, assembled from the checkpoint.

    Raises:
        CheckpointError: a value is NaN or infinite; names the tensor and the row.
    """
    pieces = weight.units[unit]
    if len(pieces) == 1 and pieces[0].at == (Ellipsis,):
        return read_piece(checkpoint, pieces[0]).reshape(weight.unit_shape)
    target = np.zeros(weight.unit_shape, np.float32)
    for piece in pieces:
        target[piece.at] = read_piece(checkpoint, piece)
    return target


@dataclass(frozen=True)
class PieceRows:
    """The part of a piece that lands in rows `start` to `stop` of its unit, seen as [rows, in].

    `target`: where, counted from `start`. `first` to `last`: which of the piece's own rows.
    """

    piece: Piece
    target: slice
    first: int
    last: int

    def read_values(self, checkpoint: Checkpoint) -> Array:
        """float32 [last - first, in]."""
        piece = self.piece
        width = piece.contributed[-1]
        if not piece.ranged:
            values = self._hold(checkpoint, lambda: np.ascontiguousarray(read_piece(checkpoint, piece)))
            part: Array = values.reshape(-1, width)[self.first : self.last]
            return part
        each = math.prod(piece.contributed[1:-1])  # rows that one entry of the first axis gives
        start, stop = self.first // each, -(-self.last // each)
        values = read_piece(checkpoint, piece, start, stop).reshape(-1, width)
        rows = values[self.first - start * each : self.last - start * each]
        return rows

    def _hold(self, checkpoint: Checkpoint, read: Callable[[], Any]) -> Any:
        """All of a piece whose parts cannot be read alone, kept for its next rows; a unit has two at most."""
        held = next((found for piece, found in checkpoint.whole if piece is self.piece), None)
        if held is None:
            if len(checkpoint.whole) > 1:
                checkpoint.whole.clear()
            held = read()
            checkpoint.whole.append((self.piece, held))
        return held

    def read_codes(self, checkpoint: Checkpoint) -> Quantized:
        """The integers of a piece that has them."""
        piece, packed = self.piece, self.piece.packed
        assert packed is not None
        if piece.ranged and piece.view is None and len(piece.shape) == 2:
            return _spread(packed.read_codes(checkpoint, self.first, self.last), piece)
        if piece.rows is None:
            chosen, whole = np.arange(self.first, self.last), packed.read_codes(checkpoint, 0, piece.shape[0])
        else:
            chosen, whole = piece.rows[self.first : self.last], self._hold_codes(checkpoint)

        def pick(values: Array) -> Array:
            view = piece.shape if piece.view is None else piece.view
            picked = values.reshape(*view[:-1], values.shape[-1])[piece.pick]
            rows: Array = picked.reshape(-1, values.shape[-1])[chosen]  # a copy
            return rows

        zeros = None if whole.zero_points is None else pick(whole.zero_points)
        found = Quantized(pick(whole.codes), pick(whole.scales), zeros, whole.bits, whole.group_size)
        _clear(found, chosen < 0)
        return _spread(found, piece)

    def _hold_codes(self, checkpoint: Checkpoint) -> Quantized:
        piece, packed = self.piece, self.piece.packed
        assert packed is not None
        found: Quantized = self._hold(checkpoint, lambda: packed.read_codes(checkpoint, 0, piece.shape[0]))
        return found


def _clear(quantized: Quantized, rows: Array) -> None:
    """Make rows of zeros."""
    middle = 1 << (quantized.bits - 1)
    quantized.codes[rows], quantized.scales[rows] = middle, 1
    if quantized.zero_points is not None:
        quantized.zero_points[rows] = middle


def _spread(quantized: Quantized, piece: Piece) -> Quantized:
    """Codes as they are, in columns of zeros where the piece has more than they fill."""
    if piece.columns is None or len(piece.columns) == quantized.codes.shape[1]:
        return quantized
    rows, group, middle = len(quantized.codes), quantized.group_size, 1 << (quantized.bits - 1)
    first, last = piece.first_column, piece.first_column + quantized.codes.shape[1]
    groups = slice(first // group, last // group)
    codes = np.full((rows, len(piece.columns)), middle, np.uint8)
    codes[:, first:last] = quantized.codes
    scales = np.ones((rows, len(piece.columns) // group), np.float32)
    scales[:, groups] = quantized.scales
    zeros = None
    if quantized.zero_points is not None:
        zeros = np.full(scales.shape, middle, np.uint8)
        zeros[:, groups] = quantized.zero_points
    return Quantized(codes, scales, zeros, quantized.bits, group)


def list_rows(weight: Weight, unit: int, start: int, stop: int) -> list[PieceRows]:
    """What makes up rows `start` to `stop` of a unit seen as [rows, in]."""
    parts = []
    rows = math.prod(weight.unit_shape[:-1])
    for piece in weight.units[unit]:
        begin, end, step = (0, rows, 1) if piece.at == (Ellipsis,) else piece.at[0].indices(rows)
        first = max(0, -(-(start - begin) // step))
        last = max(first, -(-(min(stop, end) - begin) // step))
        if last > first:
            target = slice(begin + first * step - start, begin + (last - 1) * step - start + 1, step)
            parts.append(PieceRows(piece, target, first, last))
    return parts


def read_rows(checkpoint: Checkpoint, weight: Weight, unit: int, start: int, stop: int) -> Array:
    """float32 [stop - start, in]: rows of a unit seen as [rows, in]; only what makes them up is read."""
    parts = list_rows(weight, unit, start, stop)
    if len(parts) == 1 and parts[0].piece.at == (Ellipsis,):
        return parts[0].read_values(checkpoint)
    target = np.zeros((stop - start, weight.shape[-1]), np.float32)
    for part in parts:
        target[part.target] = part.read_values(checkpoint)
    return target


def read_piece(checkpoint: Checkpoint, piece: Piece, start: int = 0, stop: int | None = None) -> Array:
    """float32: what a piece contributes; `start` to `stop` limits a `ranged` piece to a part of its first axis.

    Raises:
        CheckpointError: a value is NaN or infinite; names the tensor and the row.
    """
    if piece.entry is not None:
        start, stop = piece.entry, piece.entry + 1
    if piece.packed is None:
        view = None if piece.transpose or piece.entry is not None else piece.view
        values = _read_plain(checkpoint, piece.source, start, stop, view)
    elif piece.view is None or piece.entry is not None:
        values = piece.packed.read_values(checkpoint, start, piece.shape[0] if stop is None else stop)
    else:
        whole = piece.packed.read_values(checkpoint, 0, piece.shape[0])
        values = whole if piece.transpose else whole.reshape(piece.view)[start:stop]
    if piece.entry is not None:
        values = values[0]
    if piece.transpose:
        values = np.swapaxes(values, -1, -2)
    if piece.view is not None and (piece.transpose or piece.entry is not None):
        values = values.reshape(piece.view)
    picked: Array = values[piece.pick]
    if piece.rows is not None:
        picked = take_or_zero(picked, piece.rows, 0)
    return picked if piece.columns is None else take_or_zero(picked, piece.columns, -1)


def take_or_zero(values: Array, places: Array, axis: int) -> Array:
    """values at int64 [n] `places` of an axis, 0 at -1."""
    taken: Array = np.take(values, places, axis=axis)
    if (places < 0).any():
        np.moveaxis(taken, axis, -1)[..., places < 0] = 0
    return taken


def _read_plain(checkpoint: Checkpoint, name: str, start: int, stop: int | None, view: tuple[int, ...] | None) -> Array:
    values = checkpoint.read(name, start, stop, view)
    if values.dtype.kind in "iub" or values.dtype.itemsize == 1:
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} holds {values.dtype} where floating point was expected; "
            "this checkpoint is quantized in a way that is not supported"
        )
    values = values.astype(np.float32)
    check_finite(checkpoint, name, values, start)
    return values
