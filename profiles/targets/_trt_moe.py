"""A mixture of experts in TensorRT: the chosen experts' codes alone for one token, every expert for a chunk.

M = rows of this half (one token or none; a chunk or none), k = experts a token, E = experts with the shared ones, H =
hidden size, I = intermediate size, B = block. TENSORRT.md says why each form is as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ._canonical import Matrix, attributes_of, find_matrix, gate_of, linear_matrix
from ._trt_buckets import fill_buckets, find_room
from ._trt_weights import Stored

if TYPE_CHECKING:
    from .tensorrt_network import Lowering


# All experts in INT8 are read, written out in half precision (twice the bytes) and read again, for a product.
_WRITTEN_OUT = 5
# Codes of FP8, up to 448, are cast to less than 2, or their products could leave half precision.
_FP8_CAST = 256.0


@dataclass(frozen=True)
class Mixture:
    """gate_up [E*2I, W] and down [H, E*I]; `choices` experts a token. W is H, or what zeros widen it to.

    `ordered`: inputs are [M, k*W], a row for each choice, because experts take their channels in orders of their own.
    `biased`: gate_up_bias [E, 2I] and down_bias [E, H], and the activation is clamped: gpt-oss's.
    """

    gate_up: Stored
    down: Stored
    experts: int
    choices: int
    hidden: int
    inner: int
    width: int
    ordered: bool = False
    biased: _Biased | None = None


@dataclass(frozen=True)
class _Biased:
    gate_up: ir.Value
    down: ir.Value
    alpha: float
    limit: float


@dataclass(frozen=True)
class _Shared:
    """An MLP on the same input whose output is added to the experts', weighed by `gate` [T, 1] where it has one."""

    gate_up: Matrix
    down: Matrix
    add: ir.Node
    gate: ir.Value | None


def lower_experts(lowering: Lowering, call: ir.Node) -> list[ir.Value]:
    """What replaces an `Experts` or `BiasedExperts` call; a shared MLP moves in as experts that every token chooses."""
    ordered = _undo_rows(call)
    x, experts, weights = ordered or call.inputs[:3]
    assert x is not None and experts is not None and weights is not None
    biased = _biases_of(lowering, call)
    gate_up, down = find_matrix(call.inputs[3]), find_matrix(call.inputs[5 if biased else 4])
    count, hidden, inner = down.shape
    gate = gate_of(experts)
    choices = int(attributes_of(gate)["top_k"])
    room = None if ordered else find_room(lowering.network, gate, count)
    # In a bucket there is no room for experts that every token takes: a shared MLP stays where it is.
    shared = None if biased or room is not None else find_shared(call, gate_up, down)
    more = 0
    if shared is not None:
        more = shared.down.shape[1] // inner
        experts, weights = _choose_always(lowering, experts, weights, count, more, shared.gate)
        shared.add.outputs[0].replace_all_uses_with(call.outputs[0])
    name = str(call.name)
    shared_gate_up, shared_down = (None, None) if shared is None else (shared.gate_up, shared.down)
    mixture = Mixture(
        lowering.put_stored(lowering.weights.expert_rows(f"{name}.gate_up.lowered", gate_up, shared_gate_up)),
        lowering.put_stored(lowering.weights.expert_columns(f"{name}.down.lowered", down, shared_down)),
        count + more,
        choices + more,
        hidden,
        inner,
        gate_up.shape[2],
        ordered is not None,
        biased,
    )
    inputs, end = (lowering.half(x), experts, weights), _sparse_rows(lowering, mixture)
    row, own, weight = (lowering.first_rows(value, end) for value in inputs)
    if end is lowering.inputs.stepping and lowering.inputs.sources is not None:
        own = lowering.rewriter.op("Gather", [own, lowering.inputs.sources], axis=0)
    few = _sparse(lowering, mixture, row, own, weight)
    rest = [lowering.other_rows(value, end) for value in inputs]
    if room is None:
        many = _dense(lowering, mixture, *rest)
    else:
        many = fill_buckets(lowering, mixture, *rest, room=room, activate=partial(_activate, lowering, mixture))
    return [lowering.rewriter.op("Concat", [few, many], axis=0)]


def _sparse_rows(lowering: Lowering, mixture: Mixture) -> ir.Value:
    """How many rows read their own experts alone: a token of each lane, unless all experts are less to read."""
    several = lowering.lanes * mixture.choices <= mixture.experts * (_WRITTEN_OUT if mixture.down.bits == 8 else 1)
    return lowering.inputs.stepping if several else lowering.inputs.single


