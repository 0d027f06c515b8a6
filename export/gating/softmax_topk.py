"""`moedge.SoftmaxTopKGate`: softmax over all experts, then the k largest.

Mixtral (arXiv:2401.04088), OLMoE, Qwen-MoE, and DeepSeek-V2 (arXiv:2405.04434), which may keep the `topk_group` best
of `n_group` groups first, a group counting as its best expert; others stand at 0 then, as in transformers'
`DeepseekV2MoEGate`. `norm_topk_prob` divides by the sum of the chosen: that equals a softmax over the chosen logits
alone, so gates that select first and normalize after (Granite, gpt-oss) are this op too. Ties go to the lower index.
A token with a NaN gets weights of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import GraphBuilder
from ._checked import checked
from ._groups import find_group_fault, keep_best_groups, mask_groups, pass_on_nan, scale_weights

OP = "SoftmaxTopKGate"
ATTRIBUTES = ("top_k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")

# logits float32 [T, E] -> experts int64 [T, k], weights float32 [T, k]
FUNCTION = """
<domain: "moedge", opset_import: ["" : 23]>
SoftmaxTopKGate <top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor> (logits) => (experts, weights)
{
    flat = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Reshape (k_scalar, flat)
    groups_scalar = Constant <value_int: int = @n_group> ()
    groups = Reshape (groups_scalar, flat)
    kept_scalar = Constant <value_int: int = @topk_group> ()
    kept = Reshape (kept_scalar, flat)
    scores = Softmax <axis = -1> (logits)
    same_tokens = Constant <value_ints = [0]> ()
    grouped_shape = Concat <axis = 0> (same_tokens, groups, flat)
    grouped = Reshape (scores, grouped_shape)
    last = Constant <value_ints = [2]> ()
    group_scores = ReduceMax <keepdims = 0> (grouped, last)
    kept_scores, kept_index = TopK <axis = -1> (group_scores, kept)
    group_shape = Shape (group_scores)
    no_groups = ConstantOfShape <value = float[1] {0.0}> (group_shape)
    kept_shape = Shape (kept_index)
    ones = ConstantOfShape <value = float[1] {1.0}> (kept_shape)
    mask = ScatterElements <axis = 1> (no_groups, kept_index, ones)
    mask_column = Unsqueeze (mask, last)
    in_kept_group = Greater (mask_column, zero)
    masked = Where (in_kept_group, grouped, zero)
    all_shape = Shape (logits)
    candidates = Reshape (masked, all_shape)
    picked, experts = TopK <axis = -1> (candidates, k)
    one = Constant <value_ints = [1]> ()
    total = ReduceSum <keepdims = 1> (picked, one)
    shares = Div (picked, total)
    normalize_int = Constant <value_int: int = @norm_topk_prob> ()
    normalize = Cast <to = 9> (normalize_int)
    plain = Where (normalize, shares, picked)
    factor = Constant <value_float: float = @routed_scaling_factor> ()
    scaled = Mul (plain, factor)
    all_scores = ReduceSum <keepdims = 1> (scores, one)
    fault = Mul (all_scores, zero)
    weights = Add (scaled, fault)
}
"""


def find_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    return find_group_fault(attributes, num_experts)


@checked(OP, find_fault)
def reference(
    logits: Any, *, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Any, Any]:
    """numpy: logits float32 [T, E] -> (experts int64 [T, k], weights float32 [T, k])."""
    scores = _softmax(logits)
    candidates = keep_best_groups(scores, scores.reshape(len(scores), n_group, -1).max(axis=-1), topk_group)
    experts = np.argsort(-candidates, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(candidates, experts, axis=1)
    if norm_topk_prob:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    weights = (weights * np.float32(routed_scaling_factor)).astype(np.float32)
    weights[np.isnan(scores).any(axis=-1)] = np.nan
    return experts.astype(np.int64), weights


def score_reference(logits: Any, *, n_group: int, topk_group: int, **_: Any) -> tuple[Any, Any]:
    """numpy: what weights come from and what is chosen by, each float32 [T, E], for `LoadAwareGate`."""
    scores = _softmax(logits)
    best = scores.reshape(len(scores), n_group, -1).max(axis=-1)
    return scores, keep_best_groups(scores, best, topk_group, lowered=True)


def _softmax(logits: Any) -> Any:
    with np.errstate(invalid="ignore"):  # infinity less infinity
        shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32)


def score(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """`score_reference` in standard ops."""
    (logits,) = inputs
    scores = build.op("Softmax", [logits], axis=-1)
    if attributes["topk_group"] == attributes["n_group"]:
        return scores, scores
    return scores, mask_groups(build, scores, logits, attributes, best=1, lowered=True)


def largest_score(attributes: dict[str, int | float]) -> float:
    """An even share of 1 for each choice."""
    return 1 / attributes["top_k"]


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """The same gate in as few standard ops as its attributes need.

    `inputs`: the value of logits [T, E]. Returns those of experts int64 [T, k] and weights float32 [T, k].
    """
    (logits,) = inputs
    op = build.op
    grouped = attributes["topk_group"] < attributes["n_group"]
    scores = candidates = op("Softmax", [logits], axis=-1)
    if grouped:
        candidates = mask_groups(build, scores, logits, attributes, best=1)
    weights, experts = build.ops("TopK", [candidates, build.ints(attributes["top_k"])], 2, axis=-1)
    if attributes["norm_topk_prob"]:
        weights = op("Div", [weights, op("ReduceSum", [weights, build.ints(1)], keepdims=1)])
    if grouped:  # else one NaN has made every score NaN
        weights = pass_on_nan(build, weights, scores)
    return experts, scale_weights(build, weights, attributes)
