"""The gates as torch custom ops `torch.ops.moedge.*`: fake tensors for tracing, gradients through the weights.

T = tokens, E = experts, k = experts per token. Each takes float32 logits and gives (experts int64 [T, k], weights
float32 [T, k]); half precision is computed in float32, float64 stays what it is. Experts have no gradient, nor has a
correction bias: that is trained by other means (arXiv:2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from .gating import find_gates
from .gating._checked import refuse_faults
from .gating._flips import list_flips

Choice = tuple[Tensor, Tensor]


def refuse(op: str, logits: Tensor, *vectors: Tensor, **attributes: float) -> None:
    """Raises UsageError: the attributes contradict each other or the shapes; `vectors` have a number for each logit."""
    if logits.ndim != 2:
        raise UsageError(f"moedge.{op}: logits of {logits.ndim} axes; flatten them to 2: [tokens, experts]")
    for vector in vectors:
        if vector.shape != logits.shape[1:]:
            raise UsageError(f"moedge.{op}: {[*vector.shape]} is not a number for each of {logits.shape[1]} experts")
    refuse_faults(op, find_gates()[op].find_fault, attributes, logits.shape[1])


def weights_type(scores: Tensor) -> torch.dtype:
    """What a gate computes in and gives its weights in."""
    return torch.promote_types(scores.dtype, torch.float32)


def _first_k(scores: Tensor, top_k: int) -> Tensor:
    """Places of the k largest of each row; by a stable sort, for ties go to the lower index (topk promises nothing)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def _keep_best_groups(choice: Tensor, n_group: int, topk_group: int, best: int) -> Tensor:
    """choice [T, E] with 0 outside the best groups, a group counting as the sum of its `best` largest."""
    if topk_group == n_group:
        return choice
    grouped = choice.view(len(choice), n_group, choice.shape[1] // n_group)
    group_scores = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, _first_k(group_scores, topk_group), True)
    return torch.where(kept.unsqueeze(-1), grouped, grouped.new_zeros(())).view_as(choice)


def _fault_of(scores: Tensor) -> Tensor:
    """[T, 1]: NaN for a token with a score of NaN, which the choice may have passed over; else 0."""
    return scores.sum(dim=1, keepdim=True) * 0


def _fake_choice(logits: Tensor, top_k: int) -> Choice:
    shape = (logits.shape[0], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=weights_type(logits))


