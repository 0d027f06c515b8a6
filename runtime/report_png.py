"""The latency report as one PNG picture, drawn by matplotlib: time between tokens and time to first token by device."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import require
from .report import Row, Times, headline, make_rows, number
from .report_html import make_scale

_MEASURED, _PREDICTED = "#0b7a6f", "#d08a20"


def render_png(results: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG bytes.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    require("matplotlib", purpose="draw the report as a PNG")
    from matplotlib.figure import Figure

    rows = make_rows(results)
    figure = Figure(figsize=(10, 2.2 + 0.9 * len(rows)), dpi=150, layout="constrained")
    figure.suptitle(f"{_plain(str(results[0]['model']))}\n{headline(rows)}", fontsize=11)
    upper, lower = figure.subplots(2, 1)
    _draw(upper, rows, [row.itl for row in rows], "time between tokens (ITL), ms")
    _draw(lower, rows, [row.ttft for row in rows], "time to first token (TTFT), ms")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _draw(axes: Any, rows: Sequence[Row], all_times: Sequence[Times], title: str) -> None:
    scale = make_scale(value for times in all_times for value in times.known)
    for place, (row, times) in enumerate(zip(rows, all_times, strict=True)):
        if row.measured:
            axes.plot([times.p50, max(times.known)], [place, place], color=_MEASURED, lw=4, alpha=0.45)
            marks = [value for value in (times.p90, times.p99) if value is not None]
            axes.plot(marks, [place] * len(marks), "|", color=_MEASURED, ms=12, mew=2)
            axes.plot(times.p50, place, "o", color=_MEASURED, ms=8)
        else:
            if times.low is not None and times.high is not None:
                axes.plot([times.low, times.high], [place, place], color=_PREDICTED, lw=2, ls=(0, (3, 2)))
            axes.plot(times.p50, place, "o", mfc="white", mec=_PREDICTED, mew=2, ms=8)
        above = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(number(times.p50), (times.p50, place), **above)
    axes.set_yticks(range(len(rows)), [f"{_plain(row.device)}\n{row.kind}" for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_xscale("log" if scale.log else "linear")
    axes.xaxis.set_major_formatter("{x:,.10g}")
    axes.set_xlim(scale.low, scale.high)
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _plain(text: str) -> str:
    """matplotlib reads what lies between dollar signs as mathematics."""
    return text.replace("$", r"\$")
