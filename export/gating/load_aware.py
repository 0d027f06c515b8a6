"""`moedge.LoadAwareGate`: any gate's scores, chosen under a penalty for busy experts and a capacity for each.

`scores` [T, E] are the base gate's (softmax or sigmoid of the logits), from which the weights come; `choice` [T, E] is
what it chooses by (scores, plus a correction bias, minus infinity outside the best groups); `load` [E] is a state:
how often each expert was chosen, a choice counting `decay` times as much with every token after it.

An expert's preference is choice - penalty * load / mean load, with the load as it stood before the call. In a call of T
tokens an expert has room for ceil(capacity_factor * T * k / E) of them. Tokens choose in order, each the k experts
it prefers among those with room, ties to the lower index: what does not fit goes to the token's next-best expert. One
rule keeps the last tokens from finding fewer than k experts with room, which first come, first served alone would
allow. With R tokens to go, this one included, an expert with room for R or more that is passed over now loses a place
for good, since a token takes an expert once. There are spare = sum(min(room, R)) - k * R such places to lose. So of
these experts a token takes at least (their number - spare), the ones it prefers; this is never more than k, and as
long as the spare is not negative, which a capacity_factor of 1 or more ensures at the start and the rule from then on,
every token finds k. Where plain top-k stays within the capacity it is what the rule gives, and is taken as it is: one
token costs no loop. The new load does not depend on how a text is cut into calls, if the choices do not; the choices
do: a call's capacity is that of its tokens, and the penalty within a call is that of its beginning.

The function is the rule as it reads, a token after the other. Lowered, all tokens choose at once, again and again, each
as if those before it stayed with what they have, until nobody changes: when t tokens have their final choice, token
t + 1 finds its own, so that at most T rounds lead to the same choices, and a few do where few experts overflow.

A token with a NaN gets weights of NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from . import GraphBuilder
from ._checked import checked
from ._groups import scale_weights

OP = "LoadAwareGate"
ATTRIBUTES = ("top_k", "norm_topk_prob", "routed_scaling_factor", "penalty", "capacity_factor", "decay")
_MOST = 3e38  # the largest magnitude of a preference, and beyond it what is not to be chosen or is in any case
_NEVER, _SURELY = -3.3e38, 3.3e38

# scores and choice float32 [T, E], load float32 [E] -> experts int64 [T, k], weights float32 [T, k],
# new_load float32 [E]
FUNCTION = """
<domain: "moedge", opset_import: ["" : 23]>
LoadAwareGate <top_k, norm_topk_prob, routed_scaling_factor, penalty, capacity_factor, decay>
    (scores, choice, load) => (experts, weights, new_load)
{
    flat = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    third = Constant <value_ints = [2]> ()
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    none = Constant <value_int = 0> ()
    single = Constant <value_int = 1> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Reshape (k_scalar, flat)
    tokens = Shape <start = 0, end = 1> (scores)
    token_count = Squeeze (tokens, first)
    count = Shape <start = 1, end = 2> (scores)
    float_count = Cast <to = 1> (count)

    total_load = ReduceSum <keepdims = 1> (load, first)
    is_loaded = Greater (total_load, zero)
    divisor = Where (is_loaded, total_load, one)
    share = Div (load, divisor)
    relative = Mul (share, float_count)
    penalty = Constant <value_float: float = @penalty> ()
    burden = Mul (relative, penalty)
    raw = Sub (choice, burden)
    unknown = IsNaN (raw)
    least = Constant <value_float = -3e38> ()
    most = Constant <value_float = 3e38> ()
    known = Where (unknown, least, raw)
    preference = Clip (known, least, most)

    factor32 = Constant <value_float: float = @capacity_factor> ()
    factor64 = Cast <to = 11> (factor32)
    choices = Mul (tokens, k)
    choices64 = Cast <to = 11> (choices)
    count64 = Cast <to = 11> (count)
    wanted = Mul (factor64, choices64)
    even = Div (wanted, count64)
    rounded = Ceil (even)
    capacity = Cast <to = 7> (rounded)
    no_choices = ConstantOfShape <value = int64[1] {0}> (count)
    best, plain = TopK <axis = 1> (preference, k)
    plain_flat = Reshape (plain, flat)
    ones = ConstantOfShape <value = int64[1] {1}> (choices)
    taken = ScatterElements <axis = 0, reduction = "add"> (no_choices, plain_flat, ones)
    fullest = ReduceMax <keepdims = 1> (taken, first)
    fits_1d = LessOrEqual (fullest, capacity)
    fits = Squeeze (fits_1d, first)
    experts = If (fits) <
        then_branch = all_fit () => (int64[t, n] as_preferred) {
            as_preferred = Identity (plain)
        },
        else_branch = in_order () => (int64[t, n] in_turn) {
            room_at_first = Add (no_choices, capacity)
            always = Constant <value = bool {1}> ()
            never = Constant <value_float = -inf> ()
            surely = Constant <value_float = inf> ()
            ones_of_token = ConstantOfShape <value = int64[1] {1}> (k)
            minus_ones = ConstantOfShape <value = int64[1] {-1}> (k)
            ranks = Range (none, k_scalar, single)
            room_at_last, in_turn = Loop (token_count, always, room_at_first) <
                body = choose (int64 token, bool go, int64[e] room)
                    => (bool go_on, int64[e] room_left, int64[n] chosen) {
                    go_on = Identity (go)
                    liking = Gather <axis = 0> (preference, token)
                    is_open = Greater (room, none)
                    open_liking = Where (is_open, liking, never)
                    to_go = Sub (token_count, token)
                    usable = Min (room, to_go)
                    places = ReduceSum <keepdims = 0> (usable, first)
                    needed = Mul (k_scalar, to_go)
                    spare = Sub (places, needed)
                    is_wide = GreaterOrEqual (room, to_go)
                    wide_ints = Cast <to = 7> (is_wide)
                    wide_count = ReduceSum <keepdims = 0> (wide_ints, first)
                    due = Sub (wide_count, spare)
                    wide_liking = Where (is_wide, liking, never)
                    wide_best, wide_first = TopK <axis = 0> (wide_liking, k)
                    is_due = Less (ranks, due)
                    due_ints = Cast <to = 7> (is_due)
                    due_counts = ScatterElements <axis = 0, reduction = "add"> (no_choices, wide_first, due_ints)
                    must = Greater (due_counts, none)
                    order = Where (must, surely, open_liking)
                    order_best, found = TopK <axis = 0> (order, k)
                    found_counts = ScatterElements <axis = 0, reduction = "add"> (no_choices, found, ones_of_token)
                    is_found = Greater (found_counts, none)
                    found_liking = Where (is_found, liking, never)
                    found_best, chosen = TopK <axis = 0> (found_liking, k)
                    room_left = ScatterElements <axis = 0, reduction = "add"> (room, chosen, minus_ones)
                }
            >
        }
    >

    chosen_places = Unsqueeze (experts, third)
    picked = GatherND <batch_dims = 1> (scores, chosen_places)
    total = ReduceSum <keepdims = 1> (picked, second)
    tiny = Constant <value_float = 1e-20> ()
    denominator = Add (total, tiny)
    shares = Div (picked, denominator)
    normalize_int = Constant <value_int: int = @norm_topk_prob> ()
    normalize = Cast <to = 9> (normalize_int)
    plain_weights = Where (normalize, shares, picked)
    scale = Constant <value_float: float = @routed_scaling_factor> ()
    scaled = Mul (plain_weights, scale)
    score_unknown = IsNaN (scores)
    any_unknown = Or (unknown, score_unknown)
    unknown_ints = Cast <to = 1> (any_unknown)
    faults = ReduceMax <keepdims = 1> (unknown_ints, second)
    is_fault = Greater (faults, zero)
    nan = Constant <value_float = nan> ()
    weights = Where (is_fault, nan, scaled)

    decay = Constant <value_float: float = @decay> ()
    steps = Range (none, token_count, single)
    after_this = Sub (token_count, steps)
    ages = Sub (after_this, single)
    float_ages = Cast <to = 1> (ages)
    worth = Pow (decay, float_ages)
    worth_column = Unsqueeze (worth, second)
    choice_shape = Shape (experts)
    worth_of_each = Expand (worth_column, choice_shape)
    worth_flat = Reshape (worth_of_each, flat)
    float_tokens = Cast <to = 1> (token_count)
    old_worth = Pow (decay, float_tokens)
    old_load = Mul (load, old_worth)
    experts_flat = Reshape (experts, flat)
    new_load = ScatterElements <axis = 0, reduction = "add"> (old_load, experts_flat, worth_flat)
}
"""


def find_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    top_k, factor = attributes["top_k"], attributes["capacity_factor"]
    if top_k > num_experts:
        return f"num_experts_per_tok {top_k} exceeds the {num_experts} experts"
    if top_k < 1:
        return f"num_experts_per_tok {top_k} is not between 1 and the {num_experts} experts"
    if not factor >= 1:
        room = f"{num_experts} experts would have room for {factor * top_k:g} of the {top_k} choices of each token"
        return f"capacity_factor {factor:g} is below 1: {room}"
    if math.isinf(factor):
        return f"capacity_factor {factor:g} is no number; {num_experts / top_k:g} has room for every choice"
    if not attributes["penalty"] >= 0:
        return f"penalty {attributes['penalty']:g} is below 0 and would draw tokens to busy experts"
    if math.isinf(attributes["penalty"]):
        return f"penalty {attributes['penalty']:g} is no number; choose a finite one"
    if not 0 <= attributes["decay"] <= 1:
        return f"decay {attributes['decay']:g} is not between 0 and 1"
    return None


def find_capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """The most choices that one expert takes in a call of so many tokens."""
    return int(np.ceil(np.float64(np.float32(capacity_factor)) * (tokens * top_k) / num_experts))


@checked(OP, find_fault)
def reference(
    scores: Any,
    choice: Any,
    load: Any,
    *,
    top_k: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    penalty: float,
    capacity_factor: float,
    decay: float,
) -> tuple[Any, Any, Any]:
    """numpy: scores and choice float32 [T, E], load float32 [E] -> (experts int64 [T, k], weights float32 [T, k],
    new load float32 [E])."""
    tokens, count = scores.shape
    total = load.sum()
    raw = choice - load / (total if total > 0 else np.float32(1)) * np.float32(count) * np.float32(penalty)
    preference = np.clip(np.where(np.isnan(raw), np.float32(-3e38), raw), np.float32(-3e38), np.float32(3e38))
    room = np.full(count, find_capacity(tokens, top_k, count, capacity_factor))
    experts = np.zeros((tokens, top_k), np.int64)
    new_load = load.astype(np.float64)
    for token in range(tokens):
        experts[token] = choose(preference[token], room, tokens - token, top_k)
        room[experts[token]] -= 1
        new_load *= decay
        new_load[experts[token]] += 1
    given = {"norm_topk_prob": norm_topk_prob, "routed_scaling_factor": routed_scaling_factor}
    weights = weigh(scores, experts, given)
    weights[np.isnan(raw).any(axis=1) | np.isnan(scores).any(axis=1)] = np.nan
    return experts, weights, new_load.astype(np.float32)


def choose(liking: Any, room: Any, to_go: int, top_k: int) -> Any:
    """numpy: one token's experts int64 [k] by falling liking float32 [E], of those with room int64 [E]; `to_go` tokens
    are left, this one included."""
    spare = np.minimum(room, to_go).sum() - top_k * to_go
    wide = room >= to_go
    due = max(0, int(wide.sum() - spare))
    must = np.argsort(np.where(wide, -liking, np.inf), kind="stable")[:due]
    order = np.where(room > 0, liking, -np.inf)
    order[must] = np.inf
    found = np.sort(np.argsort(-order, kind="stable")[:top_k])
    return found[np.argsort(-liking[found], kind="stable")]


def weigh(scores: Any, experts: Any, attributes: dict[str, Any]) -> Any:
    """numpy: weights float32 [T, k] of experts int64 [T, k] by scores float32 [T, E]."""
    weights = np.take_along_axis(scores, experts, axis=1)
    if attributes["norm_topk_prob"]:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    return (weights * np.float32(attributes["routed_scaling_factor"])).astype(np.float32)


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, ...]:
    """The rule in rounds over all tokens; no round for a token alone or where plain top-k stays within the capacity.

    `inputs`: values of scores, choice [T, E] and load [E]. Returns those of experts, weights and new load.
    """
    scores, choice, load = inputs
    op, ints, top_k, count = build.op, build.ints, attributes["top_k"], int(load.shape[0])
    unknown, preference = _prefer(build, choice, load, attributes["penalty"], count)
    _, plain = build.ops("TopK", [preference, ints(top_k)], 2, axis=-1)
    alone, (plain, preference) = build.part_rows([plain, preference])
    factor = Fraction(float(np.float32(attributes["capacity_factor"]))) * top_k / count
    experts = _choose_in_rounds(build, plain, preference, factor, top_k, count)
    if alone:  # an expert has room for the one choice of it that a token makes
        experts = op("Concat", [alone[0], experts], axis=0)
    weights = op("GatherElements", [scores, experts], axis=1)
    if attributes["norm_topk_prob"]:
        total = op("ReduceSum", [weights, ints(1)], keepdims=1)
        weights = op("Div", [weights, op("Add", [total, build.constant("gate.tiny", np.array(1e-20, np.float32))])])
    weights = scale_weights(build, weights, attributes)
    faults = op("Cast", [op("Or", [unknown, op("IsNaN", [scores])])], to=1)
    is_fault = op("Greater", [op("ReduceMax", [faults, ints(1)], keepdims=1), _float(build, 0)])
    weights = op("Where", [is_fault, _float(build, math.nan), weights])
    return experts, weights, _add_load(build, load, experts, attributes["decay"], count)


def _prefer(build: GraphBuilder, choice: Any, load: Any, penalty: float, count: int) -> tuple[Any, Any]:
    """choice [T, E] -> where it is NaN bool [T, E], and choice less the penalty [T, E], a number everywhere."""
    op = build.op
    raw = choice
    if penalty:
        # A load without choices is all zeros, whatever they are divided by; another one sums to k or more.
        total = op("Max", [op("ReduceSum", [load], keepdims=1), _float(build, 1e-30)])
        share = op("Div", [load, total])
        burden = op("Mul", [op("Mul", [share, _float(build, count)]), _float(build, penalty)])
        raw = op("Sub", [choice, burden])
    unknown = op("IsNaN", [raw])
    known = op("Where", [unknown, _float(build, -_MOST), raw])
    return unknown, op("Clip", [known, _float(build, -_MOST), _float(build, _MOST)])


def _choose_in_rounds(
    build: GraphBuilder, plain: Any, preference: Any, factor: Fraction, top_k: int, count: int
) -> Any:
    """Experts int64 [T, k] within the capacity, from those of plain top-k; `factor`: room for a token of the call."""
    op, ints = build.op, build.ints
    tokens, to_go = _count_down(build, plain)
    above = op("Add", [op("Mul", [tokens, ints(factor.numerator)]), ints(factor.denominator - 1)])
    capacity = op("Div", [above, ints(factor.denominator)])
    taken = op("ReduceSum", [_mark(build, plain, count), ints(0)], keepdims=0)
    missing = op("ReduceSum", [op("Max", [op("Sub", [taken, capacity]), _number(build, 0)])], keepdims=0)

    def choose_again(build: GraphBuilder, carried: Sequence[Any]) -> tuple[Any, list[Any]]:
        (before,) = carried
        again = _choose_behind(build, preference, before, capacity, to_go, top_k, count)
        moved = build.op("ReduceSum", [build.op("Abs", [build.op("Sub", [again, before])])], keepdims=0)
        return build.op("Cast", [moved], to=9), [again]

    most = op("Squeeze", [op("Shape", [plain], start=0, end=1), ints(0)])
    (experts,) = build.loop(most, op("Cast", [missing], to=9), [plain], choose_again)
    return experts


def _count_down(build: GraphBuilder, rows: Any) -> tuple[Any, Any]:
    """How many rows [T, ...] there are, int64 [1], and for each how many are to go, itself included, int64 [T, 1].

    Counted, not taken from the shape: that, TensorRT would copy from the host to the device in each step.
    """
    op, ints = build.op, build.ints
    count = op("Squeeze", [op("Shape", [rows], start=0, end=1), ints(0)])
    steps = op("Range", [_number(build, 0), count, _number(build, 1)])
    ones = op("Cast", [op("GreaterOrEqual", [steps, _number(build, 0)])], to=7)
    tokens = op("ReduceSum", [ones, ints(0)], keepdims=1)
    return tokens, op("Unsqueeze", [op("Sub", [tokens, steps]), ints(1)])


def _choose_behind(
    build: GraphBuilder, preference: Any, before: Any, capacity: Any, to_go: Any, top_k: int, count: int
) -> Any:
    """Each token's experts int64 [T, k], those of the tokens before it being as in `before` [T, k]."""
    op, ints, none = build.op, build.ints, _number(build, 0)
    taken = op("CumSum", [_mark(build, before, count), none], exclusive=1)
    room = op("Sub", [capacity, taken])  # [T, E]
    open_preference = op("Where", [op("Greater", [room, none]), preference, _float(build, _NEVER)])
    usable = op("Max", [op("Min", [room, to_go]), none])
    places = op("ReduceSum", [usable, ints(1)], keepdims=1)
    spare = op("Sub", [places, op("Mul", [to_go, ints(top_k)])])
    is_wide = op("GreaterOrEqual", [room, to_go])
    due = op("Sub", [op("ReduceSum", [op("Cast", [is_wide], to=7), ints(1)], keepdims=1), spare])  # [T, 1]
    wide_preference = op("Where", [is_wide, preference, _float(build, _NEVER)])
    _, wide_first = build.ops("TopK", [wide_preference, ints(top_k)], 2, axis=-1)
    ranks = build.constant(f"gate.ranks.{top_k}", np.arange(top_k))
    due_first = op("Where", [op("Less", [ranks, due]), wide_first, ints(-1)])  # -1 is nobody
    is_due = op("Greater", [_mark(build, due_first, count), none])
    order = op("Where", [is_due, _float(build, _SURELY), open_preference])
    _, found = build.ops("TopK", [order, ints(top_k)], 2, axis=-1)
    is_found = op("Greater", [_mark(build, found, count), none])
    _, chosen = build.ops("TopK", [op("Where", [is_found, preference, _float(build, _NEVER)]), ints(top_k)], 2, axis=-1)
    return chosen


