"""A mixture of experts over a chunk in static buckets: each expert has room for what its gate lets it have, no more.

Every expert over every token, as without buckets, computes E / k times what was asked for and holds as much. Where a
gate bounds the choices of an expert in a call, its tokens are gathered into a bucket of that size and none is dropped.
The products are written as sums, as for one token: they fuse with the dequantization and read the very codes that one
token's look-up reads. As products of three-dimensional matrices TensorRT would store the codes again in another layout,
or write a layer's experts out in half precision (TENSORRT.md, Q2).

T = rows of the chunk (none in a run of one token), k = experts a token, E = experts, C = room of a bucket, H = hidden
size, I = intermediate size, W = H or what zeros widen it to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...export.gating import load_aware
from ._canonical import attributes_of
from ._trt_weights import Stored

if TYPE_CHECKING:
    from ._trt_moe import Mixture
    from .tensorrt_network import LoweredNetwork, Lowering


def find_room(network: LoweredNetwork, gate: ir.Node, count: int) -> int | None:
    """The most choices of one of `count` experts in a chunk; None where buckets were not asked for or the gate does not
    bound them. It chooses among more experts than these where a check runs a slice of them."""
    load = gate.inputs[-1]
    if not network.form.buckets or gate.op_type != load_aware.OP or load is None or load.shape is None:
        return None
    if int(load.shape[0]) != count:  # type: ignore[arg-type]
        return None
    attributes, chunk = attributes_of(gate), network.chunk
    room = load_aware.find_capacity(chunk, attributes["top_k"], count, attributes["capacity_factor"])
    return min(room, chunk)


def fill_buckets(
    lowering: Lowering,
    mixture: Mixture,
    x: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
    *,
    room: int,
    activate: Callable[[ir.Value], ir.Value],
) -> ir.Value:
    """x [T, W], experts and weights [T, k] -> float32 [T, H]; `activate`: float32 [..., 2I] to [..., I].

    What exceeds the room, in a call that the gate has not settled, is left out: such a call is run again.
    """
    op, ints, rewriter = lowering.rewriter.op, lowering.rewriter.ints, lowering.rewriter
    count, hidden, inner, width = mixture.experts, mixture.hidden, mixture.inner, mixture.width
    # Nothing in a run of one token, so that nothing of this is left there.
    bucket = op("Where", [op("Greater", [lowering.inputs.single, ints(0)]), ints(0), ints(room)])
    slots, table = _assign(lowering, experts, count, room, bucket)
    real = np.float32 if lowering.real == ir.DataType.FLOAT else np.float16
    nothing = rewriter.constant(f"buckets.nothing.{width}", np.zeros((1, width), real))
    rows = op("Gather", [op("Concat", [nothing, x], axis=0), table], axis=0)
    rows = op("Reshape", [rows, op("Concat", [ints(count), bucket, ints(width)], axis=0)], allowzero=1)
    matrix = _values(lowering, mixture.gate_up, [count, 2 * inner, width])
    terms = op("Mul", [op("Unsqueeze", [rows, ints(2)]), op("Unsqueeze", [matrix, ints(1)])])  # [E, C, 2I, W]
    both = op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)
    if mixture.biased is not None:
        both = op("Add", [both, op("Unsqueeze", [mixture.biased.gate_up, ints(1)])])
    h = lowering.half(activate(both))
    matrix = _values(lowering, mixture.down, [hidden, count, inner])
    terms = op("Mul", [op("Unsqueeze", [h, ints(0)]), op("Unsqueeze", [matrix, ints(2)])])  # [H, E, C, I]
    y = op("Transpose", [op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)], perm=[1, 2, 0])
    if mixture.biased is not None:
        y = op("Add", [y, op("Unsqueeze", [mixture.biased.down, ints(1)])])
    lost = rewriter.constant(f"buckets.lost.{hidden}", np.zeros((1, hidden), np.float32))
    y = op("Concat", [op("Reshape", [y, ints(-1, hidden)], allowzero=1), lost], axis=0)
    chosen = op("Mul", [op("Gather", [y, slots], axis=0), op("Unsqueeze", [weights, ints(2)])])  # [T, k, H]
    return op("ReduceSum", [chosen, ints(1)], keepdims=0)


def _assign(
    lowering: Lowering, experts: ir.Value, count: int, room: int, bucket: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """For each choice its slot [T, k] of E * C, or E * C itself where there is no room; and for each slot the row that
    fills it, counted from 1, [E * C], 0 where none does."""
    op, ints, rewriter = lowering.rewriter.op, lowering.rewriter.ints, lowering.rewriter
    zero, one = (rewriter.constant(f"int.{value}", np.array(value, np.int64)) for value in (0, 1))
    ids = rewriter.constant(f"gate.experts.{count}", np.arange(count, dtype=np.int64))
    is_chosen = op("Equal", [op("Unsqueeze", [experts, ints(2)]), ids])
    marks = op("ReduceSum", [op("Cast", [is_chosen], to=int(ir.DataType.INT64)), ints(1)], keepdims=0)  # [T, E]
    places = op("GatherElements", [op("CumSum", [marks, zero], exclusive=1), experts], axis=1)
    slots = op("Add", [op("Mul", [experts, ints(room)]), places])
    slots = op("Where", [op("Less", [places, ints(room)]), slots, ints(count * room)])
    rows = op("Squeeze", [op("Shape", [experts], start=0, end=1), ints(0)])
    numbers = op("Add", [op("Unsqueeze", [op("Range", [zero, rows, one]), ints(1)]), ints(1)])
    owners = op("Expand", [numbers, op("Shape", [experts])])
    size = op("Mul", [bucket, ints(count)])
    empty = op("Expand", [ints(0), op("Add", [size, ints(1)])])
    filled = op("ScatterElements", [empty, op("Reshape", [slots, ints(-1)]), op("Reshape", [owners, ints(-1)])], axis=0)
    return slots, op("Slice", [filled, ints(0), size])


def _values(lowering: Lowering, weight: Stored, shape: list[int]) -> ir.Value:
    """All experts' matrices as `shape`, multiplied by their scales: those of a DequantizeLinear that only casts."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    if not weight.bits:
        return op("Reshape", [weight.data, ints(*shape)])
    blocks = [*shape[:-1], shape[-1] // weight.block]
    codes = op("DequantizeLinear", [weight.data, lowering.unit()])
    codes = op("Reshape", [codes, ints(*blocks, weight.block)])
    values = op("Mul", [codes, op("Unsqueeze", [op("Reshape", [weight.scales, ints(*blocks)]), ints(3)])])
    if weight.offsets is not None:
        values = op("Add", [values, op("Unsqueeze", [op("Reshape", [weight.offsets, ints(*blocks)]), ints(3)])])
    return op("Reshape", [values, ints(*shape)])
