"""A scatter chart as inline SVG that stretches to any width: numbered dots whose legend is a table beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .report_html import Scale

_HEIGHT = 280


@dataclass(frozen=True)
class Point:
    """A dot: its number in the legend, its place (x as the scale has it, y from 0 at the top to 1), and its words."""

    index: int
    x: float
    y: float
    kind: str  # "measured" or "predicted"
    told: str


def scatter(points: Sequence[Point], across: Scale, side: tuple[str, str, str], under: str) -> str:
    """HTML of the chart; `side` are the texts at the top, middle and bottom of the axis to the left."""
    drawn = []
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = across.at(point.x), _HEIGHT * point.y
        # The dot is where it belongs; its number goes above those of its neighbours.
        near = sum(abs(x - other_x) < 7 and abs(y - other_y) < 30 for other_x, other_y in taken)
        taken.append((x, y))
        drawn.append(
            f'<g class="{point.kind}" role="img" aria-label="{escape(point.told)}"><circle cx="{x:.2f}%" '
            f'cy="{y:.1f}" r="6"/><text class="index" x="{x:.2f}%" y="{y - 11 - 15 * near:.1f}" '
            f'text-anchor="middle">{point.index}</text></g>'
        )
    grid = "".join(
        f'<line class="grid" x1="{across.at(tick):.2f}%" x2="{across.at(tick):.2f}%" y1="0" y2="{_HEIGHT}"/>'
        for tick in across.ticks
    )
    ticks = "".join(
        f'<text x="{across.at(tick):.2f}%" y="12" text-anchor="middle">{tick:,.10g}</text>' for tick in across.ticks
    )
    return (
        f'<figure class="scatter"><div class="side">{"".join(f"<span>{escape(text)}</span>" for text in side)}</div>'
        f'<svg height="{_HEIGHT}">{grid}{"".join(drawn)}</svg><div></div>'
        f'<svg class="ticks" aria-hidden="true" height="16">{ticks}</svg><div></div>'
        f"<figcaption>{escape(under)}{' (logarithmic)' if across.log else ''}</figcaption></figure>"
    )
