"""`moedge.SparseMixerGate`: Phi-3.5-MoE's choice of two experts (SparseMixer-v2, arXiv:2409.12136).

The largest logit is the first choice, the largest of the rest the second. The weight of a choice is its softmax among
the logits near it: those that fall short of it by no more than 2 * jitter_eps, measured by the larger of the two
magnitudes; the second choice does not count the first. As in transformers' `sparsemixer` outside of training. Ties go
to the lower index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import GraphBuilder
from ._checked import checked

OP = "SparseMixerGate"
ATTRIBUTES = ("top_k", "jitter_eps")

# logits float32 [T, E] -> experts int64 [T, 2], weights float32 [T, 2]
FUNCTION = """
<domain: "moedge", opset_import: ["" : 23]>
SparseMixerGate <top_k, jitter_eps> (logits) => (experts, weights)
{
    flat = Constant <value_ints = [-1]> ()
    column_axis = Constant <value_ints = [1]> ()
    none = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Reshape (k_scalar, flat)
    jitter = Constant <value_float: float = @jitter_eps> ()
    reach = Add (jitter, jitter)
    tops, experts = TopK <axis = -1> (logits, k)
    top_1, top_2 = Split <axis = 1, num_outputs = 2> (tops)
    magnitude = Abs (logits)
    gap_1 = Sub (top_1, logits)
    size_1 = Max (magnitude, top_1)
    ratio_1 = Div (gap_1, size_1)
    far_1 = Greater (ratio_1, reach)
    fall_1 = Neg (gap_1)
    share_1 = Exp (fall_1)
    near_1 = Where (far_1, none, share_1)
    total_1 = ReduceSum <keepdims = 1> (near_1, column_axis)
    gap_2 = Sub (top_2, logits)
    size_2 = Max (magnitude, top_2)
    ratio_2 = Div (gap_2, size_2)
    far_2 = Greater (ratio_2, reach)
    first, second = Split <axis = 1, num_outputs = 2> (experts)
    count_1d = Shape <start = 1, end = 2> (logits)
    no_axis = Constant <value_ints = [0]> ()
    count = Squeeze (count_1d, no_axis)
    start = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    ids = Range (start, count, step)
    taken = Equal (first, ids)
    out_2 = Or (far_2, taken)
    fall_2 = Neg (gap_2)
    share_2 = Exp (fall_2)
    near_2 = Where (out_2, none, share_2)
    total_2 = ReduceSum <keepdims = 1> (near_2, column_axis)
    totals = Concat <axis = 1> (total_1, total_2)
    weights = Div (one, totals)
}
"""


def find_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    if attributes["top_k"] != 2:
        return f"num_experts_per_tok is {attributes['top_k']}, this gate chooses 2"
    if num_experts < 2:
        return f"num_experts_per_tok 2 exceeds the {num_experts} experts"
    return None


@checked(OP, find_fault)
def reference(logits: Any, *, top_k: int, jitter_eps: float) -> tuple[Any, Any]:
    """numpy: logits float32 [T, E] -> (experts int64 [T, 2], weights float32 [T, 2])."""
    scores = logits.astype(np.float32)
    chosen, weights = [], []
    candidates = scores.copy()
    for _ in range(top_k):
        expert = candidates.argmax(axis=-1)[:, None]
        top = np.take_along_axis(candidates, expert, axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):  # over 0: NaN and -inf are not far
            far = (top - scores) / np.maximum(np.abs(scores), top) > np.float32(2 * jitter_eps)
        near = np.where(far, 0, np.exp(candidates - top))
        chosen.append(expert)
        weights.append(1 / near.sum(axis=-1, keepdims=True))
        np.put_along_axis(candidates, expert, -np.inf, axis=1)
    return np.concatenate(chosen, axis=1).astype(np.int64), np.concatenate(weights, axis=1).astype(np.float32)


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """The same gate in standard ops, both choices at once: [T, 2, E].

    `inputs`: the value of logits [T, E]. Returns those of experts int64 [T, 2] and weights float32 [T, 2].
    """
    (logits,) = inputs
    op, ints = build.op, build.ints
    zero, one = (build.constant(f"float.{number}", np.array(number, np.float32)) for number in (0, 1))
    tops, experts = build.ops("TopK", [logits, ints(2)], 2, axis=-1)
    top, scores = op("Unsqueeze", [tops, ints(2)]), op("Unsqueeze", [logits, ints(1)])
    # At most 0: only the first choice is above the second, and there it does not count.
    fall = op("Min", [op("Sub", [scores, top]), zero])
    ratio = op("Div", [fall, op("Max", [op("Abs", [scores]), top])])
    reach = -2 * attributes["jitter_eps"]
    far = op("Less", [ratio, build.constant(f"gate.reach.{reach}", np.array(reach, np.float32))])
    near = op("Where", [far, zero, op("Exp", [fall])])
    first = op("Slice", [experts, ints(0), ints(1), ints(1)])
    everywhere = op("Expand", [one, op("Shape", [logits])])
    rest = op("ScatterElements", [everywhere, first, op("Expand", [zero, op("Shape", [first])])], axis=1)
    counted = op("Concat", [op("Unsqueeze", [everywhere, ints(1)]), op("Unsqueeze", [rest, ints(1)])], axis=1)
    total = op("ReduceSum", [op("Mul", [near, counted]), ints(2)], keepdims=0)
    return experts, op("Reciprocal", [total])
