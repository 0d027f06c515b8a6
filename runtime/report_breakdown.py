"""Where the time of a decoding step goes: operations as `moedge bench --breakdown` measured them, or parts of the model
as a prediction has them; both as shares of their own sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .report import Row, number, percent

NOTE = (
    "Shares of one decoding step: operations by the profiler where measured, parts of the model where predicted. "
    "The profiler slows every operation a little."
)
_NAMED = 6


def parts_of(result: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(operation, share of the step) of a result, the longest first; empty where it has none."""
    breakdown = result.get("breakdown")
    rows = breakdown.get("decode") if isinstance(breakdown, Mapping) else result.get("per_op")
    found = []
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, Mapping) and isinstance(row.get("ms"), (int, float)) and row["ms"] > 0:
            found.append((str(row.get("op"))[:60], float(row["ms"])))
    total = sum(ms for _, ms in found)
    return sorted(((name, ms / total) for name, ms in found), key=lambda part: -part[1])


def render_html(rows: Sequence[Row]) -> str:
    """The body of the section: a bar for each row, cut into its parts, with the largest named; empty without any."""
    lines = []
    for row in rows:
        parts = parts_of(row.raw)
        if parts:
            named, rest = parts[:_NAMED], sum(share for _, share in parts[_NAMED:])
            told = [f"{name} {percent(share)}" for name, share in named] + ([f"others {percent(rest)}"] if rest else [])
            badge = f'<b class="badge {row.kind}">{row.kind}</b>'
            lines.append(
                f'<li class="{row.kind}"><span class="name">{escape(row.device)} {badge}</span>'
                f'<svg class="track" aria-hidden="true" height="28">{_bar(row.kind, named, rest)}</svg>'
                f'<span class="figure">{number(row.itl.p50)} ms</span><small>{escape(", ".join(told))}</small></li>'
            )
    return f'<ul class="chart parts">{"".join(lines)}</ul>' if lines else ""


def _bar(kind: str, named: Sequence[tuple[str, float]], rest: float) -> str:
    drawn, left = [], 0.0
    for index, share in enumerate([*(share for _, share in named), rest]):
        strength = 1 - 0.8 * index / _NAMED
        drawn.append(
            f'<rect x="{100 * left:.2f}%" y="5" width="{100 * share:.2f}%" height="18" opacity="{strength:.2f}"/>'
        )
        left += share
    return f'<g class="{kind} part">{"".join(drawn)}</g>'
