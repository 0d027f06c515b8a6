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
token costs no loop. The new load does not depend on how a text is cut into calls, if the choices do not.

A token with a NaN gets weights of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import GraphBuilder

OP = "LoadAwareGate"
ATTRIBUTES = ("top_k", "norm_topk_prob", "routed_scaling_factor", "penalty", "capacity_factor", "decay")

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
    if not factor >= 1:
        room = f"{num_experts} experts would have room for {factor * top_k:g} of the {top_k} choices of each token"
        return f"capacity_factor {factor:g} is below 1: {room}"
    if not attributes["penalty"] >= 0:
        return f"penalty {attributes['penalty']:g} is below 0 and would draw tokens to busy experts"
    if not 0 <= attributes["decay"] <= 1:
        return f"decay {attributes['decay']:g} is not between 0 and 1"
    return None


def find_capacity(tokens: int, top_k: int, num_experts: int, capacity_factor: float) -> int:
    """The most choices that one expert takes in a call of so many tokens."""
    return int(np.ceil(np.float64(np.float32(capacity_factor)) * (tokens * top_k) / num_experts))


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
        experts[token] = _choose(preference[token], room, tokens - token, top_k)
        room[experts[token]] -= 1
        new_load *= decay
        new_load[experts[token]] += 1
    weights = np.take_along_axis(scores, experts, axis=1)
    if norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    weights = (weights * np.float32(routed_scaling_factor)).astype(np.float32)
    weights[np.isnan(raw).any(axis=1) | np.isnan(scores).any(axis=1)] = np.nan
    return experts, weights, new_load.astype(np.float32)


def _choose(liking: Any, room: Any, to_go: int, top_k: int) -> Any:
    """The experts of one token by falling liking; `to_go` tokens are left, this one included."""
    spare = np.minimum(room, to_go).sum() - top_k * to_go
    wide = room >= to_go
    due = max(0, int(wide.sum() - spare))
    must = np.argsort(np.where(wide, -liking, np.inf), kind="stable")[:due]
    order = np.where(room > 0, liking, -np.inf)
    order[must] = np.inf
    found = np.sort(np.argsort(-order, kind="stable")[:top_k])
    return found[np.argsort(-liking[found], kind="stable")]


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, ...]:
    """The function as it is: its loop runs only where an expert would overflow, and a target inlines the rest.

    `inputs`: values of scores, choice [T, E] and load [E]. Returns those of experts, weights and new load.
    """
    return tuple(build.ops(OP, inputs, 3, domain="moedge", **attributes))