@torch.library.custom_op("moedge::softmax_topk_gate", mutates_args=())
def softmax_topk_gate(
    logits: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """See export/gating/softmax_topk.py. logits float32 [T, E]."""
    refuse("SoftmaxTopKGate", logits, top_k=top_k, n_group=n_group, topk_group=topk_group)
    scores = torch.softmax(logits, dim=-1, dtype=weights_type(logits))
    candidates = _keep_best_groups(scores, n_group, topk_group, best=1)
    experts = _first_k(candidates, top_k)
    picked = candidates.gather(1, experts)
    if norm_topk_prob:
        picked = picked / picked.sum(dim=-1, keepdim=True)
    return experts, picked * routed_scaling_factor + _fault_of(scores)


@torch.library.custom_op("moedge::sigmoid_topk_gate", mutates_args=())
def sigmoid_topk_gate(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: int,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:
    """See export/gating/sigmoid_topk.py. logits float32 [T, E], bias float32 [E]."""
    refuse("SigmoidTopKGate", logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group)
    scores = torch.sigmoid(logits.to(weights_type(logits)))
    choice = scores + bias.to(scores.dtype)
    experts = _first_k(_keep_best_groups(choice, n_group, topk_group, best=2), top_k)
    picked = scores.gather(1, experts)
    if norm_topk_prob:
        picked = picked / (picked.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, picked * routed_scaling_factor + _fault_of(choice)


@torch.library.custom_op("moedge::binary_code_gate", mutates_args=())
def binary_code_gate(
    logits: Tensor, top_k: int, bits: int, norm_topk_prob: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """See export/gating/binary_code.py. logits float32 [T, bits]."""
    refuse("BinaryCodeGate", logits, top_k=top_k, bits=bits)
    finite = logits.double().nan_to_num(nan=0.0).clamp(-1e30, 1e30)
    powers = 1 << torch.arange(bits, device=logits.device)
    is_one = finite > 0
    costs, changes = finite.abs(), torch.where(is_one, -powers, powers)
    order = _order_by(costs, changes)
    flips = _flip_matrix(top_k, bits).to(logits.device)
    set_costs = costs.gather(1, order)[:, : len(flips)] @ flips
    # float64 holds every change of index exactly, and the product of whole numbers is made on every device.
    set_changes = (changes.gather(1, order)[:, : len(flips)].double() @ flips).long()
    chosen = _order_by(set_costs, set_changes)[:, :top_k]
    experts = (is_one * powers).sum(dim=1, keepdim=True) + set_changes.gather(1, chosen)
    gains = -set_costs.gather(1, chosen)
    if norm_topk_prob:
        weights = torch.softmax(gains, dim=1)
    else:
        weights = (gains + torch.nn.functional.logsigmoid(costs).sum(dim=1, keepdim=True)).exp()
    fault = (logits * 0).sum(dim=1, keepdim=True)
    return experts, weights.to(weights_type(logits)) * routed_scaling_factor + fault


def _order_by(first: Tensor, then: Tensor) -> Tensor:
    """Places of each row's entries by `first`, ties by `then`, rising."""
    order = then.argsort(dim=1, stable=True)
    return order.gather(1, first.gather(1, order).argsort(dim=1, stable=True))


def _flip_matrix(top_k: int, bits: int) -> Tensor:
    """float64 [ranks, sets]: 1 where the set has the flip of that rank."""
    sets = list_flips(top_k, bits)
    ranks = max(1, *(max(flips, default=0) for flips in sets), 1)
    return torch.tensor([[float(rank in flips) for flips in sets] for rank in range(1, ranks + 1)], dtype=torch.float64)


# gradients


def _grad_of_picked(weights: Tensor, grad: Tensor, norm: int, factor: float, picked: Tensor) -> Tensor:
    """Gradient of the picked scores, given that of weights = picked (over their sum, where `norm`) times factor."""
    grad = grad * factor
    if not norm or not factor:
        return grad
    shares = weights / factor
    return (grad - (grad * shares).sum(dim=-1, keepdim=True)) / picked.sum(dim=-1, keepdim=True)


def _softmax_context(ctx: Any, inputs: tuple[Any, ...], output: Choice) -> None:
    logits, ctx.top_k, _, _, ctx.norm, ctx.factor = inputs
    ctx.save_for_backward(logits, *output)


def _softmax_backward(ctx: Any, _: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, experts, weights = ctx.saved_tensors
    scores = torch.softmax(logits, dim=-1, dtype=weights.dtype)
    # A choice from outside the kept groups has weight 0 whatever its score is.
    picked = torch.where(weights != 0, scores.gather(1, experts), 0.0)
    grad_picked = torch.where(weights != 0, _grad_of_picked(weights, grad, ctx.norm, ctx.factor, picked), 0.0)
    grad_scores = torch.zeros_like(scores).scatter(1, experts, grad_picked)
    grad_logits = scores * (grad_scores - (grad_scores * scores).sum(dim=-1, keepdim=True))
    return grad_logits.to(logits.dtype), None, None, None, None, None


def _sigmoid_context(ctx: Any, inputs: tuple[Any, ...], output: Choice) -> None:
    logits, _, ctx.top_k, _, _, ctx.norm, ctx.factor = inputs
    ctx.save_for_backward(logits, *output)


def _sigmoid_backward(ctx: Any, _: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    logits, experts, weights = ctx.saved_tensors
    picked = torch.sigmoid(logits.gather(1, experts).to(weights.dtype))
    grad_picked = _grad_of_picked(weights, grad, ctx.norm, ctx.factor, picked)
    grad_chosen = (grad_picked * picked * (1 - picked)).to(logits.dtype)
    return torch.zeros_like(logits).scatter(1, experts, grad_chosen), None, None, None, None, None, None


def _binary_context(ctx: Any, inputs: tuple[Any, ...], output: Choice) -> None:
    logits, _, ctx.bits, ctx.norm, ctx.factor = inputs
    ctx.save_for_backward(logits, *output)


def _binary_backward(ctx: Any, _: Tensor | None, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The log of an expert's probability has the gradient bit - sigmoid(logit) by each logit."""
    logits, experts, weights = ctx.saved_tensors
    grad_logs = grad * weights
    if ctx.norm:
        grad_logs = grad_logs - weights / ctx.factor * grad_logs.sum(dim=-1, keepdim=True) if ctx.factor else grad_logs
    codes = (experts.unsqueeze(-1) >> torch.arange(ctx.bits, device=logits.device)) & 1
    likely = torch.sigmoid(logits.to(weights.dtype)).unsqueeze(1)
    return (grad_logs.unsqueeze(-1) * (codes - likely)).sum(dim=1).to(logits.dtype), None, None, None, None


def _register(op: Any, context: Callable[..., None], backward: Callable[..., Any], fake: Callable[..., Choice]) -> None:
    op.register_fake(fake)
    op.register_autograd(backward, setup_context=context)


def _fake_softmax(logits: Tensor, top_k: int, n_group: int, topk_group: int, *_: Any) -> Choice:
    refuse("SoftmaxTopKGate", logits, top_k=top_k, n_group=n_group, topk_group=topk_group)
    return _fake_choice(logits, top_k)


def _fake_sigmoid(logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, *_: Any) -> Choice:
    refuse("SigmoidTopKGate", logits, bias, top_k=top_k, n_group=n_group, topk_group=topk_group)
    return _fake_choice(logits, top_k)


def _fake_binary(logits: Tensor, top_k: int, bits: int, *_: Any) -> Choice:
    refuse("BinaryCodeGate", logits, top_k=top_k, bits=bits)
    return _fake_choice(logits, top_k)


_register(softmax_topk_gate, _softmax_context, _softmax_backward, _fake_softmax)
_register(sigmoid_topk_gate, _sigmoid_context, _sigmoid_backward, _fake_sigmoid)
_register(binary_code_gate, _binary_context, _binary_backward, _fake_binary)
