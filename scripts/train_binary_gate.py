"""Does a model learn as well behind `BinaryCodeGate` as behind a linear softmax router?

    python scripts/train_binary_gate.py [--steps 1000] [--seeds 0 1 2]

A small mixture of experts over bytes of Python's standard library is trained from the same weights on the same windows
in the same order, once with each gate of `moedge.export.torch_ops`; what is compared is the loss on held-out files. The
results go to a JSON file (--results), from which docs/binary-gate.md is made. One thread: a run repeats to the bit.

Both gates train by the same rules: gradients reach the router through the weights of the chosen experts alone, and
Switch's balance loss (arXiv:2101.03961, eq. 4) keeps the experts in use. For the binary gate the probabilities in it
are those of all codes: the logit of an expert is the sum of its bits' signed logits over two, whose softmax is the
product of the bits' probabilities.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import numpy as np
import torch
import torch.nn.functional as F

# The neighbour: a script's own folder is first on the path.
from distill_data import read_corpus
from torch import Tensor, nn

from moedge.export import torch_ops

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "binary-gate.md"
GATES = ("softmax", "binary")
VOCABULARY = 256  # bytes
CORPUS_SEED = 20261122
WARM_UP = 50
NO_SETTINGS = ("results", "page", "seeds", "gates", "processes")  # arguments on which no figure depends


class Attention(nn.Module):
    """Causal attention with a learned bias of each head by distance, up to the window."""

    def __init__(self, hidden: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.near = nn.Parameter(torch.zeros(heads, window))
        distance = torch.arange(window)[:, None] - torch.arange(window)
        self.register_buffer("distance", distance.clamp(min=0), persistent=False)
        self.register_buffer("ahead", torch.where(distance < 0, -torch.inf, 0.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, H]
        batch, length, hidden = x.shape
        shape = (batch, length, 3, self.heads, hidden // self.heads)
        q, k, v = self.qkv(x).view(shape).permute(2, 0, 3, 1, 4)
        distance, ahead = self.get_buffer("distance"), self.get_buffer("ahead")
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + self.near[:, distance] + ahead
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(batch, length, hidden))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention and a mixture; `load` and `balance` are of the last call."""

    def __init__(self, args: argparse.Namespace, scoring: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(args.hidden), nn.RMSNorm(args.hidden)
        self.attention = Attention(args.hidden, args.heads, args.window)
        self.gate = torch_ops.TopKGate(args.hidden, args.experts, args.top_k, scoring=scoring)  # type: ignore[arg-type]
        self.experts = torch_ops.Experts(args.experts, args.hidden, args.inner)
        bits = (args.experts - 1).bit_length()
        signs = 2 * ((torch.arange(args.experts)[:, None] >> torch.arange(bits)) & 1) - 1
        self.register_buffer("signs", signs.float() / 2, persistent=False)  # [E, bits]
        self.load = torch.zeros(args.experts)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        h = self.norm2(x)
        chosen, weights = self.gate(h)
        self.load = torch.bincount(chosen.flatten(), minlength=self.experts.gate_up.shape[0]).float()
        if self.training:
            logits = F.linear(h.flatten(0, 1), self.gate.weight)
            if self.gate.scoring == "binary":
                logits = logits @ self.get_buffer("signs").T
            mean = logits.softmax(dim=-1).mean(dim=0)
            self.balance = len(mean) * (self.load / self.load.sum() * mean).sum()
        return x + self.experts(h, chosen, weights)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, args: argparse.Namespace, scoring: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, args.hidden)
        self.blocks = nn.ModuleList(Block(args, scoring) for _ in range(args.layers))
        self.norm = nn.RMSNorm(args.hidden)
        self.head = nn.Linear(args.hidden, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # [B, S] -> [B, S, vocabulary]
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def initialize(model: Model, seed: int) -> None:
    """Every matrix from a seed of its own name: what both models have begins equal."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith("near"):
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        scale = 0.02 if name == "head.weight" else 1.0 if name == "embedding.weight" else parameter.shape[-1] ** -0.5
        if name.endswith(("down", "out.weight")):
            scale *= (2 * len(model.blocks)) ** -0.5
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def train(args: argparse.Namespace, scoring: str, seed: int) -> dict[str, Any]:
    """One model from the first step to the last; what the page says of it."""
    torch.set_num_threads(1)
    data, held = read_data(args)
    model = Model(args, scoring)
    initialize(model, seed)
    routers = [block.gate.weight for block in model.blocks]
    rest = [each for each in model.parameters() if all(each is not router for router in routers)]
    rate = args.binary_rate if scoring == "binary" else 1.0
    groups = [{"params": rest, "times": 1.0}, {"params": routers, "times": rate}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    balance = args.binary_balance if scoring == "binary" else args.balance
    draw = np.random.default_rng(seed)
    began = time.monotonic()
    for step in range(args.steps):
        share = min(1.0, (step + 1) / WARM_UP) * (0.05 + 0.95 * (1 + np.cos(np.pi * step / args.steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * share * group["times"]
        starts = draw.integers(0, len(data) - args.window - 1, args.batch)
        windows = torch.stack([data[start : start + args.window + 1] for start in starts]).long()
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        uneven = torch.stack([block.balance for block in model.blocks]).mean()
        (loss + balance * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == args.steps - 1:
            print(f"{scoring} seed {seed} step {step}: loss {loss.item():.4f}, balance {uneven.item():.3f}", flush=True)
    result = {"gate": scoring, "seed": seed, "seconds": round(time.monotonic() - began, 1), **measure(model, held)}
    print(json.dumps(result), flush=True)
    return result


@torch.no_grad()
def measure(model: Model, held: Tensor) -> dict[str, Any]:
    """Held-out loss in nats a byte, and how even the experts' load was on that text, as its mean over its maximum."""
    model.eval()
    total, load = 0.0, [torch.zeros_like(block.load) for block in model.blocks]
    for windows in held.split(16):
        logits = model(windows[:, :-1].long())
        total += F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].long().flatten(), reduction="sum").item()
        load = [sum_ + block.load for sum_, block in zip(load, model.blocks, strict=True)]
    count = held.shape[0] * (held.shape[1] - 1)
    return {
        "held_out_loss": total / count,
        "held_out_bytes": count,
        "utilization": min(float(each.mean() / each.max()) for each in load),
        "router_bytes": sum(block.gate.weight.numel() * 4 for block in model.blocks),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def read_data(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Bytes to learn from [n], and windows of held-out files [windows, window + 1]."""
    corpus = read_corpus(CORPUS_SEED)
    streams = [b"".join(text.encode() for _, text in files) for files in (corpus.train, corpus.held)]
    data, held = (torch.from_numpy(np.frombuffer(stream, np.uint8).copy()) for stream in streams)
    size = args.window + 1
    count = min(args.held_windows, len(held) // size)
    starts = np.linspace(0, len(held) - size, count).astype(int)
    return data, torch.stack([held[start : start + size] for start in starts])


def find_gaps(runs: list[dict[str, Any]]) -> dict[int, float]:
    """By seed: how much larger the binary gate's held-out loss is, as a share of the linear router's."""
    losses = {(run["gate"], run["seed"]): run["held_out_loss"] for run in runs}
    return {seed: losses["binary", seed] / losses["softmax", seed] - 1 for gate, seed in losses if gate == "binary"}


def make_page(document: dict[str, Any]) -> str:
    """docs/binary-gate.md."""
    settings, runs = document["settings"], document["runs"]
    gaps = find_gaps(runs)
    mean = statistics.mean(gaps.values())
    spread = [run["held_out_loss"] for run in runs if run["gate"] == "softmax"]
    first = {gate: next(run for run in runs if run["gate"] == gate) for gate in GATES}
    lines = [
        "# What a router of sign bits costs in quality",
        "",
        "Made by `scripts/train_binary_gate.py`: a mixture of experts over bytes of Python's standard library, trained",
        "from the same weights on the same windows, once with a linear softmax router (`moedge.SoftmaxTopKGate`) and",
        "once with `moedge.BinaryCodeGate`; losses are of files neither has seen, in nats a byte.",
        "",
        f"{settings['layers']} layers of {settings['experts']} experts, {settings['top_k']} for each token, hidden "
        f"size {settings['hidden']}, experts of {settings['inner']};",
        f"{settings['steps']:,} steps of {settings['batch'] * settings['window']:,} bytes; "
        f"{first['softmax']['parameters']:,} parameters. The linear routers are {first['softmax']['router_bytes']:,}",
        f"bytes, those of the binary gates {first['binary']['router_bytes']:,}.",
        "",
        "| seed | linear router | binary gate | gap | load, linear | load, binary |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for seed, gap in gaps.items():
        linear, binary = (next(r for r in runs if (r["gate"], r["seed"]) == (gate, seed)) for gate in GATES)
        losses = f"{linear['held_out_loss']:.4f} | {binary['held_out_loss']:.4f} | {100 * gap:+.2f}%"
        loads = f"{100 * linear['utilization']:.0f}% | {100 * binary['utilization']:.0f}%"
        lines.append(f"| {seed} | {losses} | {loads} |")
    words = "within the 2% aimed at" if mean <= 0.02 else "more than the 2% aimed at"
    lines += [
        "",
        f"The gap is {100 * mean:+.2f}% on average, {words}; the linear router's own losses lie "
        f"{100 * (max(spread) / min(spread) - 1):.2f}% apart between seeds.",
        "Load: the mean over the maximum of an expert's tokens on the held-out text, in the less even layer.",
        "",
        f"torch {document['torch']}, one thread; corpus: {document['corpus']}. To repeat:",
        "",
        "```",
        document["command"],
        "```",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 64, "heads": 4, "layers": 2, "experts": 32, "top-k": 4, "inner": 32}
    for name, value in {**sizes, "steps": 1000, "batch": 8, "window": 128, "held-windows": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's learning rate at its highest")
    parser.add_argument("--balance", type=float, default=0.01, help="of the balance loss, linear router")
    parser.add_argument("--binary-balance", type=float, default=0.003, help="of the balance loss, binary gate")
    parser.add_argument("--binary-rate", type=float, default=1.0, help="times the rate, for the binary gate's router")
    parser.add_argument("--processes", type=int, default=1, help="models trained at once, each by one thread")
    parser.add_argument("--results", type=Path, default=PAGE.with_suffix(".json"))
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args()
    jobs = [(args, gate, seed) for seed in args.seeds for gate in args.gates]
    with ProcessPoolExecutor(args.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        runs = list(pool.map(train, *zip(*jobs, strict=True)))
    settings = {name: value for name, value in vars(args).items() if name not in NO_SETTINGS}
    given = {action.dest: action.default for action in parser._actions}
    changed = [f"--{name.replace('_', '-')} {value}" for name, value in settings.items() if value != given[name]]
    document = {
        "settings": settings,
        "command": " ".join(["python scripts/train_binary_gate.py", *changed]),
        "torch": torch.__version__,
        "corpus": read_corpus(CORPUS_SEED).facts()["source"],
        "runs": runs,
    }
    if set(args.gates) == set(GATES):
        args.results.write_text(json.dumps(document, indent=1) + "\n")
        args.page.write_text(make_page(document))


if __name__ == "__main__":
    main()
