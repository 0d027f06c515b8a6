"""moedge's gates and experts for a model written in torch, which then exports with them (docs/torch.md).

    from moedge.export import torch_ops

    gate = torch_ops.TopKGate(hidden_size, num_experts, top_k)
    mlp = torch_ops.Experts(num_experts, hidden_size, intermediate_size)
    y = mlp(x, *gate(x))

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=torch_ops.translation_table())

T = tokens, E = experts, k = experts per token, H = hidden size, I = intermediate size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, Literal, cast

from ..errors import UsageError, missing_dependency, require

try:
    import torch
except ModuleNotFoundError as error:
    raise missing_dependency("torch", purpose="use moedge.export.torch_ops") from error
from torch import Tensor, nn

from . import _torch_experts, _torch_gates, _torch_load_aware  # noqa: F401  (these register torch.ops.moedge.*)
from .functions import DOMAIN, FUNCTIONS, VERSION
from .gating import binary_code, list_gates

__all__ = ["Experts", "TopKGate", "add_functions", "translation_table"]

Scoring = Literal["softmax", "sigmoid", "binary"]
_GATES = {"softmax": "SoftmaxTopKGate", "sigmoid": "SigmoidTopKGate", "binary": "BinaryCodeGate"}
_OPS = {
    "SoftmaxTopKGate": torch.ops.moedge.softmax_topk_gate,
    "SigmoidTopKGate": torch.ops.moedge.sigmoid_topk_gate,
    "BinaryCodeGate": torch.ops.moedge.binary_code_gate,
    "LoadAwareGate": torch.ops.moedge.load_aware_gate,
    "Experts": torch.ops.moedge.experts,
}
# The bodies of the ops that have a torch form use nothing newer than this; torch.onnx.export gives 20 by default.
_OLDEST_OPSET = 18


class TopKGate(nn.Module):
    """A linear router [outputs, H] and its gate: hidden states [..., H] -> (experts int64 [T, k], weights [T, k]).

    `scoring`: "softmax" over the experts, "sigmoid" of each with a correction `bias` [E] (a buffer: it takes part in
    the choice only and gets no gradient), or "binary": a router of log2(E) sign bits. Groups are for the first two.

    Raises:
        UsageError: the figures contradict each other.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Scoring = "softmax",
        n_group: int = 1,
        topk_group: int = 1,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if scoring not in _GATES:
            raise UsageError(f"TopKGate: unknown scoring {scoring!r}; use one of {', '.join(_GATES)}")
        _refuse_sizes("TopKGate", hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        if not math.isfinite(routed_scaling_factor):
            raise UsageError(f"TopKGate: routed_scaling_factor {routed_scaling_factor} is no finite number")
        self.scoring = scoring
        self.attributes: dict[str, Any] = {"top_k": top_k}
        if scoring == "binary":
            if (n_group, topk_group) != (1, 1):
                given = f"n_group {n_group}, topk_group {topk_group}"
                raise UsageError(f"TopKGate: {given}: binary codes have no groups; leave both at 1")
            self.attributes["bits"] = binary_code.count_bits(num_experts)
        else:
            self.attributes.update(n_group=n_group, topk_group=topk_group)
        self.attributes.update(norm_topk_prob=int(norm_topk_prob), routed_scaling_factor=float(routed_scaling_factor))
        _check(_GATES[scoring], self.attributes, num_experts)
        outputs = self.attributes.get("bits", num_experts)
        self.weight = nn.Parameter(torch.randn(outputs, hidden_size) / hidden_size**0.5)
        self.bias: Tensor | None
        self.register_buffer("bias", torch.zeros(num_experts) if scoring == "sigmoid" else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., H]; the router runs in float32 whatever the model runs in, as trained models expect."""
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]).float(), self.weight.float())
        inputs = [logits] if self.bias is None else [logits, self.bias.float()]
        op = _OPS[_GATES[self.scoring]]
        return cast("tuple[Tensor, Tensor]", op(*inputs, *self.attributes.values()))

    def extra_repr(self) -> str:
        return f"scoring={self.scoring}, " + ", ".join(f"{name}={value}" for name, value in self.attributes.items())


class Experts(nn.Module):
    """E experts silu(x gate^T) * (x up^T) down^T, of which each token runs those its gate chose.

    `gate_up` [E, 2I, H], its rows alternating between gate and up; `down` [E, H, I].

    Raises:
        UsageError: a size is no whole number of at least 1.
    """

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        _refuse_sizes("Experts", **sizes)
        gate_up = torch.randn(num_experts, 2 * intermediate_size, hidden_size)
        self.gate_up = nn.Parameter(gate_up / hidden_size**0.5)
        self.down = nn.Parameter(torch.randn(num_experts, hidden_size, intermediate_size) / intermediate_size**0.5)

    @classmethod
    def from_projections(cls, gate: Tensor, up: Tensor, down: Tensor) -> Experts:
        """From the experts' matrices as they mostly stand apart: gate and up [E, I, H], down [E, H, I].

        Raises:
            UsageError: their shapes do not fit each other.
        """
        count, inner, hidden = gate.shape
        if up.shape != gate.shape or down.shape != (count, hidden, inner):
            shapes = f"gate {[*gate.shape]}, up {[*up.shape]}, down {[*down.shape]}"
            raise UsageError(f"Experts: {shapes} do not fit; use gate and up [E, I, H] and down [E, H, I]")
        made = cls(count, hidden, inner)
        made.gate_up = nn.Parameter(torch.stack([gate, up], dim=2).flatten(1, 2).detach().clone())
        made.down = nn.Parameter(down.detach().clone())
        return made

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [..., H], experts int64 [T, k] and weights [T, k] with T the product of x's leading axes -> [..., H]."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.moedge.experts(rows, experts, weights, self.gate_up, self.down)
        return cast("Tensor", y.reshape(x.shape))


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export(..., custom_translation_table=...)` needs to write moedge's ops as moedge's functions.

    With `optimize=False` call `add_functions` on the exported program as well.

    Raises:
        DependencyError: onnxscript, by which torch exports, is not installed.
    """
    require("onnxscript", "torch", "export a torch model")
    from .gating._schemas import register_schemas

    register_schemas()
    _add_functions_after_optimization()
    return {packet.default: _translate(op) for op, packet in _OPS.items()}


def add_functions(program: torch.onnx.ONNXProgram) -> None:
    """Put the body of every moedge function that the program calls into it, so that any runtime can run it."""
    import onnx_ir as ir

    from .graph import load_functions

    model = program.model
    called = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN}
    opset = model.opset_imports[""]
    if called and opset < _OLDEST_OPSET:
        raise UsageError(f"opset {opset} is older than moedge's functions; use opset_version={_OLDEST_OPSET} or later")
    for function in load_functions(called & {*FUNCTIONS, *list_gates()}):
        function.opset_imports[""] = opset
        model.functions[function.identifier()] = function
    if called:
        model.opset_imports[DOMAIN] = VERSION