def _undo_rows(call: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """x [T, k*W], experts and weights [T, k] of a call that has a row for each choice; what it gives is [T, H] then.

    The canonical graph makes rows of them by a Reshape each, and adds the rows of a token behind the call.
    """
    rows = [None if value is None else _producer(value, "Reshape") for value in call.inputs[:3]]
    if rows[1] is None:
        return None
    sources = [row.inputs[0] for row in rows if row is not None]
    by_token = next(iter(call.outputs[0].uses())).node
    total = next(iter(by_token.outputs[0].uses())).node
    assert by_token.op_type == "Reshape" and total.op_type == "ReduceSum", f"{call.name} has rows of an unknown kind"
    total.outputs[0].replace_all_uses_with(call.outputs[0])
    x, experts, weights = sources
    assert x is not None and experts is not None and weights is not None
    return x, experts, weights


def _biases_of(lowering: Lowering, call: ir.Node) -> _Biased | None:
    if call.op_type != "BiasedExperts":
        return None
    attributes, gate_up, down = attributes_of(call), call.inputs[4], call.inputs[6]
    assert gate_up is not None and down is not None
    rows = lowering.put(lowering.weights.gate_before_up(f"{call.name}.gate_up.bias.lowered", gate_up))
    return _Biased(rows, down, attributes["alpha"], attributes["limit"])


def _activate(lowering: Lowering, mixture: Mixture, both: ir.Value) -> ir.Value:
    """float32 [..., 2I] of gate and up -> [..., I]."""
    op, constant = lowering.rewriter.op, lowering.rewriter.constant
    gate, up = lowering.rewriter.ops("Split", [both, lowering.rewriter.ints(mixture.inner, mixture.inner)], 2, axis=2)
    if mixture.biased is None:
        return op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up])

    def number(value: float) -> ir.Value:
        return constant(f"float.{value!r}", np.array(value, np.float32))

    limit = mixture.biased.limit
    gate = op("Min", [gate, number(limit)])
    up = op("Add", [op("Clip", [up, number(-limit), number(limit)]), number(1.0)])
    return op("Mul", [op("Mul", [gate, op("Sigmoid", [op("Mul", [gate, number(mixture.biased.alpha)])])]), up])


