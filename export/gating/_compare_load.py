"""Are these the choices of a load-aware gate? Each token is judged by itself, behind the choices made before it.

T = tokens, E = experts, k = experts per token. What a token is left with, the load before its call and the room in it,
follows from the choices of the tokens before; judged so, one wrong choice, or a near tie, is no fault of those behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import list_gates, load_aware


def follow_load(experts: Any, calls: Sequence[int], start: Any, attributes: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What each token of some calls, one behind the other, found: the load over the mean load before its call float32
    [T, E], room for each expert int64 [T, E], and the tokens of its call to go, itself included, int64 [T, 1].

    experts int64 [T, k]; `calls`: tokens of each; `start` float32 [E]: the load before the first.
    """
    tokens, count = len(experts), len(start)
    load = start.astype(np.float64)
    burden, room = np.zeros((tokens, count), np.float32), np.zeros((tokens, count), np.int64)
    to_go = np.concatenate([np.arange(length, 0, -1) for length in calls])[:, None]
    first = 0
    for length in calls:
        total = load.sum()
        before = (load.astype(np.float32) / np.float32(total if total > 0 else 1) * np.float32(count)).copy()
        left = load_aware.find_capacity(length, attributes["top_k"], count, attributes["capacity_factor"])
        taken = np.zeros(count, np.int64)
        for token in range(first, first + length):
            burden[token], room[token] = before, left - taken
            chosen = [expert for expert in set(experts[token].tolist()) if 0 <= expert < count]
            taken[chosen] += 1
            load *= attributes["decay"]
            load[chosen] += 1
        first += length
    return burden, room, to_go


def reference_behind(base_op: str) -> Callable[..., tuple[Any, Any]]:
    """A load-aware gate over `base_op` as a function of rows: logits float32 [T, n], the base gate's other inputs, then
    what `follow_load` gives; its attributes are those of both gates -> experts int64 [T, k], weights float32 [T, k].

    A capacity_factor of infinity is no capacity.
    """
    base: Any = list_gates()[base_op]

    def reference(logits: Any, *inputs: Any, **attributes: Any) -> tuple[Any, Any]:
        *own, burden, room, to_go = inputs
        scores, choice = base.score_reference(logits, *own, **attributes)
        raw = choice - burden * np.float32(attributes["penalty"])
        liking = np.clip(np.where(np.isnan(raw), np.float32(-3e38), raw), np.float32(-3e38), np.float32(3e38))
        if attributes["capacity_factor"] == np.inf:
            room = np.full_like(room, len(room[0]) * to_go.max())
        rows = zip(liking, room, to_go[:, 0], strict=True)
        experts = np.stack([load_aware.choose(*row, attributes["top_k"]) for row in rows])
        weights = load_aware.weigh(scores, experts, attributes)
        weights[np.isnan(raw).any(axis=1) | np.isnan(scores).any(axis=1)] = np.nan
        return experts, weights

    return reference
