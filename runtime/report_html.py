"""The latency report as one HTML file: no script, no font, no picture, nothing fetched.

Charts are inline SVG whose horizontal positions are percentages, so they stretch to any width while text keeps its
size. Measured is solid and teal, predicted hatched and amber with a dashed band; both are also said in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from . import report_breakdown, report_compare, report_quality
from .report import Row, Times, bytes_text, headline, make_rows, number, percent, time_names, times_note
from .report_compare import Comparison
from .report_style import STYLE

_LOG_FROM = 20.0  # a linear scale hides the small ones when the largest is this many times the smallest
_COLUMNS = 6  # of "Every other figure", side by side
_FIGURES = (
    ("profile", "profile"),
    ("backend", "backend"),
    ("weights", "weights"),
    ("threads", "threads"),
    ("repeat", "repeats"),
    ("spread.ttft_ms", "TTFT of the repeats, ms"),
    ("spread.itl_p50_ms", "ITL p50 of the repeats, ms"),
    ("spread.itl_p90_ms", "ITL p90 of the repeats, ms"),
    ("spread.itl_p99_ms", "ITL p99 of the repeats, ms"),
    ("scenario", "scenario"),
    ("query_ms.p90", "a query, p90, ms"),
    ("queries_per_s", "queries a second"),
    ("load_s", "load, s"),
    ("device_memory_bytes", "memory of the GPU"),
    ("bundle_bytes", "bundle"),
    ("bandwidth_bytes_per_s", "bandwidth reached"),
    ("bandwidth_limit_bytes_per_s", "bandwidth limit"),
    ("energy_j_per_token", "J a token"),
    ("usd_per_million_tokens", "USD a million tokens"),
)


@dataclass(frozen=True)
class Scale:
    """Positions of figures from 0 to 100 percent, linear from zero or logarithmic, with round ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        if self.log:
            return 100 * math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)


def make_scale(values: Iterable[float]) -> Scale:
    """A scale that holds all `values`: logarithmic where they are far apart, else from zero."""
    known = [value for value in values if value > 0] or [1.0]
    small, large = min(known), max(known)
    if large / small >= _LOG_FROM:
        first, last = math.floor(math.log10(small * 0.999)), math.ceil(math.log10(large * 1.001))
        every = math.ceil((last - first) / 5)
        return Scale(10.0**first, 10.0**last, True, tuple(10.0**power for power in range(first, last + 1, every)))
    rough = large / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    high = step * math.ceil(large / step - 1e-9)
    return Scale(0.0, high, False, tuple(step * index for index in range(round(high / step) + 1)))


