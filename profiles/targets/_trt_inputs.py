"""What a run of a TensorRT network is asked: which tokens, where they go, what they see, and which half of each branch
takes them.

T = new tokens, S = sequences in the run (lanes), t = T / S new tokens of each, L = slots of the cache. A network of one
lane has S = 1 written out. One of B lanes is built for S = 1 with t = 1, S = 1 with a chunk, and S = B with t = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ._canonical import attributes_of, find_calls
from ._trt_parts import Part

if TYPE_CHECKING:
    from .tensorrt_network import Lowering

_ALIGNMENT = 128  # elements of half precision in the 256 bytes at which TensorRT wants a tensor to begin


@dataclass
class RunInputs:
    """Values that all layers share; `source`, `lane_count` and `sources` are None in a network of one lane.

    tokens: input_ids [T] or hidden [T, H].  start int64 [S]: the slot of each lane's first new token.
    places int64 [T], or [S, t]: positions.  seen: the same, 0 for idle lanes.  slots int64 [1, L].
    length int32 [S]: tokens in the cache with the new ones, 1 for idle lanes.
    single int64 [1]: T where it is one token, else 0.  stepping int64 [1]: T where t is 1, else 0.
    step int64 [1]: 1 where t is 1, else 0.  sources int64 [stepping]: `source` where t is 1, else nothing.
    """

    start: ir.Value
    places: ir.Value
    seen: ir.Value
    slots: ir.Value
    length: ir.Value
    single: ir.Value
    stepping: ir.Value
    step: ir.Value
    lane_count: ir.Value | None = None
    sources: ir.Value | None = None
    masks: dict[int, ir.Value] = field(default_factory=dict)  # by window


def lower_inputs(lowering: Lowering, part: Part) -> RunInputs:
    """Positions begin at `start`; the mask and the choice of the branch are made once for all layers."""
    graph, op, ints = lowering.graph, lowering.rewriter.op, lowering.rewriter.ints
    several = lowering.lanes > 1
    tokens = ir.val("input_ids", ir.DataType.INT64, ["T"])
    start = ir.val("start", ir.DataType.INT64, ["S" if several else 1])
    graph.inputs[0].replace_all_uses_with(tokens)
    first = tokens if part.is_first else graph.inputs[1]
    graph.inputs[:] = [first, start]
    (call,) = find_calls(lowering.model, "Positions")
    count = op("Shape", [first], start=0, end=1)
    # Never an If: TensorRT folds shape arithmetic in each profile, so the half that has no rows vanishes.
    single = op("Where", [op("LessOrEqual", [count, ints(1)]), count, ints(0)], name="single")
    zero, one, length = (
        lowering.rewriter.constant(f"int.{value}", np.array(value, np.int64)) for value in (0, 1, lowering.slot_count)
    )
    slots = op("Unsqueeze", [op("Range", [zero, length, one]), ints(0)])
    if several:
        inputs = _lower_lanes(lowering, count, start, single, slots)
        angles = inputs.places
    else:
        places = op("Add", [op("Range", [zero, op("Squeeze", [count, ints(0)]), one]), start])
        reach = _length(lowering, op("ReduceMax", [places], keepdims=1))
        inputs = RunInputs(start, places, places, slots, reach, single, single, single)
        angles = op("Unsqueeze", [places, ints(0)])
    lowering.rewriter.replace(call, [angles])
    return inputs


def _lower_lanes(
    lowering: Lowering, count: ir.Value, start: ir.Value, single: ir.Value, slots: ir.Value
) -> RunInputs:
    """Input `source` int64 [S]: a lane's own number, or for an idle lane that of one at work, whose experts it then
    takes, so that none are read for it alone. An idle lane sees one slot and writes where `start` says."""
    op, ints, constant = lowering.rewriter.op, lowering.rewriter.ints, lowering.rewriter.constant
    source = ir.val("source", ir.DataType.INT64, ["S"])
    lowering.graph.inputs.append(source)
    lane_count = op("Shape", [start], start=0, end=1)
    zero, one = (constant(f"int.{value}", np.array(value, np.int64)) for value in (0, 1))
    each = op("Squeeze", [op("Div", [count, lane_count]), ints(0)])
    places = op("Add", [op("Unsqueeze", [start, ints(1)]), op("Range", [zero, each, one])])
    lanes = constant(f"lanes.{lowering.lanes}", np.arange(lowering.lanes, dtype=np.int64))
    busy = op("Equal", [source, op("Slice", [lanes, ints(0), lane_count, ints(0)])])
    seen = op("Where", [op("Unsqueeze", [busy, ints(1)]), places, zero])
    length = _length(lowering, op("ReduceMax", [seen, ints(1)], keepdims=0))
    is_step = op("LessOrEqual", [count, lane_count])
    stepping = op("Where", [is_step, count, ints(0)], name="stepping")
    step = op("Where", [is_step, ints(1), ints(0)])
    sources = op("Slice", [source, ints(0), stepping, ints(0)])
    return RunInputs(start, places, seen, slots, length, single, stepping, step, lane_count, sources)


def _length(lowering: Lowering, last: ir.Value) -> ir.Value:
    """From the positions: from the shape, TensorRT would copy it from the host to the device in each step."""
    op = lowering.rewriter.op
    return op("Cast", [op("Add", [last, lowering.rewriter.ints(1)])], to=int(ir.DataType.INT32), name="length")


def visible_slots(lowering: Lowering, window: int) -> ir.Value:
    """bool [S, 1, t, L]: the slots that each token attends to, `window` in all where that is not 0; made once
    for all layers."""
    op, ints, inputs = lowering.rewriter.op, lowering.rewriter.ints, lowering.inputs
    if window not in inputs.masks:
        last = op("Unsqueeze", [inputs.seen, ints(1 if inputs.lane_count is None else 2)])
        mask = op("LessOrEqual", [inputs.slots, last])
        if window:
            mask = op("And", [mask, op("Greater", [inputs.slots, op("Sub", [last, ints(window)])])])
        inputs.masks[window] = op("Unsqueeze", [mask, ints(*((0, 1) if inputs.lane_count is None else (1,)))])
    return inputs.masks[window]


def lower_angles_by_lane(lowering: Lowering) -> None:
    """Rotary angles whose frequencies follow the length: each lane's own, where the functions take the longest's.

    The same sums as the functions' bodies; see there for the sources.
    """
    for call in find_calls(lowering.model, "LongRotaryAngles"):
        lowering.rewriter.replace(call, _long_angles(lowering, call))
    for call in find_calls(lowering.model, "DynamicRotaryAngles"):
        lowering.rewriter.replace(call, _dynamic_angles(lowering, call))


def _long_angles(lowering: Lowering, call: ir.Node) -> list[ir.Value]:
    op, ints, a = lowering.rewriter.op, lowering.rewriter.ints, attributes_of(call)
    positions, short, long = call.inputs
    last = op("ReduceMax", [positions, ints(1)], keepdims=1)
    is_long = op("Unsqueeze", [op("GreaterOrEqual", [last, ints(a["original_length"])]), ints(2)])  # [S, 1, 1]
    factors = [_number(lowering, a[name]) for name in ("long_attention_factor", "attention_factor")]
    angles = op("Mul", [_column(lowering, positions), op("Where", [is_long, long, short])])
    factor = op("Where", [is_long, *factors])
    return [op("Mul", [op(kind, [angles]), factor]) for kind in ("Cos", "Sin")]


def _dynamic_angles(lowering: Lowering, call: ir.Node) -> list[ir.Value]:
    op, ints, a = lowering.rewriter.op, lowering.rewriter.ints, attributes_of(call)
    positions, exponents = call.inputs
    length = op("Add", [op("ReduceMax", [positions, ints(1)], keepdims=1), ints(1)])
    counted = op("Cast", [op("Max", [length, ints(a["original_length"])])], to=int(ir.DataType.FLOAT))
    stretched = op("Mul", [counted, _number(lowering, a["factor"] / a["original_length"])])
    ratio = op("Sub", [stretched, _number(lowering, a["factor"] - 1.0)])
    grown = op("Mul", [op("Pow", [ratio, _number(lowering, a["growth"])]), _number(lowering, a["theta"])])
    waves = op("Pow", [op("Unsqueeze", [grown, ints(2)]), exponents])
    angles = op("Div", [_column(lowering, positions), waves])
    return [op(kind, [angles]) for kind in ("Cos", "Sin")]


def _column(lowering: Lowering, positions: ir.Value | None) -> ir.Value:
    op = lowering.rewriter.op
    return op("Unsqueeze", [op("Cast", [positions], to=int(ir.DataType.FLOAT)), lowering.rewriter.ints(-1)])


def _number(lowering: Lowering, value: float) -> ir.Value:
    return lowering.rewriter.constant(f"float.{value!r}", np.array(value, np.float32))


def count_slots(max_seq_len: int, lanes: int, widths: list[int]) -> int:
    """Slots of the cache. Several lanes have more than a sequence can fill: an idle lane writes behind all of it.

    `widths`: elements of a token in each cache tensor; a lane's cache begins where TensorRT lets a tensor begin.
    """
    if lanes == 1:
        return max_seq_len
    step = math.lcm(8, *(_ALIGNMENT // math.gcd(_ALIGNMENT, width) for width in widths))
    return (max_seq_len // step + 1) * step
