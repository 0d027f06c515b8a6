"""Optimizer, losses, training loop and held-out evaluation for `distill.py`."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from distill_model import Decoder
from torch import Tensor

Stream = np.ndarray[Any, np.dtype[np.int64]]
CONTEXT, STRIDE = 512, 256  # evaluation: every token is scored once, with 256 to 511 tokens before it where they exist


@dataclass(frozen=True)
class Plan:
    """How one model is trained."""

    steps: int
    batch_tokens: int = 4096
    short: int = 256  # sequence length of most steps
    long: int = 2048  # and of every sixteenth, so that positions up to the model's maximum are trained
    long_every: int = 16
    warmup: int = 30
    cooldown_share: float = 0.6
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    gate_rate: float = 3e-4  # slower than the bias that balances the gate's choices
    decay: float = 0.02
    balance_speed: float = 0.004
    temperature: float = 3.0
    soft_share: float = 0.5

    def length_at(self, step: int) -> int:
        return self.long if step % self.long_every == self.long_every - 1 else self.short

    def rate_at(self, step: int) -> float:
        """Warm up, hold, then fall linearly to zero."""
        left = (self.steps - step) / max(1.0, self.steps * self.cooldown_share)
        return min(1.0, (step + 1) / self.warmup, left)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized (Newton-Schulz), in batches of equally shaped matrices."""

    def __init__(
        self, params: list[Tensor], lr: float, dtype: torch.dtype, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    def orthogonalize(self, g: Tensor) -> Tensor:  # [M, rows, columns]
        tall = g.shape[1] > g.shape[2]
        x = g.transpose(1, 2) if tall else g
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(self.dtype).contiguous()
        for _ in range(5):
            a = torch.bmm(x, x.transpose(1, 2))
            b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, b, x, beta=3.4445)
        return (x.transpose(1, 2) if tall else x).float()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                updates = []
                for p in params:
                    velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                    velocity.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(velocity, group["momentum"]))  # Nesterov
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, self.orthogonalize(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


class Optimizers:
    """Muon for the inner matrices; AdamW for embeddings, head, gates and norms."""

    def __init__(self, model: Decoder, plan: Plan, dtype: torch.dtype) -> None:
        inner: list[Tensor] = []
        outer: list[Tensor] = []
        for name, p in model.named_parameters():
            adam = p.dim() < 2 or any(part in name for part in ("embed_tokens", "lm_head"))
            if not name.endswith("mlp.gate.weight"):
                (outer if adam else inner).append(p)
        gates: list[Tensor] = [gate.weight for gate in model.gates().values()]
        self.clipped = outer + gates
        self.all: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(inner, plan.muon_rate, dtype, weight_decay=plan.decay), plan.muon_rate),
            (self.adam(outer, plan.adam_rate), plan.adam_rate),
        ]
        if gates:
            self.all.append((self.adam(gates, plan.gate_rate), plan.gate_rate))

    @staticmethod
    def adam(params: list[Tensor], rate: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, factor: float) -> None:
        torch.nn.utils.clip_grad_norm_(self.clipped, 1.0)
        for optimizer, rate in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer, _ in self.all]

    def load(self, states: list[dict[str, Any]]) -> None:
        for (optimizer, _), state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