def render_html(
    results: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> str:
    """The whole document for results that were checked (`report.check_result`)."""
    rows = make_rows(results)
    parts = [
        _header(results, rows),
        _legend(rows),
        _section("Devices", _main_table(rows), times_note(rows)),
        _section(f"Against {comparison.origin}", report_compare.render_html(comparison)) if comparison else "",
        _section("Quality, latency, cost", report_quality.render_html(rows, evaluations)) if evaluations else "",
        _section("Time between tokens", _times_chart([row.itl for row in rows], rows), _ITL_NOTE),
        _section("Time to first token", _times_chart([row.ttft for row in rows], rows), _TTFT_NOTE),
        _section("Tokens a second", _bars([row.decode for row in rows], rows, "tokens/s"), _DECODE_NOTE),
        _section("Where a step's time goes", report_breakdown.render_html(rows), report_breakdown.NOTE),
        _section("Memory", _bars(*_in_binary_units([row.memory for row in rows], rows)), _MEMORY_NOTE),
        _section("Share of the bandwidth limit", _share_chart(rows), _SHARE_NOTE),
        _section("Every other figure", _figures_table(rows)),
        _section("How these figures were made", _provenance(rows)),
    ]
    return page(f"Latency report: {results[0]['model']}", [_PATTERN, *parts])


def page(title: str, parts: Sequence[str]) -> str:
    """A document around `parts` (HTML) with the reports' style and nothing to fetch or run."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


_ITL_NOTE = "How long each further token takes (ITL, in milliseconds). Shorter is better."
_TTFT_NOTE = "From the request to the first token of the answer: the whole prompt goes through (TTFT, in milliseconds)."
_DECODE_NOTE = (
    "Rate of decoding, all sequences of the batch together, over all steps: where a few were held up, it is below what "
    "the median time between tokens gives. More is better."
)
_MEMORY_NOTE = "The most that is held at once: weights, KV cache, workspace and runtime."
_SHARE_NOTE = (
    "A decode step must read the active weights and the KV cache: how near its rate of reading comes to what "
    "the memory can do."
)
_PATTERN = (
    '<svg class="defs" aria-hidden="true" width="0" height="0"><defs><pattern id="hatch" width="7" height="7" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="hatch-ground" width="7" height="7"/>'
    '<rect class="hatch-line" width="3" height="7"/></pattern></defs></svg>'
)


def _header(results: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> str:
    facts = " · ".join(_model_facts(results))
    dates = sorted({str(result["created"])[:10] for result in results if result.get("created")})
    when = f" · {escape(dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}')}" if dates else ""
    return (
        f'<header><p class="eyebrow">Latency report{when}</p><h1>{escape(str(results[0]["model"]))}</h1>'
        + (f'<p class="facts">{escape(facts)}</p>' if facts else "")
        + f'<p class="facts">{escape(headline(rows))}</p></header>'
    )


def _model_facts(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the first result that describes its model says of it."""
    known = [result["model_info"] for result in results if isinstance(result.get("model_info"), Mapping)]
    info = known[0] if known else {}
    facts = [str(info["family"])] if info.get("family") else []
    for key, words in (("parameters", "parameters"), ("active_parameters", "active a token")):
        if isinstance(info.get(key), (int, float)):
            facts.append(f"{_millions(info[key])} {words}")
    if info.get("layers"):
        facts.append(f"{info['layers']} layers")
    if info.get("experts"):
        facts.append(f"{info['experts']} experts, {info.get('experts_per_token')} for each token")
    return facts


def _millions(count: float) -> str:
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def _legend(rows: Sequence[Row]) -> str:
    kinds = {row.measured for row in rows}
    items = []
    if True in kinds:
        items.append(
            f"<li>{_badge(True)} <span>ran on this hardware: dot p50, ticks p90 and p99</span>"
            f"{_svg(_marks(Times(20, 60, 90, None, None), Scale(0, 100, False, ()), True), 'sample')}</li>"
        )
    if False in kinds:
        items.append(
            f"<li>{_badge(False)} <span>calculated, not run: ring expected, dashes from low to high</span>"
            f"{_svg(_marks(Times(40, None, None, 12, 90), Scale(0, 100, False, ()), False), 'sample')}</li>"
        )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _badge(measured: bool) -> str:
    return '<b class="badge measured">measured</b>' if measured else '<b class="badge predicted">predicted</b>'


def _section(title: str, body: str, note: str = "") -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{said}{body}</section>" if body else ""


def _main_table(rows: Sequence[Row]) -> str:
    headings = ("Device", "TTFT", "ITL", "Decode", "Prefill", "Memory", "Read a step", "Of limit")
    time = f"{time_names(rows)[0]}, ms"
    units = ("", time, time, "tokens/s", "tokens/s", "", "", "")
    head = "".join(
        f'<th scope="col">{name}{f"<small>{unit}</small>" if unit else ""}</th>'
        for name, unit in zip(headings, units, strict=True)
    )
    one_workload = len({row.workload for row in rows}) == 1
    body = []
    for row in rows:
        under = row.profile + ("" if one_workload else f" · {row.workload}")
        unfit = "" if row.fits else '<b class="unfit">does not fit</b>'
        cells = [
            f'<th scope="row">{escape(row.device)} {_badge(row.measured)}{unfit}<small>{escape(under)}</small></th>',
            _cell(f"TTFT {time}", _times_cell(row.ttft)),
            _cell(f"ITL {time}", _times_cell(row.itl)),
            _cell("Decode, tokens/s", number(row.decode)),
            _cell("Prefill, tokens/s", number(row.prefill)),
            _cell("Memory", bytes_text(row.memory)),
            _cell("Read a step", bytes_text(row.bytes_per_token)),
            _cell("Of limit", percent(row.fraction)),
        ]
        body.append(f'<tr class="{row.kind}">{"".join(cells)}</tr>')
    return f'<table class="devices"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'


def _cell(label: str, value: str) -> str:
    return f'<td data-label="{escape(label)}"><span>{value}</span></td>'


def _times_cell(times: Times) -> str:
    under = ""
    if times.p90 is not None or times.p99 is not None:
        under = f"p90 {number(times.p90)}, p99 {number(times.p99)}"
    elif times.low is not None and times.high is not None:
        under = f"{number(times.low)} to {number(times.high)}"
    return number(times.p50) + (f"<small>{under}</small>" if under else "")


def _times_chart(all_times: Sequence[Times], rows: Sequence[Row]) -> str:
    scale = make_scale(value for times in all_times for value in times.known)
    lines = [
        (row, _marks(times, scale, row.measured), f"{number(times.p50)} ms", _told(row, times))
        for row, times in zip(rows, all_times, strict=True)
    ]
    return _chart(lines, scale, "ms")


def _told(row: Row, times: Times) -> str:
    """A chart line in words, for who cannot see it."""
    known = ", ".join(
        f"{name} {number(value)} ms"
        for name, value in (("p50", times.p50), ("p90", times.p90), ("p99", times.p99), ("low", times.low))
        if value is not None
    )
    return f"{row.device}, {row.kind}: {known}" + (f", high {number(times.high)} ms" if times.high is not None else "")


def _marks(times: Times, scale: Scale, measured: bool) -> str:
    """SVG of one line: whisker and dot, or dashed band and ring."""
    middle = scale.at(times.p50)
    if measured:
        end = scale.at(max(times.known))
        ticks = "".join(
            f'<line class="tick" x1="{scale.at(value):.2f}%" x2="{scale.at(value):.2f}%" y1="{top}" y2="{28 - top}"/>'
            for value, top in ((times.p90, 9), (times.p99, 6))
            if value is not None
        )
        whisker = f'<line class="whisker" x1="{middle:.2f}%" x2="{end:.2f}%" y1="14" y2="14"/>'
        return f'<g class="measured">{whisker}{ticks}<circle cx="{middle:.2f}%" cy="14" r="6"/></g>'
    band = ""
    if times.low is not None and times.high is not None:
        low, high = scale.at(times.low), scale.at(times.high)
        band = f'<line class="band" x1="{low:.2f}%" x2="{high:.2f}%" y1="14" y2="14"/>'
    return f'<g class="predicted">{band}<circle cx="{middle:.2f}%" cy="14" r="6"/></g>'


def _in_binary_units(
    values: Sequence[float | None], rows: Sequence[Row]
) -> tuple[list[float | None], Sequence[Row], str]:
    """Bytes as MiB or GiB, by the largest."""
    shift, unit = (30, "GiB") if max((value or 0 for value in values), default=0) >= 1 << 30 else (20, "MiB")
    return [None if value is None else value / (1 << shift) for value in values], rows, unit


def _bars(values: Sequence[float | None], rows: Sequence[Row], unit: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    scale = make_scale(known)
    lines = []
    for row, value in zip(rows, values, strict=True):
        marks = ""
        if value is not None:
            width = scale.at(value)
            # On a logarithmic scale a length means nothing: a dot marks the place.
            dot = f'<circle cx="{width:.2f}%" cy="14" r="6"/>'
            bar = f'<rect class="bar" x="0" y="5" width="{width:.2f}%" height="18" rx="2"/>'
            marks = f'<g class="{row.kind}">{dot if scale.log else bar}</g>'
        shown = f"{number(value)} {unit}" if value is not None else "not known"
        lines.append((row, marks, shown, f"{row.device}, {row.kind}: {shown}"))
    return _chart(lines, scale, unit)


def _share_chart(rows: Sequence[Row]) -> str:
    if all(row.fraction is None for row in rows):
        return ""
    scale = Scale(0.0, max(1.0, *(row.fraction or 0.0 for row in rows)), False, (0.0, 0.25, 0.5, 0.75, 1.0))
    lines = []
    for row in rows:
        width = scale.at(row.fraction or 0.0)
        bar = f'<g class="{row.kind}"><rect class="bar" x="0" y="5" width="{width:.2f}%" height="18" rx="2"/></g>'
        told = f"{row.device}, {row.kind}: {percent(row.fraction)} of the limit"
        lines.append((row, bar, percent(row.fraction), told))
    return _chart(lines, scale, "", lambda tick: f"{100 * tick:.0f}%")


def _chart(
    lines: Iterable[tuple[Row, str, str, str]],
    scale: Scale,
    unit: str,
    tick_text: Callable[[float], str] = "{:,.10g}".format,
) -> str:
    """Lines of (row, SVG marks, figure, the same in words) over one axis."""
    grid = "".join(
        f'<line class="grid" x1="{scale.at(tick):.2f}%" x2="{scale.at(tick):.2f}%" y1="0" y2="28"/>'
        for tick in scale.ticks
    )
    body = "".join(
        f'<li class="{row.kind}"><span class="name">{escape(row.device)} {_badge(row.measured)}</span>'
        f'{_svg(grid + marks, "track", told)}<span class="figure">{escape(figure)}</span></li>'
        for row, marks, figure, told in lines
    )
    labels = "".join(
        f'<text x="{scale.at(tick):.2f}%" y="12" text-anchor="{_anchor(scale.at(tick))}">'
        f"{escape(tick_text(tick))}</text>"
        for tick in scale.ticks
    )
    kind = ", ".join(part for part in ("logarithmic scale" if scale.log else "", unit) if part)
    axis = f'<li class="axis"><span class="name">{escape(kind)}</span>{_svg(labels, "ticks")}<span></span></li>'
    return f'<ul class="chart">{body}{axis}</ul>'


def _anchor(position: float) -> str:
    return "start" if position < 4 else "end" if position > 96 else "middle"


def _svg(content: str, name: str, told: str = "") -> str:
    label = f' role="img" aria-label="{escape(told)}"' if told else ' aria-hidden="true"'
    return f'<svg class="{name}"{label} height="{16 if name == "ticks" else 28}">{content}</svg>'


def _figures_table(rows: Sequence[Row]) -> str:
    """As many tables as it takes for a sheet of paper to hold each."""
    return "".join(_figures_of(rows[start : start + _COLUMNS]) for start in range(0, len(rows), _COLUMNS))


def _figures_of(rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col">{escape(row.device)}<br>{_badge(row.measured)}</th>' for row in rows)
    body = []
    for key, label in _FIGURES:
        values = [_figure_text(key, row) for row in rows]
        if any(value != "-" for value in values):
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
            body.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    table = f'<table class="figures"><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'


def _figure_text(key: str, row: Row) -> str:
    value: Any = row.weights if key == "weights" else row.raw
    for name in key.split(".") if key != "weights" else ():
        value = value.get(name) if isinstance(value, Mapping) else None
    if key.startswith("spread.") and isinstance(value, Mapping):
        ends = [value.get(end) for end in ("min", "max")]
        return " to ".join(number(end) for end in ends) if all(isinstance(end, float) for end in ends) else "-"
    if value is None:
        return "-"
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.startswith("bandwidth"):
        return f"{number(value / 1e9)} GB/s"
    return number(value) if isinstance(value, float) else str(value)


def _provenance(rows: Sequence[Row]) -> str:
    """Versions and machine of each measurement, assumptions of each kind of prediction."""
    items = []
    for row in rows:
        if row.measured:
            notes = [str(row.raw[key]) for key in ("limit_note", "energy_reason") if row.raw.get(key)]
            said = [f"{row.raw.get('repeat') or 'several'} repeats", *notes]
            said.append(_flatten({key: row.raw.get(key) for key in ("created", "versions", "machine")}))
            items.append(f"<li>{_badge(True)} <b>{escape(row.device)}</b>: {escape('; '.join(said))}</li>")
    devices: dict[str, list[str]] = {}
    for row in rows:
        if not row.measured:
            devices.setdefault(str(row.raw.get("assumptions") or "no assumptions stated"), []).append(row.device)
    for assumption, names in devices.items():
        method = (
            "a roofline: each kind of operation takes the longer of its bytes over the bandwidth and its arithmetic "
            "over the peak, and each kernel a fixed cost. Shares of bandwidth and peak: "
        )
        items.append(f"<li>{_badge(False)} <b>{escape(', '.join(names))}</b>: {escape(method + assumption)}.</li>")
    return f'<ul class="made">{"".join(items)}</ul>'


def _flatten(value: Mapping[str, Any]) -> str:
    """`key value` pairs of nested objects in one line, what is null or empty left out."""
    parts = []
    for key, item in value.items():
        if isinstance(item, Mapping):
            parts.append(_flatten(item))
        elif isinstance(item, (str, int, float)) and not isinstance(item, bool):
            parts.append(f"{key} {item}")
    return ", ".join(part for part in parts if part)
