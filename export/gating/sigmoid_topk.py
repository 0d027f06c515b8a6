"""`moedge.SigmoidTopKGate`: DeepSeek-V3's `noaux_tc` routing (arXiv:2412.19437, section 2.1.2).

Scores are sigmoids of the logits. Experts are chosen by score + correction bias within the `topk_group` best of
`n_group` groups, a group counting as the sum of its two best; weights come from the plain scores. As in
transformers' `DeepseekV3TopkRouter`, experts outside the chosen groups stand at 0 and not at minus infinity, so a
bias that makes every chosen-group score negative lets them in; ties go to the lower index. A token with a NaN gets
weights of NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import GraphBuilder
from ._checked import checked
from ._groups import find_group_fault, keep_best_groups, mask_groups, pass_on_nan, scale_weights

OP = "SigmoidTopKGate"
ATTRIBUTES = ("top_k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")

# logits float32 [T, E], bias float32 [E] -> experts int64 [T, k], weights float32 [T, k]
FUNCTION = """
<domain: "moedge", opset_import: ["" : 23]>
SigmoidTopKGate <top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor> (logits, bias) => (experts, weights)
{
    flat = Constant <value_ints = [-1]> ()
    zero = Constant <value_float = 0.0> ()
    k_scalar = Constant <value_int: int = @top_k> ()
    k = Reshape (k_scalar, flat)
    groups_scalar = Constant <value_int: int = @n_group> ()
    groups = Reshape (groups_scalar, flat)
    kept_scalar = Constant <value_int: int = @topk_group> ()
    kept = Reshape (kept_scalar, flat)
    scores = Sigmoid (logits)
    choice = Add (scores, bias)
    same_tokens = Constant <value_ints = [0]> ()
    grouped_shape = Concat <axis = 0> (same_tokens, groups, flat)
    grouped = Reshape (choice, grouped_shape)
    group_size = Shape <start = 2, end = 3> (grouped)
    two = Constant <value_ints = [2]> ()
    best = Min (group_size, two)
    best_scores, best_index = TopK <axis = -1> (grouped, best)
    last = Constant <value_ints = [2]> ()
    group_scores = ReduceSum <keepdims = 0> (best_scores, last)
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
    chosen_scores, experts = TopK <axis = -1> (candidates, k)
    places = Unsqueeze (experts, last)
    picked = GatherND <batch_dims = 1> (scores, places)
    one = Constant <value_ints = [1]> ()
    total = ReduceSum <keepdims = 1> (picked, one)
    tiny = Constant <value_float = 1e-20> ()
    denominator = Add (total, tiny)
    shares = Div (picked, denominator)
    normalize_int = Constant <value_int: int = @norm_topk_prob> ()
    normalize = Cast <to = 9> (normalize_int)
    plain = Where (normalize, shares, picked)
    factor = Constant <value_float: float = @routed_scaling_factor> ()
    scaled = Mul (plain, factor)
    all_scores = ReduceSum <keepdims = 1> (choice, one)
    fault = Mul (all_scores, zero)
    weights = Add (scaled, fault)
}
"""


def find_fault(attributes: dict[str, int | float], num_experts: int) -> str | None:
    return find_group_fault(attributes, num_experts)


@checked(OP, find_fault)
def reference(
    logits: Any,
    bias: Any,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Any, Any]:
    """numpy: logits float32 [T, E], bias float32 [E] -> (experts int64 [T, k], weights float32 [T, k])."""
    scores = _sigmoid(logits)
    candidates = keep_best_groups(scores + bias, _rate_groups(scores + bias, n_group), topk_group)
    experts = np.argsort(-candidates, axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(scores, experts, axis=1)
    if norm_topk_prob:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + np.float32(1e-20))
    weights = (weights * np.float32(routed_scaling_factor)).astype(np.float32)
    weights[np.isnan(scores + bias).any(axis=-1)] = np.nan
    return experts.astype(np.int64), weights


def score_reference(logits: Any, bias: Any, *, n_group: int, topk_group: int, **_: Any) -> tuple[Any, Any]:
    """numpy: what weights come from and what is chosen by, each float32 [T, E], for `LoadAwareGate`."""
    scores = _sigmoid(logits)
    return scores, keep_best_groups(scores + bias, _rate_groups(scores + bias, n_group), topk_group, lowered=True)


def _sigmoid(logits: Any) -> Any:
    return (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float32)


def _rate_groups(choice: Any, n_group: int) -> Any:
    """float32 [T, n_group]: the sum of each group's two best."""
    return np.sort(choice.reshape(len(choice), n_group, -1), axis=-1)[..., -2:].sum(axis=-1)


def score(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """`score_reference` in standard ops."""
    logits, bias = inputs
    scores = build.op("Sigmoid", [logits])
    choice = build.op("Add", [scores, bias])
    if attributes["topk_group"] < attributes["n_group"]:
        choice = mask_groups(build, choice, logits, attributes, best=2, lowered=True)
    return scores, choice


def largest_score(attributes: dict[str, int | float]) -> float:
    """A sigmoid's."""
    return 1.0


def lower(build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
    """The same gate in as few standard ops as its attributes need: no group ops where every group is kept.

    `inputs`: values of logits [T, E] and bias [E]. Returns those of experts int64 [T, k] and weights float32 [T, k].
    """
    logits, bias = inputs
    op = build.op
    scores = op("Sigmoid", [logits])
    choice = candidates = op("Add", [scores, bias])
    if attributes["topk_group"] < attributes["n_group"]:
        candidates = mask_groups(build, choice, logits, attributes, best=2)
    _, experts = build.ops("TopK", [candidates, build.ints(attributes["top_k"])], 2, axis=-1)
    weights = op("GatherElements", [scores, experts], axis=1)
    if attributes["norm_topk_prob"]:
        total = op("ReduceSum", [weights, build.ints(1)], keepdims=1)
        weights = op("Div", [weights, op("Add", [total, build.constant("gate.tiny", np.array(1e-20, np.float32))])])
    return experts, scale_weights(build, pass_on_nan(build, weights, choice), attributes)
