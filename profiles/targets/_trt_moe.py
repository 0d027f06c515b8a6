"""A mixture of experts in TensorRT: the chosen experts' codes alone for one token, every expert for a chunk.

M = rows of this half (one token or none; a chunk or none), k = experts a token, E = experts with the shared ones, H =
hidden size, I = intermediate size, B = block. TENSORRT.md says why each form is as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ._canonical import Matrix, attributes_of, find_matrix, linear_matrix
from ._trt_weights import Stored, check_symmetric

if TYPE_CHECKING:
    from .tensorrt_network import Lowering


@dataclass(frozen=True)
class _Mixture:
    """gate_up [E*2I, H] and down [H, E*I]; `choices` experts a token."""

    gate_up: Stored
    down: Stored
    experts: int
    choices: int
    hidden: int
    inner: int


@dataclass(frozen=True)
class _Shared:
    """An MLP on the same input whose output is added to the experts'."""

    gate_up: Matrix
    down: Matrix
    add: ir.Node


def lower_experts(lowering: Lowering, call: ir.Node) -> list[ir.Value]:
    """What replaces an `Experts` call; a shared MLP moves in as experts that every token chooses with weight 1."""
    x, experts, weights = call.inputs[:3]
    assert x is not None and experts is not None and weights is not None
    gate_up, down = find_matrix(call.inputs[3]), find_matrix(call.inputs[4])
    count, hidden, inner = down.shape
    gate = experts.producer()
    assert gate is not None
    choices = int(attributes_of(gate)["top_k"])
    shared = _find_shared(call, gate_up, down)
    more = 0
    if shared is not None:
        more = shared.down.shape[1] // inner
        experts, weights = _choose_always(lowering, experts, weights, count, more)
        shared.add.outputs[0].replace_all_uses_with(call.outputs[0])
    name = str(call.name)
    for matrix in (gate_up, down):
        check_symmetric(matrix, name)
    shared_gate_up, shared_down = (None, None) if shared is None else (shared.gate_up, shared.down)
    mixture = _Mixture(
        lowering.put_stored(lowering.weights.expert_rows(f"{name}.gate_up.lowered", gate_up, shared_gate_up)),
        lowering.put_stored(lowering.weights.expert_columns(f"{name}.down.lowered", down, shared_down)),
        count + more,
        choices + more,
        hidden,
        inner,
    )
    inputs = (lowering.half(x), experts, weights)
    few = _sparse(lowering, mixture, *[lowering.first_rows(value) for value in inputs])
    many = _dense(lowering, mixture, *[lowering.other_rows(value) for value in inputs])
    return [lowering.rewriter.op("Concat", [few, many], axis=0)]


