"""`moedge.BinaryCodeGate`: an expert is a code of sign bits, and the router has a logit for each bit, not each expert.

Bit j of expert e is (e >> j) & 1 and has the probability sigmoid(logits[j]) of being 1, sigmoid(-logits[j]) of being
0; an expert's score is the product over its bits. The best expert has the sign bits themselves; every flip of bit j
multiplies the score by exp(-|logits[j]|). So the k best experts are the k cheapest sets of flips, a set costing the
sum of its |logits|, and only few sets can be among them whatever the logits are (`_flips`): the gate's work grows with
the number of bits, and its router has bits / experts of the weights. As hashing routers do (arXiv:2106.04426), but
learned and differentiable: the weights are the chosen codes' probabilities, divided by their sum where
`norm_topk_prob` is set, times `routed_scaling_factor`.

Ties go to the lower index, exactly: a flip changes the index by +2^j or -2^j, which adds up as costs do, so flips and
sets are ordered by (cost, change of index). A logit of 0 stands for bit 0. Costs are summed in float64, without error
for float32 logits within 2^29 of each other; the lowered form sums in float32, where two sets whose costs differ in
the last place count as tied. A token with a logit that is not finite gets weights of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import GraphBuilder
from ._checked import checked
from ._flips import count_preceding, list_flips
from ._groups import scale_weights

OP = "BinaryCodeGate"
ATTRIBUTES = ("top_k", "bits", "norm_topk_prob", "routed_scaling_factor")
# What the function's table of flips reaches; float32 holds every change of index up to 24 bits.
MAX_TOP_K, MAX_BITS = 64, 24
_FLIPS = list_flips(MAX_TOP_K, MAX_BITS)
_CODES = [sum(1 << (rank - 1) for rank in flips) for flips in _FLIPS]
_COUNTS = [sum(count_preceding(flips) <= top_k for flips in _FLIPS) for top_k in range(MAX_TOP_K + 1)]

# logits float32 [T, bits] -> experts int64 [T, k], weights float32 [T, k]. C = sets of flips, by how many precede them.
FUNCTION = f"""
<domain: "moedge", opset_import: ["" : 23]>
BinaryCodeGate <top_k, bits, norm_topk_prob, routed_scaling_factor> (logits) => (experts, weights)
{{
    flat = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    lowest = Constant <value_ints = [{-(1 << 40)}]> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Reshape (k_scalar, flat)
    bits_scalar = Constant <value_int: int = @bits> ()
    bits = Reshape (bits_scalar, flat)

    all_powers = Constant <value_ints = {[1 << bit for bit in range(MAX_BITS)]}> ()
    powers = Slice (all_powers, first, bits)
    falling_powers = Slice (powers, flat, lowest, first, flat)
    decreases = Neg (falling_powers)
    changes = Concat <axis = 0> (decreases, powers)
    all_codes = Constant <value_ints = {_CODES}> ()
    counts = Constant <value_ints = {_COUNTS}> ()
    count = Gather (counts, k)
    codes = Slice (all_codes, first, count)
    power_column = Unsqueeze (powers, second)
    shifted = Div (codes, power_column)
    flipped = Mod (shifted, two)
    flips = Cast <to = 11> (flipped)
    all_flips = Mul (powers, two)
    code_end = ReduceMax <keepdims = 1> (all_flips, first)
    too_many = GreaterOrEqual (codes, code_end)
    never = Constant <value = double {{1e300}}> ()
    free = Constant <value = double {{0.0}}> ()
    surcharge = Where (too_many, never, free)

    unknown = IsNaN (logits)
    known = Where (unknown, zero, logits)
    least = Constant <value_float = -1e30> ()
    most = Constant <value_float = 1e30> ()
    finite = Clip (known, least, most)
    wide = Cast <to = 11> (finite)
    size = Abs (wide)
    is_one = Greater (finite, zero)
    lowering = Where (is_one, size, never)
    lowering_back = Slice (lowering, flat, lowest, second, flat)
    raising = Where (is_one, never, size)
    flip_costs = Concat <axis = 1> (lowering_back, raising)
    ranked_costs, places = TopK <axis = 1, largest = 0> (flip_costs, bits)
    ranked_changes = Gather (changes, places)
    wide_changes = Cast <to = 11> (ranked_changes)
    plain_costs = MatMul (ranked_costs, flips)
    set_costs = Add (plain_costs, surcharge)
    set_changes = MatMul (wide_changes, flips)
    by_index, order = TopK <axis = 1, largest = 0> (set_changes, count)
    order_places = Unsqueeze (order, third)
    costs_by_index = GatherND <batch_dims = 1> (set_costs, order_places)
    cheapest, chosen = TopK <axis = 1, largest = 0> (costs_by_index, k)
    chosen_places = Unsqueeze (chosen, third)
    wide_change = GatherND <batch_dims = 1> (by_index, chosen_places)
    change = Cast <to = 7> (wide_change)
    nothing = Constant <value_int = 0> ()
    own_powers = Where (is_one, powers, nothing)
    base = ReduceSum <keepdims = 1> (own_powers, second)
    experts = Add (base, change)

    gains = Neg (cheapest)
    shares = Softmax <axis = 1> (gains)
    certainty = Sigmoid (size)
    log_certainty = Log (certainty)
    base_log = ReduceSum <keepdims = 1> (log_certainty, second)
    logs = Add (base_log, gains)
    products = Exp (logs)
    normalize_int = Constant <value_int: int = @norm_topk_prob> ()
    normalize = Cast <to = 9> (normalize_int)
    wide_weights = Where (normalize, shares, products)
    plain = Cast <to = 1> (wide_weights)
    factor = Constant <value_float: float = @routed_scaling_factor> ()
    scaled = Mul (plain, factor)
    vanished = Mul (logits, zero)
    fault = ReduceSum <keepdims = 1> (vanished, second)
    weights = Add (scaled, fault)
}}
"""


def find_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    top_k, bits = attributes["top_k"], attributes["bits"]
    if not 1 <= bits <= MAX_BITS:
        return f"bits {bits} is not between 1 and {MAX_BITS}"
    if num_experts != 1 << int(bits):
        return f"{num_experts} experts are not the {1 << int(bits)} that codes of {bits} bits name"
    if top_k > num_experts:
        return f"num_experts_per_tok {top_k} exceeds the {num_experts} experts"
    if not 1 <= top_k <= MAX_TOP_K:
        return f"num_experts_per_tok {top_k} is not between 1 and {MAX_TOP_K}"
    return None


def count_bits(num_experts: int) -> int:
    """Bits of the longest code; `find_fault` refuses numbers of experts that are no power of two."""
    return max(1, (num_experts - 1).bit_length())


@checked(OP, find_fault)
def reference(
    logits: Any, *, top_k: int, bits: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Any, Any]:
    """numpy: logits float32 [T, bits] -> (experts int64 [T, k], weights float32 [T, k])."""
    finite = np.clip(np.nan_to_num(logits.astype(np.float64), nan=0.0), -1e30, 1e30)
    is_one, powers = finite > 0, np.int64(1) << np.arange(bits)
    costs, changes = np.abs(finite), np.where(is_one, -powers, powers)
    order = np.lexsort((changes, costs), axis=-1)
    flips = _flip_matrix(top_k, bits, np.float64)
    set_costs = np.take_along_axis(costs, order, 1)[:, : len(flips)] @ flips
    set_changes = np.take_along_axis(changes, order, 1)[:, : len(flips)] @ flips.astype(np.int64)
    chosen = np.lexsort((set_changes, set_costs), axis=-1)[:, :top_k]
    experts = (is_one @ powers)[:, None] + np.take_along_axis(set_changes, chosen, 1)
    gains = -np.take_along_axis(set_costs, chosen, 1)
    if norm_topk_prob:
        weights = np.exp(gains - gains.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
    else:
        weights = np.exp(gains - np.log1p(np.exp(-costs)).sum(axis=1, keepdims=True))
    weights = weights.astype(np.float32) * np.float32(routed_scaling_factor)
    weights[~np.isfinite(logits).all(axis=1)] = np.nan
    return experts, weights


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """The same gate with the few sets of flips that this k needs, in float32.

    `inputs`: the value of logits [T, bits]. Returns those of experts int64 [T, k] and weights float32 [T, k].
    """
    (logits,) = inputs
    op, top_k, bits = build.op, attributes["top_k"], attributes["bits"]
    zero = build.constant("float.0", np.array(0, np.float32))
    known = op("Where", [op("IsNaN", [logits]), zero, logits])
    bounds = [build.constant(f"gate.{sign}1e30", np.array(float(f"{sign}1e30"), np.float32)) for sign in ("-", "+")]
    finite = op("Clip", [known, *bounds])
    experts, gains = _choose(build, finite, top_k, bits)
    if attributes["norm_topk_prob"]:
        weights = op("Softmax", [gains], axis=1)
    else:
        certainty = op("Log", [op("Sigmoid", [op("Abs", [finite])])])
        base_log = op("ReduceSum", [certainty, build.ints(1)], keepdims=1)
        weights = op("Exp", [op("Add", [base_log, gains])])
    weights = scale_weights(build, weights, attributes)
    fault = op("ReduceSum", [op("Mul", [logits, zero]), build.ints(1)], keepdims=1)
    return experts, op("Add", [weights, fault])


def _choose(build: GraphBuilder, finite: Any, top_k: int, bits: int) -> tuple[Any, Any]:
    """finite [T, bits] -> experts int64 [T, k] and minus their costs float32 [T, k].

    Each bit stands twice, once as a flip to 0, falling, and once as a flip to 1, rising: the order in which the changes
    of index rise. One of the two is barred. TopK, whose ties go to the lower place, then ranks by (cost, change).
    """
    op = build.op
    powers = np.int64(1) << np.arange(bits)
    places = build.constant(f"gate.bit_places.{bits}", np.r_[np.arange(bits)[::-1], np.arange(bits)])
    changes = build.constant(f"gate.changes.{bits}", np.r_[-powers[::-1], powers].astype(np.float32))
    to_one = build.constant(f"gate.to_one.{bits}", np.arange(2 * bits) >= bits)
    own = build.constant(f"gate.own_powers.{bits}", np.r_[0 * powers, powers].astype(np.float32))
    matrix = _flip_matrix(top_k, bits, np.float32)
    flips = build.constant(f"gate.flips.{top_k}.{bits}", matrix)
    ranks, sets = (build.ints(size) for size in matrix.shape)
    zero = build.constant("float.0", np.array(0, np.float32))
    barred = build.constant("gate.barred", np.array(3e38, np.float32))
    twice = op("Gather", [finite, places], axis=1)
    is_one = op("Greater", [twice, zero])
    costs = op("Where", [op("Xor", [is_one, to_one]), op("Abs", [twice]), barred])
    ranked, chosen = build.ops("TopK", [costs, ranks], 2, axis=1, largest=0)
    set_costs = op("MatMul", [ranked, flips])
    set_changes = op("MatMul", [op("Gather", [changes, chosen], axis=0), flips])
    by_index, order = build.ops("TopK", [set_changes, sets], 2, axis=1, largest=0)
    gains = op("Neg", [op("GatherElements", [set_costs, order], axis=1)])
    best, picked = build.ops("TopK", [gains, build.ints(top_k)], 2, axis=1)
    base = op("ReduceSum", [op("Where", [is_one, own, zero]), build.ints(1)], keepdims=1)
    index = op("Add", [op("GatherElements", [by_index, picked], axis=1), base])
    return op("Cast", [index], to=7), best


def _flip_matrix(top_k: int, bits: int, dtype: Any) -> Any:
    """[ranks, sets]: 1 where the set has the flip of that rank; a row at least."""
    sets = list_flips(top_k, bits)
    matrix = np.zeros((max(1, *(max(flips, default=0) for flips in sets)), len(sets)), dtype)
    for column, flips in enumerate(sets):
        for rank in flips:
            matrix[rank - 1, column] = 1
    return matrix
