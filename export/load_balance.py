"""A family's own gate made load-aware: its scores, chosen by `moedge.LoadAwareGate` (`moedge export --load-aware`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..errors import CheckpointError
from .config import GateConfig, MoEConfig
from .gating import ScoringGate, list_gates, load_aware
from .options import LoadAware

Array = np.ndarray[Any, Any]

# A sequence begins as if so many tokens had been spread evenly: else its first few would be ruled by each other's luck.
START_TOKENS = 128


def make_load_aware(config: MoEConfig, settings: LoadAware) -> MoEConfig:
    """`config` with a LoadAwareGate over its own gate.

    Raises:
        CheckpointError: the gate has no scores to choose by, or the settings contradict the model, with both figures.
    """
    base, moe = config.moe.gate, config.moe
    scale = find_scores(base).largest_score(base.attributes)
    attributes: dict[str, int | float] = {
        "top_k": base.attributes["top_k"],
        "norm_topk_prob": base.attributes["norm_topk_prob"],
        "routed_scaling_factor": base.attributes["routed_scaling_factor"],
        **{name: float(value) for name, value in dataclasses.asdict(settings).items()},
    }
    attributes["penalty"] *= scale
    fault = load_aware.find_fault(attributes, moe.num_experts)
    if fault:
        raise CheckpointError(f"load-aware gate: {fault}; mend --load-penalty, --load-capacity or --load-decay")
    gate = GateConfig(op=load_aware.OP, attributes=attributes, bias=base.bias, base=base)
    return dataclasses.replace(config, moe=dataclasses.replace(moe, gate=gate))


def find_scores(base: GateConfig) -> ScoringGate:
    """The gate's module, which gives scores.

    Raises:
        CheckpointError: it gives none; lists those that do.
    """
    gates: dict[str, Any] = dict(list_gates())
    if not hasattr(gates[base.op], "score"):
        known = ", ".join(sorted(op for op, gate in gates.items() if hasattr(gate, "score")))
        raise CheckpointError(
            f"{base.op} cannot be load-aware: its weights depend on the order of its choices; gates that can: {known}; "
            "leave --load-aware out"
        )
    gate: ScoringGate = gates[base.op]
    return gate


def start_load(config: MoEConfig) -> float:
    """Each expert's load before a sequence's first token."""
    return START_TOKENS * config.moe.num_experts_per_tok / config.moe.num_experts


def choose(gate: GateConfig, logits: Array, inputs: list[Array]) -> tuple[Array, Array]:
    """numpy: experts int64 and weights float32 [T, k] that a call at a sequence's start gives for logits [T, n].

    The load is then even, whatever its size.
    """
    if gate.base is None:
        experts, weights = list_gates()[gate.op].reference(logits, *inputs, **gate.attributes)
        return experts, weights
    scores, choice = find_scores(gate.base).score_reference(logits, *inputs, **gate.base.attributes)
    even = np.ones(scores.shape[1], np.float32)
    attributes: dict[str, Any] = gate.attributes
    experts, weights, _ = load_aware.reference(scores, choice, even, **attributes)
    return experts, weights
