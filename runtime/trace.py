"""`moedge trace`: which experts each token of a text took in each layer, with which weights, and how even the load is.

The CPU engine gives its routes as outputs that are always there: tracing reads them, generation does not, and what the
reading costs is measured and stated in the document (`overhead`).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle, Progress, staged_file
from ..errors import EngineError, ReportError, UsageError
from .engine import Engine, load
from .provenance import describe_run
from .sessions import Routing
from .tokens import StreamDecoder
from .trace_attention import AttentionMap, Choice, check_choice, read_maps
from .trace_load import Load, LoadCounter

SCHEMA = 1
SUFFIXES = (".html", ".json", ".png")
MAX_TOKENS = 2048
_OVERHEAD_RUNS = 3
_DIFFERENCES = 12


@dataclass(frozen=True)
class TracedText:
    """One text: its tokens, their routes [layers, tokens, k], each layer's load, attention by choice."""

    name: str
    total_tokens: int  # of the text; the first `len(ids)` were traced
    pieces: list[str]
    ids: list[int]
    routing: Routing
    loads: list[Load]
    attention: list[AttentionMap] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        attention = {"attention": [head.to_json() for head in self.attention]} if self.attention else {}
        return attention | {
            "name": self.name,
            "total_tokens": self.total_tokens,
            "tokens": [{"id": token, "text": piece} for token, piece in zip(self.ids, self.pieces, strict=True)],
            "experts": self.routing.experts.tolist(),
            "weights": [[[round(float(w), 6) for w in row] for row in layer] for layer in self.routing.weights],
            "load": [load_of.to_json() for load_of in self.loads],
        }


@dataclass(frozen=True)
class Trace:
    """Everything that is drawn or written: what the engine is (`described`), the texts, what tracing cost."""

    described: Mapping[str, Any]
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    texts: list[TracedText]
    overhead: Mapping[str, float]

    @property
    def comparison(self) -> dict[str, Any] | None:
        """How the loads of two texts differ; None for one text."""
        return compare_loads(self.texts[0].loads, self.texts[1].loads) if len(self.texts) == 2 else None

    def to_json(self) -> dict[str, Any]:
        """The document of `-o FILE.json`."""
        return {
            **self.described,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.top_k,
            "texts": [text.to_json() for text in self.texts],
            "comparison": self.comparison,
            "overhead": dict(self.overhead),
        }


