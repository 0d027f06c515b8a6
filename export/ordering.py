"""Matrices whose checkpoint groups input channels that do not lie side by side (GPTQ's desc_act, actorder).

Kernels want a group's channels side by side, and the integers are to stay as they are. So the columns are put in the
order of the groups, and the inputs are gathered in the same order (`Weight.order`) before they are multiplied. Inside
an expert nothing can be gathered: there the rows of gate and up are put in the order that down wants its inputs in,
and each expert's own order of gate and up becomes a row of the stack's `order`.

Gate and up of one expert, or the rows of one stored matrix, share their inputs. Where their orders differ, the inputs
are gathered twice, side by side, and each has zeros where the other's lie: twice the width, but the same integers.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from .checkpoint import Array
from .weights import Piece, Weight

_GATE_UP, _DOWN = ".experts.gate_up.weight", ".experts.down.weight"


def order_columns(plan: list[Weight]) -> list[Weight]:
    """The plan with `order`, `rows` and `columns` set where a piece's integers ask for them; else as it is."""
    ordered = {weight.name: _order_weight(weight) for weight in plan}
    for name, weight in ordered.items():
        down = ordered.get(name.removesuffix(_GATE_UP) + _DOWN)
        if name.endswith(_GATE_UP) and down is not None and down.order is not None:
            ordered[name] = _order_rows(weight, down.order)
            # What is multiplied comes in that order by itself.
            ordered[down.name] = dataclasses.replace(down, order=None)
    return [_link_widths(weight, ordered) for weight in ordered.values()]


def _order_weight(weight: Weight) -> Weight:
    """Columns in the order of the groups, the same number in each unit."""
    pieces = [piece for unit in weight.units for piece in unit if _columns_of(piece) is not None]
    if weight.precision == "keep" or not pieces:
        return weight
    step = math.lcm(*(piece.integers.group_size for piece in weight.pieces() if piece.integers is not None))
    placed = [_place_columns(unit, weight.shape[-1], step) for unit in weight.units]
    width = max(len(order) for _, order in placed)
    units = tuple(tuple(_widen(piece, width) for piece in unit) for unit, _ in placed)
    orders = np.stack([np.pad(order, (0, width - len(order))) for _, order in placed])
    if len(orders) == 1 or (orders == orders[0]).all():
        orders = orders[0]
    return dataclasses.replace(weight, shape=(*weight.shape[:-1], width), units=units, order=orders)


def _columns_of(piece: Piece) -> Array | None:
    """The columns that the integers of a piece come in; None where they come in the channels' order, or not at all."""
    return None if piece.packed is None or piece.integers is None else piece.packed.columns


def _place_columns(unit: tuple[Piece, ...], width: int, step: int) -> tuple[tuple[Piece, ...], Array]:
    """The pieces with their columns, and the channels of all columns: a run for each order that integers come in."""
    runs: list[Array] = []
    chosen = []
    for piece in sorted(unit, key=lambda piece: piece.integers is None):  # what has no integers takes any order
        columns = _columns_of(piece)
        if columns is None:
            columns = runs[0] if runs and piece.integers is None else np.arange(width)
        place = next((place for place, run in enumerate(runs) if np.array_equal(run, columns)), len(runs))
        if place == len(runs):
            runs.append(columns)
        chosen.append((unit.index(piece), place))
    sizes = [-(-len(run) // step) * step for run in runs]
    starts = [sum(sizes[:place]) for place in range(len(runs))]
    order = np.zeros(sum(sizes), np.int64)
    for start, run in zip(starts, runs, strict=True):
        order[start : start + len(run)] = np.maximum(run, 0)
    placed = []
    for index, place in sorted(chosen):
        own = np.full(len(order), -1, np.int64)
        own[starts[place] : starts[place] + len(runs[place])] = runs[place]
        placed.append(dataclasses.replace(unit[index], columns=own, first_column=starts[place]))
    return tuple(placed), order


def _widen(piece: Piece, width: int) -> Piece:
    assert piece.columns is not None
    more = width - len(piece.columns)
    return dataclasses.replace(piece, columns=np.pad(piece.columns, (0, more), constant_values=-1)) if more else piece


def _order_rows(gate_up: Weight, order: Array) -> Weight:
    """gate and up rows in the `order` [in] or [E, in] of down's columns."""
    orders = np.broadcast_to(order, (len(gate_up.units), order.shape[-1]))
    units = tuple(
        tuple(dataclasses.replace(piece, rows=rows) for piece in unit)
        for unit, rows in zip(gate_up.units, orders, strict=True)
    )
    experts, _, width = gate_up.shape
    return dataclasses.replace(gate_up, shape=(experts, 2 * order.shape[-1], width), units=units)


def _link_widths(weight: Weight, plan: dict[str, Weight]) -> Weight:
    """Stacks of one layer share a group size: each knows the other's width."""
    for own, other in ((_GATE_UP, _DOWN), (_DOWN, _GATE_UP)):
        partner = plan.get(weight.name.removesuffix(own) + other) if weight.name.endswith(own) else None
        if partner is not None and weight.group_with:
            return dataclasses.replace(weight, group_with=(partner.shape[-1],))
    return weight