def _find_shared(call: ir.Node, gate_up: Matrix, down: Matrix) -> _Shared | None:
    """Add(Experts(x, ...), Linear(SwiGLU(Linear(x)))) with weights stored like the experts', some times as wide."""
    uses = list(call.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    add = uses[0].node
    other = add.inputs[1 - uses[0].idx]
    last = other.producer() if other is not None else None
    activation = last.inputs[0].producer() if last is not None and last.op_type == "MatMul" and last.inputs[0] else None
    if activation is None or activation.op_type != "SwiGLU" or activation.inputs[0] is None:
        return None
    first = activation.inputs[0].producer()
    if first is None or first.op_type != "MatMul" or first.inputs[0] is not call.inputs[0]:
        return None
    assert last is not None
    shared = _Shared(linear_matrix(first), linear_matrix(last), add)
    alike = shared.gate_up.bits == gate_up.bits and shared.down.bits == down.bits
    whole = shared.down.shape[1] % down.shape[2] == 0
    check_symmetric(shared.gate_up, str(call.name))
    check_symmetric(shared.down, str(call.name))
    return shared if alike and whole else None


def _choose_always(
    lowering: Lowering, experts: ir.Value, weights: ir.Value, count: int, more: int
) -> tuple[ir.Value, ir.Value]:
    """Experts `count` to `count + more - 1` behind each token's own choices."""
    op, rewriter = lowering.rewriter.op, lowering.rewriter
    shape = op("Concat", [op("Shape", [experts], start=0, end=1), rewriter.ints(more)], axis=0)
    ids = rewriter.constant(f"shared.{count}.{more}", np.arange(count, count + more, dtype=np.int64)[None])
    ones = rewriter.constant(f"shared.{more}.weight", np.ones((1, more), np.float32))
    experts = op("Concat", [experts, op("Expand", [ids, shape])], axis=1)
    return experts, op("Concat", [weights, op("Expand", [ones, shape])], axis=1)


def _sparse(lowering: Lowering, mixture: _Mixture, x: ir.Value, experts: ir.Value, weights: ir.Value) -> ir.Value:
    """x [M, H], experts and weights [M, k] -> float32 [M, H]: products as sums, so that the look-up fuses into them."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    count, choices, hidden, inner = mixture.experts, mixture.choices, mixture.hidden, mixture.inner
    rows = 2 * inner
    matrix = _chosen(lowering, mixture.gate_up, [count, rows, hidden], 0, experts, [-1, choices, rows, hidden])
    terms = op("Mul", [matrix, op("Unsqueeze", [x, ints(1, 2)])])
    both = op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)  # [M, k, 2I]
    gate, up = lowering.rewriter.ops("Split", [both, ints(inner, inner)], 2, axis=2)
    h = lowering.half(op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up]))
    matrix = _chosen(lowering, mixture.down, [hidden, count, inner], 1, experts, [hidden, -1, choices, inner])
    terms = op("Mul", [matrix, op("Unsqueeze", [h, ints(0)])])
    outputs = op("ReduceSum", [lowering.full(terms), ints(3)], keepdims=0)  # [H, M, k]
    weighted = op("Mul", [outputs, op("Unsqueeze", [weights, ints(0)])])
    return op("Transpose", [op("ReduceSum", [weighted, ints(2)], keepdims=0)], perm=[1, 0])


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
    blocks = [*shape[:-1], shape[-1] // weight.block]
    codes = op("DequantizeLinear", [weight.data, lowering.unit()])
    codes = op("Gather", [op("Reshape", [codes, ints(*blocks, weight.block)]), experts], axis=axis)
    scales = op("Gather", [op("Reshape", [weight.scales, ints(*blocks)]), experts], axis=axis)
    values = op("Mul", [codes, op("Unsqueeze", [scales, ints(4)])])
    return op("Reshape", [values, ints(*chosen)], allowzero=1)


def _dense(lowering: Lowering, mixture: _Mixture, x: ir.Value, experts: ir.Value, weights: ir.Value) -> ir.Value:
    """The same by every expert over all rows, weighted by 0 where it was not chosen: exact, one product each way."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    count, inner = mixture.experts, mixture.inner
    ids = lowering.rewriter.constant(f"experts.{count}", np.arange(count, dtype=np.int64))
    is_chosen = op("Cast", [op("Equal", [op("Unsqueeze", [experts, ints(2)]), ids])], to=int(ir.DataType.FLOAT))
    gates = op("ReduceSum", [op("Mul", [is_chosen, op("Unsqueeze", [weights, ints(2)])]), ints(1)], keepdims=0)
    both = op("Reshape", [lowering.multiply(x, mixture.gate_up), ints(-1, count, 2 * inner)], allowzero=1)
    gate, up = lowering.rewriter.ops("Split", [both, ints(inner, inner)], 2, axis=2)
    h = op("Mul", [op("Mul", [op("Mul", [gate, op("Sigmoid", [gate])]), up]), op("Unsqueeze", [gates, ints(2)])])
    flat = op("Reshape", [h, ints(-1, count * inner)], allowzero=1)
    return lowering.multiply(flat, mixture.down)
