"""Quality against latency and cost: results of `moedge eval` joined with those of `moedge bench` and `estimate`.

Quality belongs to the weights, not to the device: an evaluation counts for every row of the same weights and group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..errors import ReportError, shorten
from .report import Row, number, time_names
from .report_input import check_figure, check_text, check_values

SCHEMA = 1


def is_evaluation(document: Any) -> bool:
    """Whether a JSON document says it is one of `moedge eval`."""
    return isinstance(document, Mapping) and document.get("kind") == "eval"


def check_evaluation(document: Mapping[str, Any], origin: str) -> None:
    """Raises ReportError where a document that says it is an evaluation is none of this schema."""
    again = "evaluate again with this version's `moedge eval --json`"
    if document.get("schema") != SCHEMA:
        found = shorten(document.get("schema"))
        raise ReportError(f"{origin}: evaluation of schema {found}, this version reads schema {SCHEMA}; {again}")
    required = ("model", "weights", "group_size", "text", "text_sha256", "bits_per_byte", "perplexity", "against")
    missing = [key for key in required if key not in document]
    if missing:
        raise ReportError(f"{origin}: {', '.join(missing)} missing; {again}")
    for key in ("model", "text", "text_sha256"):
        check_text(document[key], f"{origin}: {key}")
    check_text(document["weights"], f"{origin}: weights", may_be_null=True)
    check_figure(document["group_size"], f"{origin}: group_size", may_be_null=True)
    check_figure(document["bits_per_byte"], f"{origin}: bits_per_byte")
    check_figure(document["perplexity"], f"{origin}: perplexity", may_be_null=True)
    against = document["against"]
    if against is not None:
        if not isinstance(against, Mapping) or not isinstance(against.get("kl_nats"), Mapping):
            raise ReportError(f"{origin}: against is no comparison; {again}")
        check_figure(against.get("top1_agreement"), f"{origin}: top1_agreement")
        for key in ("mean", "p99"):
            check_figure(against["kl_nats"].get(key), f"{origin}: kl_nats.{key}")
        check_text(against.get("name"), f"{origin}: against.name")
    check_values(document, origin)


def check_together(evaluations: Sequence[Mapping[str, Any]], model: str | None = None) -> None:
    """Raises ReportError where evaluations are of several texts, or not of `model`."""
    for evaluation in evaluations:
        if model is not None and evaluation["model"] != model:
            raise ReportError(
                f"an evaluation is of model {evaluation['model']}, the results are of {model}; "
                "give evaluations of the same model"
            )
    texts = {evaluation["text_sha256"]: str(evaluation["text"]) for evaluation in evaluations}
    if len(texts) > 1:
        raise ReportError(
            f"evaluations on {len(texts)} texts ({', '.join(texts.values())}) do not compare; give those of one text"
        )


def find_evaluation(
    evaluations: Sequence[Mapping[str, Any]], weights: Any, group_size: Any, model: Any = None
) -> Mapping[str, Any] | None:
    """The last evaluation of these weights (and of this model, where one is named)."""
    same = [each for each in evaluations if (each["weights"], each["group_size"]) == (weights, group_size)]
    return next((each for each in reversed(same) if model in (None, each["model"])), None)


def render_html(rows: Sequence[Row], evaluations: Sequence[Mapping[str, Any]]) -> str:
    """The body of the report's section: a chart of quality over latency with the cost told, and the table behind it."""
    joined = [(row, find_evaluation(evaluations, row.raw["weights"], row.raw["group_size"])) for row in rows]
    points = [(row, found) for row, found in joined if found is not None]
    return _chart(points) + _legend(points) + _table(evaluations)