def _add_functions_after_optimization() -> None:
    """torch inlines every function that a translation brings and offers no exception, so they are added after that."""
    original = torch.onnx.ONNXProgram.optimize
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def optimize(program: torch.onnx.ONNXProgram) -> None:
        original(program)
        add_functions(program)

    setattr(torch.onnx.ONNXProgram, "optimize", optimize)  # noqa: B010  (mypy allows no assignment to a method)


def _translate(op: str) -> Callable[..., Any]:
    """The function that records a call of moedge's `op` where torch's has been traced."""
    from onnxscript.values import Opset

    call = getattr(Opset(DOMAIN, VERSION), op)
    arguments = _OPS[op].default._schema.arguments
    attributes = {each.name: {"int": int, "float": float}.get(str(each.type)) for each in arguments}
    inputs = sum(kind is None for kind in attributes.values())

    def translated(*values: Any, **named: Any) -> Any:
        named = {**dict(zip(attributes, values, strict=False)), **named}
        tensors = [named.pop(name) for name in list(attributes)[:inputs]]
        return call(*tensors, **named)

    # torch tells inputs from attributes by the signature's annotations.
    translated.__annotations__ = {name: kind for name, kind in attributes.items() if kind is not None}
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in attributes]
    translated.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return translated


def _refuse_sizes(module: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        # The gates say themselves what is wrong with a top_k of 0.
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and name != "top_k"):
            raise UsageError(f"{module}: {name} {size!r} is no whole number of at least 1")


def _check(op: str, attributes: dict[str, Any], num_experts: int) -> None:
    fault = list_gates()[op].find_fault(attributes, num_experts)
    if fault:
        raise UsageError(f"TopKGate: {fault}")
