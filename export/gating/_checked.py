"""Attributes that contradict each other are refused where an op is used: by the reference, the torch op, the schema."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ...errors import UsageError

FindFault = Callable[[dict[str, int | float], int], "str | None"]


def count_experts(attributes: dict[str, Any], width: int) -> int:
    """Experts that a gate of logits [T, width] chooses from: the logits of a binary code are of its bits."""
    if attributes.get("bits") != width:
        return width
    return 1 << min(width, 62)


def refuse_faults(op: str, find_fault: FindFault, attributes: dict[str, Any], width: int) -> None:
    """Raises UsageError: what contradicts itself, with both figures."""
    fault = find_fault(attributes, count_experts(attributes, width))
    if fault:
        raise UsageError(f"moedge.{op}: {fault}")


def checked(op: str, find_fault: FindFault) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A gate's reference that refuses contradicting attributes before it computes."""

    def decorate(reference: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(reference)
        def refusing(logits: Any, *inputs: Any, **attributes: Any) -> Any:
            refuse_faults(op, find_fault, attributes, logits.shape[-1])
            return reference(logits, *inputs, **attributes)

        return refusing

    return decorate