class Batches:
    """Windows of the stream, shuffled anew every epoch; a batch depends on the step and the seed alone."""

    def __init__(self, stream: Stream, plan: Plan, seed: int) -> None:
        self.stream, self.plan, self.seed = stream, plan, seed
        self.orders: dict[int, tuple[int, Stream]] = {}  # length: (epoch, starts)

    def window(self, length: int, number: int) -> Stream:
        count = (len(self.stream) - 1) // length - 1
        epoch, place = divmod(number, count)
        if self.orders.get(length, (-1,))[0] != epoch:
            rng = np.random.default_rng([self.seed, length, epoch])
            self.orders[length] = (epoch, rng.permutation(count) * length + rng.integers(length))
        start = self.orders[length][1][place]
        return self.stream[start : start + length + 1]

    def at(self, step: int) -> Tensor:  # [B, S+1]
        length = self.plan.length_at(step)
        size = max(1, self.plan.batch_tokens // length)
        long_before = step // self.plan.long_every
        first = (long_before if length == self.plan.long else step - long_before) * size
        return torch.from_numpy(np.stack([self.window(length, first + i) for i in range(size)]))


def distillation_loss(student: Tensor, teacher: Tensor, targets: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """(hard and soft loss, hard loss alone), summed over tokens; the soft part is KL at temperature T, times T^2."""
    hard = F.cross_entropy(student, targets, reduction="sum")
    t = plan.temperature
    soft = F.kl_div(F.log_softmax(student / t, -1), F.log_softmax(teacher / t, -1), reduction="sum", log_target=True)
    return (1 - plan.soft_share) * hard + plan.soft_share * t * t * soft, hard


def faster_type(device: str) -> torch.dtype:
    """The type to multiply in: bfloat16, except on a CPU that only emulates it (measured, not guessed)."""
    if device != "cpu":
        return torch.bfloat16
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(1024, 512, dtype=dtype)
        times = []
        for _ in range(8):
            began = time.perf_counter()
            a @ a.T
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return min(seconds, key=lambda dtype: seconds[dtype])


def batch_loss(model: Decoder, teacher: Decoder | None, batch: Tensor, plan: Plan, dtype: torch.dtype) -> float:
    """Run one batch forward and backward; the hard loss in nats per token."""
    ids, targets = batch[:, :-1], batch[:, 1:].flatten()
    h = model.hidden(ids, dtype)
    with torch.no_grad():
        h_teacher = teacher.hidden(ids, dtype) if teacher else None
    leaf = h.detach().requires_grad_()
    total = torch.zeros((), device=batch.device)
    # The head in slices: logits of a whole batch would not fit any cache.
    for part in torch.arange(len(targets), device=batch.device).split(2048 if batch.device.type == "cpu" else 16384):
        logits = model.lm_head(leaf[part]).float()
        if teacher is not None and h_teacher is not None:
            with torch.no_grad():
                goal = teacher.lm_head(h_teacher[part]).float()
            loss, hard = distillation_loss(logits, goal, targets[part], plan)
        else:
            loss = hard = F.cross_entropy(logits, targets[part], reduction="sum")
        (loss / len(targets)).backward()  # type: ignore[no-untyped-call]
        total += hard.detach()
    h.backward(leaf.grad)
    return float(total) / len(targets)


def save_atomically(value: Any, path: Path) -> None:
    beside = path.with_suffix(".part")
    torch.save(value, beside)
    os.replace(beside, path)


@dataclass
class Trainer:
    """Trains one model by its plan, checkpointing into `work` under its name."""

    name: str
    model: Decoder
    plan: Plan
    stream: Stream
    seed: int
    work: Path
    dtype: torch.dtype
    teacher: Decoder | None = None
    say: Callable[[str], None] = print

    def run(self, resume: bool) -> dict[str, Any]:
        optimizers, batches = Optimizers(self.model, self.plan, self.dtype), Batches(self.stream, self.plan, self.seed)
        path = self.work / f"{self.name}.pt"
        state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": []}
        if resume and path.exists():
            saved = torch.load(path, map_location=next(self.model.parameters()).device, weights_only=True)
            self.model.load_state_dict(saved.pop("model"))
            optimizers.load(saved.pop("optimizers"))
            state = saved
            self.say(f"{self.name}: resumed at step {state['step']} of {self.plan.steps}")
        window: list[float] = []
        began = marked = time.monotonic()
        paid = state["seconds"]
        while state["step"] < self.plan.steps:
            window.append(self.advance(state["step"], optimizers, batches))
            state["step"] += 1
            state["seconds"] = paid + time.monotonic() - began
            if state["step"] % 20 == 0 or state["step"] == self.plan.steps:
                self.report(state, window, time.monotonic() - marked)
                window, marked = [], time.monotonic()
            if state["step"] % 100 == 0 or state["step"] == self.plan.steps:
                save_atomically({**state, "model": self.model.state_dict(), "optimizers": optimizers.state()}, path)
        return {"steps": self.plan.steps, "seconds": round(state["seconds"], 1), "loss_curve": state["curve"]}

    def advance(self, step: int, optimizers: Optimizers, batches: Batches) -> float:
        device = next(self.model.parameters()).device
        loss = batch_loss(self.model, self.teacher, batches.at(step).to(device), self.plan, self.dtype)
        if not math.isfinite(loss):
            raise SystemExit(
                f"{self.name}: the loss is {loss} at step {step}; lower the preset's muon_rate or adam_rate."
            )
        factor = self.plan.rate_at(step)
        optimizers.step(factor)
        for gate in self.model.gates().values():
            gate.rebalance(self.plan.balance_speed * factor)
        return loss

    def report(self, state: dict[str, Any], losses: list[float], seconds: float) -> None:
        done, loss, rate = state["step"], sum(losses) / len(losses), len(losses) / max(seconds, 1e-9)
        state["curve"].append([done, round(loss, 4)])
        self.say(
            f"{self.name}: step {done}/{self.plan.steps}  loss {loss:.4f}  "
            f"{rate * self.plan.batch_tokens:,.0f} tokens/s  ETA {(self.plan.steps - done) / rate / 60:.1f} min"
        )


def windows(count: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, first scored) over a stream of `count` tokens: each but the first is scored exactly once."""
    for start in range(0, max(1, count - STRIDE - 1), STRIDE):
        yield start, min(start + CONTEXT, count - 1), start + (STRIDE if start else 0)


def total_nats(logits_of: Callable[[Stream], Any], stream: Stream, unscored: int) -> float:
    """Nats to predict `stream[1:]`, leaving out targets equal to `unscored` (the end token, which spells no byte).

    `logits_of` maps [S] ids to [S, V] logits: any engine will do.
    """
    total = 0.0
    for start, stop, first in windows(len(stream)):
        logits = np.asarray(logits_of(stream[start:stop]), dtype=np.float64)[first - start :]
        targets = stream[first + 1 : stop + 1]
        peak = logits.max(-1)
        nll = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak - logits[np.arange(len(targets)), targets]
        total += float(nll[targets != unscored].sum())
    return total


def bits_per_byte(logits_of: Callable[[Stream], Any], stream: Stream, size: int, unscored: int = 0) -> float:
    return total_nats(logits_of, stream, unscored) / math.log(2) / size


@torch.no_grad()
def torch_logits(model: Decoder, dtype: torch.dtype = torch.float32) -> Callable[[Stream], Any]:
    """Logits of a decoder for `bits_per_byte`."""
    device = next(model.parameters()).device

    @torch.no_grad()
    def logits_of(ids: Stream) -> Any:
        return model(torch.from_numpy(ids)[None].to(device), dtype)[0].float().cpu().numpy()

    return logits_of


@torch.no_grad()
def utilization(model: Decoder, stream: Stream) -> list[dict[str, Any]]:
    """Per MoE layer: each expert's share of the assignments on held-out text, and how even they are."""
    logits_of = torch_logits(model)
    for gate in model.gates().values():
        gate.load.zero_()
    for start in range(0, len(stream) - 1, CONTEXT):
        logits_of(stream[start : start + CONTEXT])
    rows = []
    for index, gate in model.gates().items():
        share = gate.load / gate.load.sum()
        rows.append({
            "layer": index,
            "share": [round(float(s), 4) for s in share],
            "mean_over_max": round(float(share.mean() / share.max()), 4),
        })  # fmt: skip
        gate.load.zero_()
    return rows
