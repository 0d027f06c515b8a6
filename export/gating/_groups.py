"""What gates share: selection limited to the best groups, weights scaled, NaN passed on."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import GraphBuilder

# What an expert outside the best groups loses where it may still be chosen: more than scores and penalties come to, and
# little enough for float32 to keep its order among its like, to 8e-6.
OUTSIDE = np.float32(64)


def scale_weights(build: GraphBuilder, weights: Any, attributes: dict[str, Any]) -> Any:
    """weights times `routed_scaling_factor`; 1 costs no node."""
    factor = attributes["routed_scaling_factor"]
    if factor == 1:
        return weights
    return build.op("Mul", [weights, build.constant(f"gate.factor.{factor}", np.array(factor, np.float32))])


def pass_on_nan(build: GraphBuilder, weights: Any, scores: Any) -> Any:
    """weights [T, k], NaN where a score [T, E] of the token is: TopK may have passed it over. No score is infinite."""
    zero = build.constant("float.0", np.array(0, np.float32))
    total = build.op("ReduceSum", [scores, build.ints(1)], keepdims=1)
    return build.op("Add", [weights, build.op("Mul", [total, zero])])


def find_group_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    """What contradicts itself, with both figures."""
    top_k, groups, kept = attributes["top_k"], attributes["n_group"], attributes["topk_group"]
    if top_k > num_experts:
        return f"num_experts_per_tok {top_k} exceeds the {num_experts} experts"
    if top_k < 1:
        return f"num_experts_per_tok {top_k} is not between 1 and the {num_experts} experts"
    if groups < 1:
        return f"n_group {groups} is not between 1 and the {num_experts} experts"
    if kept < 1:
        return f"topk_group {kept} is not between 1 and n_group {groups}"
    if num_experts % groups:
        return f"n_group {groups} does not divide the {num_experts} experts"
    if kept > groups:
        return f"topk_group {kept} exceeds n_group {groups}"
    if kept * (num_experts // groups) < top_k:
        return f"{kept} groups of {num_experts // groups} experts hold fewer than num_experts_per_tok {top_k}"
    return None


def keep_best_groups(scores: Any, group_scores: Any, topk_group: int, *, lowered: bool = False) -> Any:
    """numpy: scores [T, E] with 0 outside the `topk_group` best groups by group_scores [T, n_group]; `lowered`: with
    `OUTSIDE` taken from them there."""
    tokens, groups = group_scores.shape
    kept = np.argsort(-group_scores, axis=-1, kind="stable")[:, :topk_group]
    mask = np.zeros((tokens, groups), bool)
    np.put_along_axis(mask, kept, True, axis=1)
    grouped = scores.reshape(tokens, groups, -1)
    return np.where(mask[..., None], grouped, grouped - OUTSIDE if lowered else np.float32(0)).reshape(scores.shape)


def mask_groups(
    build: GraphBuilder, choice: Any, logits: Any, attributes: dict[str, Any], *, best: int, lowered: bool = False
) -> Any:
    """choice [T, E] with 0 outside the `topk_group` best groups, a group counting as the sum of its `best` largest.

    `lowered`: with `OUTSIDE` taken from it there, for a gate that may have to go on to them.
    """
    op, groups, kept = build.op, attributes["n_group"], attributes["topk_group"]
    grouped = op("Reshape", [choice, build.ints(0, groups, -1)])
    size = op("Min", [op("Shape", [grouped], start=2, end=3), build.ints(best)])
    largest, _ = build.ops("TopK", [grouped, size], 2, axis=-1)
    group_scores = op("ReduceSum", [largest, build.ints(2)], keepdims=0)
    _, kept_index = build.ops("TopK", [group_scores, build.ints(kept)], 2, axis=-1)
    zero, one = (build.constant(f"float.{number}", np.array(number, np.float32)) for number in (0, 1))
    none, all_kept = op("Expand", [zero, op("Shape", [group_scores])]), op("Expand", [one, op("Shape", [kept_index])])
    mask = op("ScatterElements", [none, kept_index, all_kept], axis=1)
    inside = op("Greater", [op("Unsqueeze", [mask, build.ints(2)]), zero])
    outside = zero
    if lowered:
        outside = op("Sub", [grouped, build.constant("gate.outside", np.array(OUTSIDE))])
    return op("Reshape", [op("Where", [inside, grouped, outside]), op("Shape", [logits])])