def _mark(build: GraphBuilder, chosen: Any, count: int) -> Any:
    """int64 [T, E]: 1 where an expert is among the chosen [T, k]."""
    ids = build.constant(f"gate.experts.{count}", np.arange(count, dtype=np.int64))
    hits = build.op("Cast", [build.op("Equal", [build.op("Unsqueeze", [chosen, build.ints(2)]), ids])], to=7)
    return build.op("ReduceSum", [hits, build.ints(1)], keepdims=0)


def _add_load(build: GraphBuilder, load: Any, experts: Any, decay: float, count: int) -> Any:
    """The load [E] behind these tokens."""
    op, ints = build.op, build.ints
    rate, (tokens, to_go) = _float(build, decay), _count_down(build, experts)
    worth = op("Pow", [rate, op("Cast", [op("Sub", [to_go, ints(1)])], to=1)])
    added = op("ReduceSum", [op("Mul", [op("Cast", [_mark(build, experts, count)], to=1), worth]), ints(0)], keepdims=0)
    return op("Add", [op("Mul", [load, op("Pow", [rate, op("Cast", [tokens], to=1)])]), added])


def _float(build: GraphBuilder, value: float) -> Any:
    return build.constant(f"float.{value!r}", np.array(value, np.float32))


def _number(build: GraphBuilder, value: int) -> Any:
    return build.constant(f"int.{value}", np.array(value, np.int64))
