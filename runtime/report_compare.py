"""What changed against an earlier report: results matched by what was run, and what got slower.

A change is that of the time: for a time new over old less one, for a rate old over new less one, so that a half rate
and a double time are both +100%. Medians and rates are judged; p90 and p99 of a few repeats are shown and not judged,
memory likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..errors import ReportError
from .report import bytes_text, number

WORTH_COLOUR = 0.05
_SHOWN = 4  # runs that a message names


@dataclass(frozen=True)
class Figure:
    """A figure that is compared: its place in the result, its name, and how it is judged."""

    path: tuple[str, ...]
    label: str
    rate: bool = False  # more is better
    judged: bool = False
    memory: bool = False

    def of(self, result: Mapping[str, Any]) -> float | None:
        value: Any = result
        for key in self.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        return None if value is None else float(value)

    def text(self, value: float) -> str:
        return bytes_text(value) if self.memory else number(value)


FIGURES = (
    Figure(("ttft_ms", "p50"), "TTFT p50, ms", judged=True),
    Figure(("ttft_ms", "p90"), "TTFT p90, ms"),
    Figure(("ttft_ms", "p99"), "TTFT p99, ms"),
    Figure(("itl_ms", "p50"), "ITL p50, ms", judged=True),
    Figure(("itl_ms", "p90"), "ITL p90, ms"),
    Figure(("itl_ms", "p99"), "ITL p99, ms"),
    Figure(("prefill_tokens_per_s",), "prefill, tokens/s", rate=True, judged=True),
    Figure(("decode_tokens_per_s",), "decode, tokens/s", rate=True, judged=True),
    Figure(("peak_memory_bytes",), "memory", memory=True),
)
_KEY = ("profile", "weights", "group_size", "batch", "prompt_tokens", "new_tokens", "threads", "measured", "scenario")


@dataclass(frozen=True)
class Change:
    """One figure then and now; `change` as a share of the time (+0.1: a tenth slower)."""

    figure: Figure
    before: float
    after: float

    @property
    def change(self) -> float:
        old, new = (self.after, self.before) if self.figure.rate else (self.before, self.after)
        if old == new:
            return 0.0
        return new / old - 1 if old else float("inf")

    def fails(self, limit: float) -> bool:
        return self.figure.judged and self.change > limit

    @property
    def said(self) -> str:
        return "infinitely" if self.change == float("inf") else f"{100 * self.change:+.1f}%"


@dataclass(frozen=True)
class Compared:
    """One result with its earlier one; `before` None: there was none. `notes`: what else differs."""

    name: str  # cpu int4
    run: str  # 512+64 tokens, batch 1, measured
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """All results against an earlier report. `limit`: the share above which a slower figure fails, if one was set."""

    origin: str
    rows: tuple[Compared, ...]
    only_now: tuple[str, ...]
    only_before: tuple[str, ...]
    limit: float | None = None

    @property
    def failures(self) -> list[str]:
        """`cpu int4 (...): ITL p50 +12.0%` for each judged figure above the limit."""
        if self.limit is None:
            return []
        return [
            f"{row.name} ({row.run}): {change.figure.label.split(',')[0]} {change.said}"
            for row in self.rows
            for change in row.changes
            if change.fails(self.limit)
        ]

    def raise_for_failures(self) -> None:
        """Raises ReportError where something got slower than the limit allows."""
        if self.failures:
            limit = f"{100 * (self.limit or 0):g}%"
            raise ReportError(f"slower than {self.origin} by more than {limit}: {'; '.join(self.failures)}")

    def colour(self, change: Change) -> str:
        """`slower`, `faster` or nothing: worth a colour from the limit or 5%, whichever is less."""
        edge = min(WORTH_COLOUR, WORTH_COLOUR if self.limit is None else self.limit)
        if change.figure.memory:
            return ""
        return "slower" if change.change > edge else "faster" if change.change < -edge else ""


def compare(
    results: Sequence[Mapping[str, Any]],
    earlier: Sequence[Mapping[str, Any]],
    origin: str,
    limit: float | None = None,
) -> Comparison:
    """Match each result with the earlier one of the same run; both were checked (`report.check_result`).

    Raises:
        ReportError: another model, or nothing that matches.
    """
    if results[0]["model"] != earlier[0]["model"]:
        raise ReportError(
            f"{origin} is of model {earlier[0]['model']}, the results are of {results[0]['model']}; "
            "compare results of one model"
        )
    before = {_key(result): result for result in earlier}
    rows = [_compare_one(result, before[_key(result)]) for result in results if _key(result) in before]
    only_now = [_whole(result) for result in results if _key(result) not in before]
    now = {_key(result) for result in results}
    only_before = [_whole(result) for result in earlier if _key(result) not in now]
    if not rows:
        raise ReportError(
            f"{origin} has none of these runs to compare with: it has {_some(only_before)}; the results are "
            f"{_some(only_now)}"
        )
    return Comparison(origin, tuple(rows), tuple(only_now), tuple(only_before), limit)


def render_html(comparison: Comparison) -> str:
    """The body of the report's section."""
    head = "".join(f'<th scope="col">{escape(figure.label)}</th>' for figure in FIGURES)
    body = []
    for row in comparison.rows:
        found = {change.figure: change for change in row.changes}
        cells = "".join(_html_cell(comparison, figure, found.get(figure)) for figure in FIGURES)
        notes = "".join(f"<small>{escape(note)}</small>" for note in (row.run, *row.notes))
        body.append(f'<tr><th scope="row">{escape(row.name)}{notes}</th>{cells}</tr>')
    table = (
        f'<div class="wide" tabindex="0"><table class="changes"><thead><tr><th scope="col">Run</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    return f"{_verdict(comparison)}{table}{''.join(f'<p class=note>{escape(line)}</p>' for line in _rest(comparison))}"


def render_markdown(comparison: Comparison) -> list[str]:
    """Lines: a heading and a table with the change of each figure."""
    from .report import markdown_row, markdown_text

    lines = ["", f"## Against {markdown_text(comparison.origin)}", ""]
    lines.append(markdown_row(["run", *(figure.label for figure in FIGURES)]))
    lines.append(markdown_row(["---", *(["---:"] * len(FIGURES))]))
    for row in comparison.rows:
        found = {change.figure: change for change in row.changes}
        cells = [markdown_text(f"{row.name} ({row.run})")]
        for figure in FIGURES:
            change = found.get(figure)
            told = "-" if change is None else f"{figure.text(change.after)} ({change.said})"
            slower = change is not None and comparison.colour(change) == "slower"
            cells.append(f"**{told}**" if slower else told)
        lines.append(markdown_row(cells))
    return [*lines, "", *(f"- {markdown_text(line)}" for line in _rest(comparison))]


def _compare_one(result: Mapping[str, Any], before: Mapping[str, Any]) -> Compared:
    changes = []
    for figure in FIGURES:
        then, now = figure.of(before), figure.of(result)
        if then is not None and now is not None:
            changes.append(Change(figure, then, now))
    notes = []
    for key in ("device", "backend"):
        if result[key] != before[key]:
            notes.append(f"{key} was {before[key]}, is {result[key]}")
    if result.get("versions") != before.get("versions"):
        notes.append(f"versions were {_versions(before)}, are {_versions(result)}")
    return Compared(_name(result), _run(result), tuple(changes), tuple(notes))


def _versions(result: Mapping[str, Any]) -> str:
    versions = result.get("versions")
    if not isinstance(versions, Mapping) or not versions:
        return "unknown"
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _key(result: Mapping[str, Any]) -> tuple[Any, ...]:
    return (*(result.get(key) for key in _KEY), result.get("context_tokens") or 0)


def _name(result: Mapping[str, Any]) -> str:
    return " ".join(part for part in (result["profile"], result["weights"]) if part)


def _run(result: Mapping[str, Any]) -> str:
    kind = "measured" if result["measured"] else "predicted"
    behind = f" behind {result['context_tokens']}" if result.get("context_tokens") else ""
    return f"{result['prompt_tokens']}+{result['new_tokens']} tokens{behind}, batch {result['batch']}, {kind}"


def _whole(result: Mapping[str, Any]) -> str:
    return f"{_name(result)} ({_run(result)})"


def _some(runs: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(runs) - _SHOWN} more" if len(runs) > _SHOWN else ""
    return ", ".join(runs[:_SHOWN]) + more


def _html_cell(comparison: Comparison, figure: Figure, change: Change | None) -> str:
    if change is None:
        return "<td>-</td>"
    colour = comparison.colour(change)
    word = f" {colour}" if colour else ""
    above = comparison.limit is not None and change.fails(comparison.limit)
    told = f"{change.said}{word}" + (", above the limit" if above else "")
    was = f"was {figure.text(change.before)}"
    return f'<td class="{colour}">{figure.text(change.after)}<small>{escape(told)}</small><small>{was}</small></td>'


def _verdict(comparison: Comparison) -> str:
    if comparison.limit is None:
        return ""
    limit = f"{100 * comparison.limit:g}%"
    if not comparison.failures:
        return f'<p class="verdict good">Nothing that is judged got slower by more than {limit}.</p>'
    told = escape("; ".join(comparison.failures))
    return f'<p class="verdict bad">Slower by more than {limit}: {told}.</p>'


def _rest(comparison: Comparison) -> list[str]:
    lines = ["Judged: medians and rates. Times and rates are compared as times: +100% is twice as slow."]
    if comparison.only_now:
        lines.append(f"Not in {comparison.origin}: {_some(comparison.only_now)}.")
    if comparison.only_before:
        lines.append(f"Only in {comparison.origin}: {_some(comparison.only_before)}.")
    return lines