def render_markdown(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines: a heading and a table."""
    from .report import markdown_row, markdown_text

    lines = ["", "## Quality", "", markdown_row([name for name, _ in _COLUMNS])]
    lines.append(markdown_row(["---", *(["---:"] * (len(_COLUMNS) - 1))]))
    for evaluation in evaluations:
        lines.append(markdown_row([markdown_text(cell(evaluation)) for _, cell in _COLUMNS]))
    return lines


def _weights(evaluation: Mapping[str, Any]) -> str:
    group = evaluation["group_size"]
    return f"{evaluation['weights']}, group {group}" if group else str(evaluation["weights"])


def _against(evaluation: Mapping[str, Any], *keys: str) -> float | None:
    value: Any = evaluation["against"]
    for key in keys:
        value = None if value is None else value[key]
    return None if value is None else float(value)


_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("weights", _weights),
    ("bits per byte", lambda each: number(each["bits_per_byte"], 5)),
    ("perplexity", lambda each: number(each["perplexity"], 4)),
    ("same first choice", lambda each: _share(_against(each, "top1_agreement"))),
    ("KL mean, nats", lambda each: _small(_against(each, "kl_nats", "mean"))),
    ("KL p99, nats", lambda each: _small(_against(each, "kl_nats", "p99"))),
)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _table(evaluations: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in _COLUMNS)
    body = ""
    for evaluation in evaluations:
        cells = [escape(cell(evaluation)) for _, cell in _COLUMNS]
        rest = "".join(f"<td>{cell}</td>" for cell in cells[1:])
        body += f'<tr><th scope="row">{cells[0]}</th>{rest}</tr>'
    against = {str(each["against"]["name"]) for each in evaluations if each["against"] is not None}
    compared = f", compared with {', '.join(sorted(against))}" if against else ""
    said = f"On {evaluations[0]['text']}{compared}. Fewer bits per byte is better."
    return (
        f'<p class="note">{escape(said)}</p><div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _chart(points: Sequence[tuple[Row, Mapping[str, Any]]]) -> str:
    """Bits per byte (fewer, so better, upwards) over the time between tokens, and over the cost where one is known;
    dots are numbered as in the legend."""
    if not points:
        return ""
    latency = [row.itl.p50 for row, _ in points]
    cost = [row.usd for row, _ in points]
    charts = _scatter(points, latency, "ms", "time between tokens, ms; better leftwards")
    if any(value is not None for value in cost):
        charts += _scatter(points, cost, "USD", "USD a million tokens; better leftwards")
    return f'<div class="tradeoff">{charts}</div>'


def _scatter(
    points: Sequence[tuple[Row, Mapping[str, Any]]], across: Sequence[float | None], unit: str, under: str
) -> str:
    from .report_chart import Point, scatter
    from .report_html import make_scale

    low, high = _range([float(found["bits_per_byte"]) for _, found in points])
    dots = []
    for index, ((row, found), x) in enumerate(zip(points, across, strict=True), start=1):
        if x is not None:
            value = float(found["bits_per_byte"])
            told = f"{index}: {row.device}, {number(x)} {unit}, {number(value, 5)} bits per byte"
            dots.append(Point(index, x, (value - low) / (high - low), row.kind, told))
    side = (number(low, 5), "bits per byte, better upwards", number(high, 5))
    return scatter(dots, make_scale(dot.x for dot in dots), side, under)


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Ends a little beyond the values: quality differs little, so the axis does not begin at zero."""
    low, high = min(values), max(values)
    margin = 0.2 * (high - low) or 0.02 * high or 1.0
    return low - margin, high + margin


def _legend(points: Sequence[tuple[Row, Mapping[str, Any]]]) -> str:
    """What each number in the chart is: quality, latency and cost."""
    if not points:
        return '<p class="note">No result has the weights of an evaluation.</p>'
    time = f"ITL {time_names([row for row, _ in points])[0]}, ms"
    names = ("", "Device", "Bits per byte", time, "tokens/s", "USD / million")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = ""
    for index, (row, found) in enumerate(points, start=1):
        agreement = _against(found, "top1_agreement")
        same = f"<small>{_share(agreement)} same choice</small>" if agreement is not None else ""
        badge = f'<b class="badge {row.kind}">{row.kind}</b>'
        body += (
            f'<tr class="{row.kind}"><td>{index}</td><th scope="row">{escape(row.device)} {badge}</th>'
            f"<td>{number(float(found['bits_per_byte']), 5)}{same}</td><td>{number(row.itl.p50)}</td>"
            f"<td>{number(row.decode)}</td><td>{number(row.usd)}</td></tr>"
        )
    table = f'<table class="quality"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" tabindex="0">{table}</div>'
