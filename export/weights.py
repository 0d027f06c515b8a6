"""Canonical tensors: which checkpoint tensors each is made from, and reading them piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import CheckpointError, ParityError
from .checkpoint import Array, Checkpoint

Role = Literal["embedding", "norm", "attention", "dense_mlp", "router", "shared_experts", "experts", "head"]
# linear: quantized to the export's precision; table: int8 when that is below; keep: float32 always.
Precision = Literal["linear", "table", "keep"]
Index = tuple[Any, ...]


@dataclass(frozen=True)
class Piece:
    """`target[at] = checkpoint[source].reshape(view)[pick]`; `shape` is what the source must have."""

    source: str
    shape: tuple[int, ...]
    at: Index = (Ellipsis,)
    view: tuple[int, ...] | None = None
    pick: Index = (Ellipsis,)


@dataclass(frozen=True)
class Weight:
    """A canonical tensor.

    `shape`: [out, in], or [stack, out, in] for experts and heads, or [n]. `units`: the pieces of each part that is
    read, quantized and written by itself: one for each entry of a stack of experts, else one for the whole.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    precision: Precision
    units: tuple[tuple[Piece, ...], ...]
    group_with: tuple[int, ...] = field(default=())  # other input sizes that must share this tensor's group size

    @property
    def unit_shape(self) -> tuple[int, ...]:
        return self.shape if len(self.units) == 1 else self.shape[1:]

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


def check_sources(checkpoint: Checkpoint, plan: list[Weight]) -> None:
    """Every tensor that the plan reads is there, with the shape that the config implies.

    Raises:
        CheckpointError: names the first missing or contradicting tensor and how many there are.
    """
    pieces = list({piece.source: piece for weight in plan for piece in weight.pieces()}.values())
    missing = [piece.source for piece in pieces if piece.source not in checkpoint]
    if missing:
        experts = sum(".experts." in name for name in missing)
        what = f", {experts} of them of experts" if experts else ""
        raise CheckpointError(
            f"{checkpoint.path}: {len(missing)} of {len(pieces)} tensors are missing{what}, first {missing[0]!r}; "
            "download the checkpoint again, or correct config.json"
        )
    for piece in pieces:
        shape = checkpoint.entries[piece.source].shape
        if shape != piece.shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {piece.source!r} has shape {list(shape)}, config.json implies "
                f"{list(piece.shape)}; correct config.json or download the checkpoint again"
            )


def check_unused(checkpoint: Checkpoint, plan: list[Weight], ignored: list[tuple[str, str]]) -> list[str]:
    """Tensors of the checkpoint that nothing reads fail the export; those left out on purpose are returned as notes.

    Raises:
        ParityError: names the unused tensors.
    """
    used = {piece.source for weight in plan for piece in weight.pieces()}
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
    target = np.empty(weight.unit_shape, np.float32)
    for piece in pieces:
        target[piece.at] = read_piece(checkpoint, piece)
    return target


def read_piece(checkpoint: Checkpoint, piece: Piece, start: int = 0, stop: int | None = None) -> Array:
    """float32: what a piece contributes; `start` to `stop` limits a piece without a view to those rows.

    Raises:
        CheckpointError: a value is NaN or infinite; names the tensor and the row.
    """
    values = checkpoint.read(piece.source, start, stop)
    if values.dtype.kind in "iub":
        raise CheckpointError(
            f"{checkpoint.path}: tensor {piece.source!r} holds {values.dtype} where floating point was expected; "
            "this checkpoint is quantized in a way that is not supported"
        )
    values = values.astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        row = start + int(np.argwhere(~finite)[0][0]) if values.ndim else 0
        raise CheckpointError(
            f"{checkpoint.path}: tensor {piece.source!r} holds NaN or infinity in row {row}; download it again"
        )
    if piece.view is not None:
        values = values.reshape(piece.view)
    picked: Array = values[piece.pick]
    return picked