def trace(
    bundle: str | os.PathLike[str] | Bundle,
    texts: Sequence[tuple[str, str]],
    profile: str | None = None,
    *,
    max_tokens: int = MAX_TOKENS,
    threads: int | None = None,
    attention: Choice | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Follow the routes of one or two texts, each (name, text), up to `max_tokens` tokens of each.

    A text longer than the context goes through in windows of the engine's room, each with an empty context.
    `attention`: layers, and heads of them, whose attention over the text's first tokens is looked at too.

    Raises:
        UsageError: no text, more than two, one without tokens, or a layer or head that is not there. EngineError: what
        `moedge.load` raises, or a model without experts. DependencyError: attention without onnx.
    """
    if not 1 <= len(texts) <= 2:
        raise UsageError(f"{len(texts)} texts to trace; give one, or two to compare")
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; at least 1 is needed")
    with load(bundle, profile, threads=threads) as engine:
        if not engine.info.moe_layers:
            raise EngineError(f"{engine.bundle.path} has no mixture-of-experts layers: there are no routes to trace")
        check_choice(engine, attention or {})
        traced = [_trace_text(engine, name, text, max_tokens, attention or {}, progress) for name, text in texts]
        return Trace(
            described=describe_run(engine, "trace", SCHEMA),
            layers=tuple(engine.info.moe_layers),
            num_experts=engine.info.num_experts,
            top_k=engine.info.num_experts_per_tok,
            texts=traced,
            overhead=_overhead(engine, traced[0].ids),
        )


def write_trace(traced: Trace, path: str | os.PathLike[str]) -> None:
    """Write the trace as `path`'s suffix says (.html, .json, .png); a failure leaves nothing behind.

    Raises:
        ReportError: another suffix, or the place cannot be written. DependencyError: a PNG without matplotlib.
    """
    target = check_suffix(path)
    suffix = target.suffix.lower()
    if suffix == ".html":
        from .trace_html import render_html

        content = render_html(traced).encode()
    elif suffix == ".png":
        from .trace_png import render_png

        content = render_png(traced)
    else:
        content = (json.dumps(traced.to_json(), ensure_ascii=False, allow_nan=False) + "\n").encode()
    with staged_file(target, error=ReportError) as staged:
        staged.write_bytes(content)


def check_suffix(path: str | os.PathLike[str]) -> Path:
    """Raises ReportError where `path` has no suffix that can be written."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise ReportError(f"{target}: the trace's format is its suffix; known: {', '.join(SUFFIXES)}")
    return target


def compare_loads(first: Sequence[Load], second: Sequence[Load]) -> dict[str, Any]:
    """Per layer the total variation distance and the Jensen-Shannon divergence (bits) of the shares, both 0 to 1; and
    the experts whose share differs most."""
    layers: list[dict[str, Any]] = []
    differences: list[dict[str, Any]] = []
    for a, b in zip(first, second, strict=True):
        one, two = a.share, b.share
        middle = (one + two) / 2
        divergence = (_bits(one, middle) + _bits(two, middle)) / 2
        layers.append(
            {
                "layer": a.layer,
                "total_variation": float(np.abs(one - two).sum() / 2),
                "jensen_shannon_bits": divergence,
            }
        )
        differences += [
            {"layer": a.layer, "expert": expert, "shares": [float(one[expert]), float(two[expert])]}
            for expert in range(len(one))
        ]
    differences.sort(key=lambda row: -abs(row["shares"][0] - row["shares"][1]))
    mean = sum(row["total_variation"] for row in layers) / len(layers)
    return {"mean_total_variation": mean, "layers": layers, "largest": differences[:_DIFFERENCES]}


def _bits(share: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence in bits, where `other` is nowhere zero that `share` is not."""
    some = share > 0
    return max(0.0, float((share[some] * np.log2(share[some] / other[some])).sum()))


def _trace_text(
    engine: Engine, name: str, text: str, max_tokens: int, attention: Choice, progress: Progress | None
) -> TracedText:
    ids = engine.tokenize(text)
    if not ids:
        raise UsageError(f"{name}: the text has no tokens; give a longer one")
    kept = ids[:max_tokens]
    room = engine.session.capacity
    parts = []
    for start in range(0, len(kept), room):
        if progress is not None:
            progress(f"following the routes of {name}", start, len(kept))
        parts.append(engine.routing(kept[start : start + room]))
    if progress is not None:
        progress(f"following the routes of {name}", len(kept), len(kept))
    routing = Routing(
        np.concatenate([part.experts for part in parts], axis=1),
        np.concatenate([part.weights for part in parts], axis=1),
    )
    counter = LoadCounter(engine.info.moe_layers, engine.info.num_experts)
    counter.add(routing)
    maps = read_maps(engine, kept, attention) if attention else []
    return TracedText(name, len(ids), _pieces(engine, kept), kept, routing, counter.loads(), maps)


def _pieces(engine: Engine, ids: list[int]) -> list[str]:
    """Each token's own text; empty where it is a part of a character that a later token completes, or special."""
    decoder = StreamDecoder(engine.tokenizer)
    pieces = [decoder.push(token) for token in ids]
    pieces[-1] += decoder.finish()
    return pieces


def _overhead(engine: Engine, ids: list[int]) -> dict[str, float]:
    """The best of a few times of a pass over the first window with and without reading the routes, in turns."""
    tokens = np.array(ids[: engine.session.capacity], np.int64)
    plain, traced = [], []
    for _ in range(_OVERHEAD_RUNS):
        began = time.perf_counter()
        engine.begin()
        engine.prefill(tokens)
        plain.append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.routing(tokens)
        traced.append(time.perf_counter() - began)
    return {"tokens": len(tokens), "plain_ms": 1e3 * min(plain), "traced_ms": 1e3 * min(traced)}
