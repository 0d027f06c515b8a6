"""`moedge.Experts` as torch custom ops: each expert runs over the tokens that chose it, forward and backward.

T = tokens, E = experts, k = experts per token, H = hidden size, I = intermediate size. Rows of gate_up alternate
between gate and up, as in the canonical graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


@torch.library.custom_op("moedge::experts", mutates_args=())
def experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [T, H], experts int64 [T, k], weights [T, k], gate_up [E, 2I, H], down [E, H, I] -> y [T, H]."""
    _refuse(x, experts, weights, gate_up, down)
    y = torch.zeros_like(x)
    for expert, tokens, choices in _visit(experts, len(down)):
        gate, up = _split(x[tokens] @ gate_up[expert].T)
        outputs = (torch.nn.functional.silu(gate) * up) @ down[expert].T
        y.index_add_(0, tokens, outputs * weights[tokens, choices].to(x.dtype).unsqueeze(-1))
    return y


@torch.library.custom_op("moedge::experts_backward", mutates_args=())
def experts_backward(
    grad: Tensor, x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, gate_up and down; what the forward pass computed is computed again, not kept."""
    grad_x, grad_weights = torch.zeros_like(x), torch.zeros_like(weights)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert, tokens, choices in _visit(experts, len(down)):
        rows, grad_rows = x[tokens], grad[tokens]
        gate, up = _split(rows @ gate_up[expert].T)
        sigmoid = torch.sigmoid(gate)
        inner = gate * sigmoid * up
        grad_weights[tokens, choices] = (grad_rows * (inner @ down[expert].T)).sum(dim=-1).to(weights.dtype)
        grad_outputs = grad_rows * weights[tokens, choices].to(x.dtype).unsqueeze(-1)
        grad_down[expert] = grad_outputs.T @ inner
        grad_inner = grad_outputs @ down[expert]
        grad_gate = grad_inner * up * sigmoid * (1 + gate * (1 - sigmoid))
        grad_both = torch.stack([grad_gate, grad_inner * gate * sigmoid], dim=-1).flatten(1)
        grad_gate_up[expert] = grad_both.T @ rows
        grad_x.index_add_(0, tokens, grad_both @ gate_up[expert])
    return grad_x, grad_weights, grad_gate_up, grad_down


def _refuse(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Raises UsageError: the shapes do not fit each other."""
    tokens, hidden = x.shape[0], x.shape[-1]
    if experts.ndim != 2 or experts.shape != weights.shape or x.ndim != 2 or experts.shape[0] != tokens:
        shapes = f"x {[*x.shape]}, experts {[*experts.shape]}, weights {[*weights.shape]}"
        raise UsageError(f"moedge.Experts: {shapes} do not fit; use x [T, H], experts and weights [T, k]")
    if gate_up.shape != (down.shape[0], 2 * down.shape[2], hidden) or down.shape[1] != hidden:
        shapes = f"x {[*x.shape]}, gate_up {[*gate_up.shape]}, down {[*down.shape]}"
        raise UsageError(f"moedge.Experts: {shapes} do not fit; use x [T, H], gate_up [E, 2I, H] and down [E, H, I]")


def _visit(experts: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each chosen expert of `count` with the places (token, choice) that chose it.

    Raises:
        UsageError: there is no such expert.
    """
    for expert in sorted(set(experts.flatten().tolist())):
        if not 0 <= expert < count:
            raise UsageError(f"moedge.Experts: expert {expert} is chosen, and there are {count}: 0 to {count - 1}")
        tokens, choices = torch.where(experts == expert)
        yield expert, tokens, choices


def _split(both: Tensor) -> tuple[Tensor, Tensor]:
    return both[:, 0::2], both[:, 1::2]


def _context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_weights, grad_gate_up, grad_down = torch.ops.moedge.experts_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weights, grad_gate_up, grad_down


@experts.register_fake
def _(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    _refuse(x, experts, weights, gate_up, down)
    return torch.empty_like(x)


@experts_backward.register_fake
def _(
    grad: Tensor, x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weights), torch.empty_like(gate_up), torch.empty_like(down)


experts.register_autograd(_backward, setup_context=_context)
