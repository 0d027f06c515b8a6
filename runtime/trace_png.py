"""The trace as one PNG picture, drawn by matplotlib: a heat map of layers by experts for each text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import require
from .trace import Trace, TracedText

_LOOKS_A_ROW = 6


def render_png(traced: Trace) -> bytes:
    """PNG bytes.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("matplotlib", purpose="draw the trace as a PNG")
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    layers, experts, texts = len(traced.layers), traced.num_experts, traced.texts
    height = min(14.0, 1.6 + len(texts) * (1.3 + 0.28 * layers))
    looks = -(-sum(len(text.attention) for text in texts) // _LOOKS_A_ROW) * 2.0
    whole = Figure(figsize=(11, height + looks), dpi=150, layout="constrained")
    figure: Any = whole
    below: Any = None
    if looks:
        halves: Any = whole.subfigures(2, 1, height_ratios=(height, looks))
        figure, below = halves
    told = f"{traced.top_k} of {experts} experts a token; colour: load over an even load"
    figure.suptitle(f"{_plain(str(traced.described['model']))} {traced.described['weights']}\n{told}", fontsize=11)
    top = max(2.0, *(float(row.share.max()) * experts for text in texts for row in text.loads))
    pairs = figure.subplots(len(texts), 2, squeeze=False, width_ratios=(4, 1), sharey="row")
    for (map_axes, bar_axes), text in zip(pairs, texts, strict=True):
        ratios = np.array([row.share * experts for row in text.loads])
        image = map_axes.imshow(
            ratios, aspect="auto", cmap="YlGnBu", norm=PowerNorm(0.5, 0.0, top), interpolation="nearest"
        )
        map_axes.set_title(f"{_plain(text.name)} ({len(text.ids):,} tokens)", fontsize=10, loc="left")
        every = max(1, layers // 16)
        map_axes.set_yticks(range(0, layers, every), [str(row.layer) for row in text.loads[::every]], fontsize=8)
        map_axes.xaxis.get_major_locator().set_params(integer=True)
        map_axes.set(xlabel="expert", ylabel="layer")
        figure.colorbar(image, ax=map_axes, pad=0.01, label="x even")
        bar_axes.barh(range(layers), [row.mean_over_max for row in text.loads], color="#0b7a6f", height=0.7)
        bar_axes.set(xlim=(0, 1), xlabel="mean / max load")
        bar_axes.spines[["top", "right"]].set_visible(False)
    if below is not None:
        _draw_attention(below, texts)
    out = io.BytesIO()
    whole.savefig(out, format="png")
    return out.getvalue()


def _draw_attention(figure: Any, texts: Sequence[TracedText]) -> None:
    """Every head asked for, side by side: rows are the tokens that look; colour grows with the square root."""
    several = len(texts) > 1
    named = [
        (f"{f'text {index}, ' if several else ''}layer {look.layer}, head {look.head}", look.weights)
        for index, text in enumerate(texts, start=1)
        for look in text.attention
    ]
    axes = figure.subplots(-(-len(named) // _LOOKS_A_ROW), _LOOKS_A_ROW, squeeze=False).reshape(-1)
    for each in axes:
        each.set_axis_off()
    for each, (title, weights) in zip(axes, named, strict=False):
        each.set_axis_on()
        each.imshow(np.sqrt(weights), cmap="YlGnBu", vmin=0, vmax=1, interpolation="nearest")
        each.set_title(title, fontsize=8)
        each.set(xticks=[], yticks=[])


def _plain(text: str) -> str:
    """matplotlib reads what lies between dollar signs as mathematics."""
    return text.replace("$", r"\$")
