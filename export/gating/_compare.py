"""Are these the choices that a gate gives for these logits? Told apart: a fault, and a tie that rounding decides.

Scores that lie closer than rounding may change places rightly. So where experts differ, the logits of those that were
chosen are raised by `slack` of the token's largest logit and the logits of those that were left out lowered by as much:
if the reference now chooses them too, the gap between their scores was smaller than that, and the token is a near tie.
(The logits, not the scores, are moved: a group's score, or a bias, then counts as the gate itself has it.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import list_gates

SLACK = 1e-5  # what exponentials of two libraries differ by, and more
Reference = Callable[..., Any]  # as a gate's: logits, further inputs, attributes -> experts, weights, ...
TOLERANCE = 1e-4  # of a weight, relative where the largest is above 1


@dataclass
class Comparison:
    """`fault`: the first difference that is no near tie, at token `token`; `near_ties`: tokens that were let pass."""

    fault: str | None = None
    token: int | None = None
    near_ties: list[int] = field(default_factory=list)
    gap: float = 0.0  # the widest between logits in dispute among the near ties, of the token's largest logit


def compare_choices(
    gate: str | Reference,
    inputs: Sequence[Any],
    attributes: Mapping[str, Any],
    experts: Any,
    weights: Any,
    *,
    slack: float = SLACK,
    tolerance: float = TOLERANCE,
    whose: str = "its",
) -> Comparison:
    """Compare experts int64 [T, k] and weights float32 [T, k] with a gate's reference on `inputs`, logits first.

    `gate`: an op's name, or a reference by rows, whose inputs of two axes have a row for each token as the logits have.
    The order of a token's choices means nothing. NaN equals NaN.
    """
    reference: Reference = list_gates()[gate].reference if isinstance(gate, str) else gate
    result = Comparison()
    found, found_weights = by_expert(experts, weights)
    expected, expected_weights = by_expert(*reference(*inputs, **attributes)[:2])
    unlike = (found != expected).any(axis=1)
    bound = tolerance * np.maximum(1, np.abs(expected_weights).max(axis=1, keepdims=True))
    off = ~(np.abs(found_weights - expected_weights) <= bound) & ~(np.isnan(found_weights) & np.isnan(expected_weights))
    for token in np.flatnonzero(unlike | off.any(axis=1)).tolist():
        if unlike[token]:
            if _is_near_tie(reference, inputs, attributes, token, found[token], expected[token], slack):
                result.near_ties.append(token)
                result.gap = max(result.gap, _gap(inputs[0][token], found[token], expected[token]))
                continue
            text = f"chose experts {_listed(found[token])} where {whose} logits give {_listed(expected[token])}"
        else:
            place = int(off[token].argmax())
            mine, theirs = found_weights[token, place], expected_weights[token, place]
            text = f"weighs expert {found[token, place]} by {mine:.4g} where {whose} logits give {theirs:.4g}"
        result.token = token
        result.fault = text + _guess(reference, inputs, attributes, found, found_weights)
        break
    return result


def by_expert(experts: Any, weights: Any) -> tuple[Any, Any]:
    """Each token's choices sorted by expert."""
    order = np.argsort(experts, axis=-1, kind="stable")
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


def _is_near_tie(
    reference: Reference,
    inputs: Sequence[Any],
    attributes: Mapping[str, Any],
    token: int,
    found: Any,
    expected: Any,
    slack: float,
) -> bool:
    logits = inputs[0][token : token + 1].astype(np.float32)
    if len(set(found.tolist())) < len(found) or not np.isfinite(logits).all():
        return False  # an expert taken twice is no rounding
    towards = _direction(logits.shape[1], attributes, np.setdiff1d(found, expected), np.setdiff1d(expected, found))
    moved = logits + np.float32(slack) * np.abs(logits).max() * towards
    others = [each[token : token + 1] if each.ndim == 2 else each for each in inputs[1:]]
    chosen = reference(moved.astype(np.float32), *others, **attributes)[0]
    return bool((np.sort(chosen[0]) == found).all())


def _direction(width: int, attributes: Mapping[str, Any], taken: Any, left: Any) -> Any:
    """float32 [width]: 1 for the logits that speak for the experts taken, -1 for those of the experts left out."""
    towards = np.zeros(width, np.float32)
    if "bits" in attributes:
        for experts, sign in ((taken, 1), (left, -1)):
            codes = 2 * ((experts[:, None] >> np.arange(width)) & 1) - 1
            towards += sign * codes.mean(axis=0, dtype=np.float32)
        return np.sign(towards)
    inside = taken[taken < width]  # a fault may name an expert that is not there
    towards[inside], towards[left] = 1, -1
    return towards


def _gap(logits: Any, found: Any, expected: Any) -> float:
    taken, left = np.setdiff1d(found, expected), np.setdiff1d(expected, found)
    if max(taken.max(), left.max()) >= len(logits):
        return 0.0  # logits of bits
    return float(np.abs(logits[taken].mean() - logits[left].mean()) / max(np.abs(logits).max(), 1e-30))


def _guess(
    reference: Reference, inputs: Sequence[Any], attributes: Mapping[str, Any], experts: Any, weights: Any
) -> str:
    """What would explain every token's choices, if one of the faults that are known from other exporters does."""
    for what, other_inputs, changes in _known_faults(inputs, attributes):
        given, given_weights = by_expert(*reference(*other_inputs, **{**attributes, **changes})[:2])
        if given.shape == experts.shape and (given == experts).all():
            if np.allclose(given_weights, weights, rtol=1e-3, atol=1e-4):
                return f", as if {what}"
    return ""


def _known_faults(
    inputs: Sequence[Any], attributes: Mapping[str, Any]
) -> Iterator[tuple[str, Sequence[Any], dict[str, Any]]]:
    if len(inputs) > 1 and inputs[1].ndim == 1:
        yield "the correction bias were lost", [inputs[0], 0 * inputs[1], *inputs[2:]], {}
    if "norm_topk_prob" in attributes:
        norm = int(attributes["norm_topk_prob"])
        yield f"the weights were {'not ' if norm else ''}divided by their sum", inputs, {"norm_topk_prob": 1 - norm}
    if attributes.get("topk_group") != attributes.get("n_group"):
        yield "the choice were not limited to the best groups", inputs, {"topk_group": attributes["n_group"]}
    if attributes.get("routed_scaling_factor", 1) != 1:
        yield "the weights were not scaled", inputs, {"routed_scaling_factor": 1.0}
    if attributes.get("penalty"):
        yield "the load were not counted", inputs, {"penalty": 0.0}
    if "capacity_factor" in attributes:
        yield "the capacity were not kept", inputs, {"capacity_factor": np.inf}


def _listed(experts: Any) -> str:
    return ", ".join(str(expert) for expert in experts.tolist())