def find_shared(call: ir.Node, gate_up: Matrix, down: Matrix) -> _Shared | None:
    """Add(Experts(x, ...), Linear(SwiGLU(Linear(x)))) with weights stored like the experts', some times as wide.

    The second may be multiplied by a Sigmoid.
    """
    uses = list(call.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    add = uses[0].node
    last = _producer(add.inputs[1 - uses[0].idx], "Mul", "MatMul")
    gate = None
    if last is not None and last.op_type == "Mul":
        gate = last.inputs[1] if _producer(last.inputs[1], "Sigmoid") is not None else None
        last = _producer(last.inputs[0], "MatMul") if gate is not None else None
    activation = _producer(last.inputs[0], "SwiGLU") if last is not None else None
    first = _producer(activation.inputs[0], "MatMul") if activation is not None else None
    if last is None or first is None or first.inputs[0] is not call.inputs[0]:
        return None
    shared = _Shared(linear_matrix(first), linear_matrix(last), add, gate)
    alike = shared.gate_up.bits == gate_up.bits and shared.down.bits == down.bits
    whole = shared.down.shape[1] % down.shape[2] == 0
    return shared if alike and whole else None


def _producer(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """What makes a value, if it is of one of these kinds."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def _choose_always(
    lowering: Lowering, experts: ir.Value, weights: ir.Value, count: int, more: int, gate: ir.Value | None
) -> tuple[ir.Value, ir.Value]:
    """Experts `count` to `count + more - 1` behind each token's own choices, with weight `gate` or 1."""
    op, rewriter = lowering.rewriter.op, lowering.rewriter
    shape = op("Concat", [op("Shape", [experts], start=0, end=1), rewriter.ints(more)], axis=0)
    ids = rewriter.constant(f"shared.{count}.{more}", np.arange(count, count + more, dtype=np.int64)[None])
    if gate is None:
        gate = rewriter.constant(f"shared.{more}.weight", np.ones((1, more), np.float32))
    experts = op("Concat", [experts, op("Expand", [ids, shape])], axis=1)
    return experts, op("Concat", [weights, op("Expand", [gate, shape])], axis=1)


def _sparse(lowering: Lowering, mixture: Mixture, x: ir.Value, experts: ir.Value, weights: ir.Value) -> ir.Value:
    """x [M, W], experts and weights [M, k] -> float32 [M, H]: products as sums, so that the look-up fuses into them."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    count, choices, hidden, inner = mixture.experts, mixture.choices, mixture.hidden, mixture.inner
    rows, width = 2 * inner, mixture.width
    matrix = _chosen(lowering, mixture.gate_up, [count, rows, width], 0, experts, [-1, choices, rows, width])
    if mixture.ordered:
        x = op("Reshape", [x, ints(-1, choices, 1, width)], allowzero=1)
    else:
        x = op("Unsqueeze", [x, ints(1, 2)])
    terms = op("Mul", [matrix, x])
    both = op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)  # [M, k, 2I]
    if mixture.gate_up.by_row:
        scales = op("Gather", [op("Reshape", [mixture.gate_up.scales, ints(count, rows)]), experts], axis=0)
        both = op("Mul", [both, _widened(lowering, scales)])
    if mixture.biased is not None:
        both = op("Add", [both, op("Gather", [mixture.biased.gate_up, experts], axis=0)])
    h = lowering.half(_activate(lowering, mixture, both))
    matrix = _chosen(lowering, mixture.down, [hidden, count, inner], 1, experts, [hidden, -1, choices, inner])
    terms = op("Mul", [matrix, op("Unsqueeze", [h, ints(0)])])
    outputs = op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)  # [H, M, k]
    if mixture.down.by_row:
        outputs = op("Mul", [outputs, _widened(lowering, op("Reshape", [mixture.down.scales, ints(hidden, 1, 1)]))])
    weighted = op("Mul", [outputs, op("Unsqueeze", [weights, ints(0)])])
    y = op("Transpose", [op("ReduceSum", [weighted, ints(2)], keepdims=0)], perm=[1, 0])
    if mixture.biased is None:
        return y
    biases = op("Mul", [op("Gather", [mixture.biased.down, experts], axis=0), op("Unsqueeze", [weights, ints(2)])])
    return op("Add", [y, op("ReduceSum", [biases, ints(1)], keepdims=0)])


def _widened(lowering: Lowering, scales: ir.Value) -> ir.Value:
    """Scales for sums of codes that were cast to a smaller range."""
    factor = lowering.rewriter.constant("fp8.cast", np.array(_FP8_CAST, np.float32))
    return lowering.rewriter.op("Mul", [lowering.full(scales), factor])


def _chosen(
    lowering: Lowering, weight: Stored, shape: list[int], axis: int, experts: ir.Value, chosen: list[int]
) -> ir.Value:
    """The experts' matrices `shape`, gathered along `axis`, as `chosen`.

    Only a DequantizeLinear may read codes: with scale 1 it is a plain cast that the Gather moves before, and the scales
    are gathered beside. With scales in it, TensorRT writes the matrices out where E/k is 16 or more.
    """
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    if not weight.bits:
        return op("Gather", [op("Reshape", [weight.data, ints(*shape)]), experts], axis=axis)
    if weight.by_row:
        codes = op("DequantizeLinear", [weight.data, lowering.unit(1 / _FP8_CAST)])
        codes = op("Gather", [op("Reshape", [codes, ints(*shape)]), experts], axis=axis)
        return op("Reshape", [codes, ints(*chosen)], allowzero=1)
    blocks = [*shape[:-1], shape[-1] // weight.block]
    codes = op("DequantizeLinear", [weight.data, lowering.unit()])
    codes = op("Gather", [op("Reshape", [codes, ints(*blocks, weight.block)]), experts], axis=axis)
    scales = op("Gather", [op("Reshape", [weight.scales, ints(*blocks)]), experts], axis=axis)
    values = op("Mul", [codes, op("Unsqueeze", [scales, ints(4)])])
    if weight.offsets is not None:
        offsets = op("Gather", [op("Reshape", [weight.offsets, ints(*blocks)]), experts], axis=axis)
        values = op("Add", [values, op("Unsqueeze", [offsets, ints(4)])])
    return op("Reshape", [values, ints(*chosen)], allowzero=1)


def _dense(lowering: Lowering, mixture: Mixture, x: ir.Value, experts: ir.Value, weights: ir.Value) -> ir.Value:
    """The same by every expert over all rows, weighted by 0 where it was not chosen: exact, one product each way."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    count, inner = mixture.experts, mixture.inner
    if mixture.ordered:  # a row for each choice, added up at the end
        x = op("Reshape", [x, ints(-1, mixture.width)], allowzero=1)
        experts, weights = (op("Reshape", [value, ints(-1, 1)], allowzero=1) for value in (experts, weights))
        by_choice = _dense(lowering, dataclasses.replace(mixture, ordered=False), x, experts, weights)
        by_token = op("Reshape", [by_choice, ints(-1, mixture.choices, mixture.hidden)], allowzero=1)
        return op("ReduceSum", [by_token, ints(1)], keepdims=0)
    ids = lowering.rewriter.constant(f"numbers.{count}", np.arange(count, dtype=np.int64))
    is_chosen = op("Cast", [op("Equal", [op("Unsqueeze", [experts, ints(2)]), ids])], to=int(ir.DataType.FLOAT))
    gates = op("ReduceSum", [op("Mul", [is_chosen, op("Unsqueeze", [weights, ints(2)])]), ints(1)], keepdims=0)
    both = op("Reshape", [lowering.multiply(x, mixture.gate_up), ints(-1, count, 2 * inner)], allowzero=1)
    if mixture.biased is not None:
        both = op("Add", [both, mixture.biased.gate_up])
    h = op("Mul", [_activate(lowering, mixture, both), op("Unsqueeze", [gates, ints(2)])])
    y = lowering.multiply(op("Reshape", [h, ints(-1, count * inner)], allowzero=1), mixture.down)
    return y if mixture.biased is None else op("Add", [y, op("MatMul", [gates, mixture.biased.down])])
