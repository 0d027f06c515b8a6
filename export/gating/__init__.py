"""The gating ops of the moedge domain, one file each."""

from __future__ import annotations

import functools
import importlib.util
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from ...errors import CheckpointError

# A round: from a builder for its own nodes and the values carried to whether another follows, and the new values.
LoopBody = Callable[["GraphBuilder", Sequence[Any]], tuple[Any, list[Any]]]


class GraphBuilder(Protocol):
    """What a gate needs of a target to build itself from standard ops; values are the target's own."""

    def op(self, kind: str, inputs: Sequence[Any], **attributes: Any) -> Any:
        """A node of one output."""

    def ops(self, kind: str, inputs: Sequence[Any], outputs: int, **attributes: Any) -> list[Any]:
        """A node of several outputs."""

    def constant(self, name: str, array: Any) -> Any:
        """A constant, made once for a name."""

    def ints(self, *values: int) -> Any:
        """A constant int64 [n]."""

    def part_rows(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What a call of one token has of these, and what a call of more has: the other then has no rows. The first is
        an empty list where one form serves both."""

    def loop(self, most: Any, go: Any, carried: Sequence[Any], body: LoopBody) -> list[Any]:
        """What `carried` has become after rounds of `body`, as long as the last one said so (`go`, bool [], before the
        first), `most` (int64 []) of them."""


class Gate(Protocol):
    """What a gate's module offers."""

    OP: str
    ATTRIBUTES: tuple[str, ...]
    FUNCTION: str  # the body in standard ops, as ONNX text

    def find_fault(self, attributes: dict[str, int | float], num_experts: int) -> str | None:
        """What contradicts itself in the attributes, with both figures; None when nothing does."""

    def reference(self, logits: Any, *inputs: Any, **attributes: Any) -> tuple[Any, Any]:
        """numpy: (experts int64 [tokens, top_k], weights float32 [tokens, top_k])."""

    def lower(self, build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, ...]:
        """The values of experts and weights, in as few standard ops as the attributes need; behind them its state."""


class ScoringGate(Gate, Protocol):
    """A gate that chooses by a score of each expert, so that `LoadAwareGate` may choose in its place."""

    def score_reference(self, logits: Any, *inputs: Any, **attributes: Any) -> tuple[Any, Any]:
        """numpy: what weights come from and what is chosen by, each float32 [tokens, experts]."""

    def score(self, build: GraphBuilder, inputs: Sequence[Any], attributes: dict[str, Any]) -> tuple[Any, Any]:
        """`score_reference` in standard ops."""

    def largest_score(self, attributes: dict[str, int | float]) -> float:
        """What the scores of all chosen experts can reach: the measure of a penalty."""


def list_gates() -> dict[str, Gate]:
    """Every gate by the name of its op; onnx, where it is installed, has their schemas from then on."""
    _register_schemas()
    return dict(find_gates())


@functools.cache
def find_gates() -> dict[str, Gate]:
    """`list_gates` without onnx."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    gates = (importlib.import_module(f".{name}", __name__) for name in names)
    return {gate.OP: gate for gate in gates}


@functools.cache
def _register_schemas() -> None:
    if importlib.util.find_spec("onnx") is not None:
        importlib.import_module("._schemas", __name__).register_schemas()


def check_gate(op: str, attributes: dict[str, int | float], num_experts: int, *, where: str) -> None:
    """Refuse attributes that contradict each other.

    Raises:
        CheckpointError: says which two figures contradict.
    """
    fault = find_gates()[op].find_fault(attributes, num_experts)
    if fault:
        raise CheckpointError(f"{where}: {fault}; correct config.json")
