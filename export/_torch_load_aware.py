"""`torch.ops.moedge.load_aware_gate`: any gate's scores, chosen under a penalty for busy experts and a bound on each.

See export/gating/load_aware.py. T = tokens, E = experts, k = experts per token. Gradients reach the scores through the
weights; what is chosen by, and the load, have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ._torch_gates import _first_k, _grad_of_picked, refuse, weights_type
from .gating import load_aware

_LEAST, _MOST = -3e38, 3e38
State = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("moedge::load_aware_gate", mutates_args=())
def load_aware_gate(
    scores: Tensor,
    choice: Tensor,
    load: Tensor,
    top_k: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    penalty: float,
    capacity_factor: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """scores and choice float32 [T, E], load float32 [E] -> experts int64 [T, k], weights float32 [T, k], the load."""
    _refuse(scores, choice, load, top_k, penalty, capacity_factor, decay)
    tokens, count = scores.shape
    wide = load.to(weights_type(load))
    total = wide.sum()
    raw = choice.to(weights_type(choice)) - wide / torch.where(total > 0, total, 1.0) * count * penalty
    liking = raw.nan_to_num(nan=_LEAST).clamp(_LEAST, _MOST)
    capacity = load_aware.find_capacity(tokens, top_k, count, capacity_factor)
    experts = _first_k(liking, top_k)
    if experts.numel() and int(experts.flatten().bincount(minlength=count).max()) > capacity:
        before = torch.full_like(experts, -1)
        while not torch.equal(before, experts):
            before, experts = experts, _choose_behind(liking, experts, capacity, top_k)
    picked = scores.gather(1, experts).to(weights_type(scores))
    if norm_topk_prob:
        picked = picked / (picked.sum(dim=-1, keepdim=True) + 1e-20)
    ages = torch.arange(tokens - 1, -1, -1, device=scores.device, dtype=load.dtype)
    worth = (torch.tensor(decay, device=scores.device, dtype=load.dtype) ** ages).unsqueeze(1).expand(-1, top_k)
    new_load = (load * decay**tokens).index_add(0, experts.flatten(), worth.flatten())
    unknown = (raw.isnan() | scores.isnan()).any(dim=1, keepdim=True)
    return experts, (picked * routed_scaling_factor).masked_fill(unknown, torch.nan), new_load


def _refuse(
    scores: Tensor, choice: Tensor, load: Tensor, top_k: int, penalty: float, capacity_factor: float, decay: float
) -> None:
    bounds = {"penalty": penalty, "capacity_factor": capacity_factor, "decay": decay}
    refuse(load_aware.OP, scores, load, top_k=top_k, **bounds)
    if choice.shape != scores.shape:
        raise UsageError(f"moedge.{load_aware.OP}: scores {[*scores.shape]} and choice {[*choice.shape]} differ")


def _choose_behind(liking: Tensor, before: Tensor, capacity: int, top_k: int) -> Tensor:
    """Each token's experts [T, k], those of the tokens before it being as in `before` [T, k]."""
    taken = torch.zeros_like(liking, dtype=torch.int64).scatter_(1, before, 1)
    room = capacity - (taken.cumsum(0) - taken)
    to_go = torch.arange(len(liking), 0, -1, device=liking.device).unsqueeze(1)
    spare = room.minimum(to_go).clamp(min=0).sum(1, keepdim=True) - top_k * to_go
    wide = room >= to_go
    first = _first_k(liking.masked_fill(~wide, -torch.inf), top_k)
    due = torch.arange(top_k, device=liking.device) < wide.sum(1, keepdim=True) - spare
    must = torch.zeros_like(wide).scatter_(1, first, due)
    order = liking.masked_fill(room <= 0, -torch.inf).masked_fill(must, torch.inf)
    found = torch.zeros_like(wide).scatter_(1, _first_k(order, top_k), True)
    return _first_k(liking.masked_fill(~found, -torch.inf), top_k)


@load_aware_gate.register_fake
def _(
    scores: Tensor,
    choice: Tensor,
    load: Tensor,
    top_k: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
    penalty: float,
    capacity_factor: float,
    decay: float,
) -> State:
    _refuse(scores, choice, load, top_k, penalty, capacity_factor, decay)
    shape = (scores.shape[0], top_k)
    weights = scores.new_empty(shape, dtype=weights_type(scores))
    return scores.new_empty(shape, dtype=torch.int64), weights, torch.empty_like(load)


def _context(ctx: Any, inputs: tuple[Any, ...], output: State) -> None:
    scores, _, _, _, ctx.norm, ctx.factor, *_ = inputs
    ctx.save_for_backward(scores, *output[:2])


def _backward(ctx: Any, _: Tensor | None, grad: Tensor, __: Tensor | None) -> tuple[Tensor | None, ...]:
    scores, experts, weights = ctx.saved_tensors
    picked = scores.gather(1, experts).to(weights.dtype)
    grad_picked = _grad_of_picked(weights, grad, ctx.norm, ctx.factor, picked).to(scores.dtype)
    return (torch.zeros_like(scores).scatter(1, experts, grad_picked), *[None] * 8)


load_aware_gate.register_autograd(_backward, setup_context=_context)
