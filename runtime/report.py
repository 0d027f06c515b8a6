"""The latency report: devices as rows, out of `moedge bench` results (measured) and `moedge estimate` ones (predicted).

`load_results` reads and checks the JSON, `write_report` writes HTML, Markdown, CSV or PNG by suffix, `render_table` is
the table for a terminal.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import staged_file
from ..errors import ReportError
from ..profiles.fit import size
from .report_input import BAND, PERCENTILES, TIMES, check_result, read_documents

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from .report_compare import Comparison

SUFFIXES = (".html", ".md", ".csv", ".png")

_WORKLOAD = {
    "prompt_tokens": "prompt", "new_tokens": "new", "batch": "batch", "context_tokens": "context",
    "scenario": "scenario", "threads": "threads",
}  # fmt: skip
CSV_COLUMNS = (
    "schema model profile backend device weights group_size batch prompt_tokens new_tokens threads repeat load_s "
    "ttft_ms.p50 ttft_ms.p90 ttft_ms.p99 ttft_ms.low ttft_ms.high itl_ms.p50 itl_ms.p90 itl_ms.p99 itl_ms.low "
    "itl_ms.high prefill_tokens_per_s decode_tokens_per_s peak_memory_bytes bundle_bytes bytes_per_token "
    "bandwidth_bytes_per_s "
    "bandwidth_limit_bytes_per_s fraction_of_limit energy_j_per_token usd_per_million_tokens fits measured created "
    "context_tokens scenario"
).split()


@dataclass(frozen=True)
class Times:
    """Milliseconds: percentiles where measured; of a prediction the expected value as `p50`, and its band."""

    p50: float
    p90: float | None
    p99: float | None
    low: float | None
    high: float | None

    @property
    def known(self) -> list[float]:
        return [value for value in (self.p50, self.p90, self.p99, self.low, self.high) if value is not None]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One result as the report shows it; figures that are not known are None. `raw` is the result itself."""

    device: str
    profile: str
    backend: str
    weights: str
    workload: str
    measured: bool
    fits: bool
    ttft: Times
    itl: Times
    decode: float | None
    prefill: float | None
    memory: float | None
    bytes_per_token: float | None
    fraction: float | None
    energy: float | None
    usd: float | None
    raw: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return "measured" if self.measured else "predicted"


def load_results(paths: Iterable[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """The results in JSON files, each one document or a list of them.

    Raises:
        ReportError: not readable, not JSON, not a result, another schema version, fields missing or of no sense, or
        more than one model; names the file.
    """
    results, _ = load_inputs(paths)
    return results


def load_inputs(
    paths: Iterable[str | os.PathLike[str]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(results, evaluations) in JSON files: `moedge eval --json` may stand among the results.

    Raises:
        ReportError: as `load_results`; also evaluations of another model or of several texts.
    """
    from .report_quality import check_evaluation, check_together, is_evaluation

    results: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    origins: list[str] = []
    for document, origin in read_documents(paths):
        if is_evaluation(document):
            check_evaluation(document, origin)
            evaluations.append(document)
        else:
            check_result(document, origin)
            results.append(document)
            origins.append(origin)
    _check_one_model(results, origins)
    check_together(evaluations, results[0]["model"])
    return results, evaluations


def write_report(
    results: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    evaluations: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> None:
    """Writes the report of `results` as `path`'s suffix says (.html, .md, .csv, .png); a failure leaves nothing behind.

    `evaluations` (of `moedge eval`) and `comparison` (with an earlier report) go into HTML and Markdown.

    Raises:
        ReportError: another suffix, no results, a result that is none, mixed models, or the place cannot be written.
        DependencyError: a PNG without matplotlib.
    """
    target = check_suffix(path)
    suffix = target.suffix.lower()
    for index, result in enumerate(results):
        check_result(result, f"result {index}")
    _check_one_model(results, [f"result {index}" for index in range(len(results))])
    if suffix == ".html":
        from .report_html import render_html

        content = render_html(results, evaluations, comparison).encode()
    elif suffix == ".png":
        from .report_png import render_png

        content = render_png(results)
    elif suffix == ".md":
        content = render_markdown(results, evaluations, comparison).encode()
    else:
        content = render_csv(results).encode()
    with staged_file(target, error=ReportError) as staged:
        staged.write_bytes(content)


def check_suffix(path: str | os.PathLike[str], known: Sequence[str] = SUFFIXES) -> Path:
    """Raises ReportError where `path` has no suffix that can be written."""
    target = Path(path)
    if target.suffix.lower() not in known:
        raise ReportError(f"{target}: the report's format is its suffix; known: {', '.join(known)}")
    return target


def make_rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The results as rows: measured ones first, each kind in the order given.

    A device that stands there with several kinds of weights, or several workloads (a sweep), has them in its name.
    """
    rows = sorted(map(_row, results), key=lambda row: not row.measured)
    kinds: dict[str, set[str]] = {}
    for row in rows:
        kinds.setdefault(row.profile, set()).add(row.weights)
    rows = [_named(row, row.weights.split(",")[0], " ({})") if len(kinds[row.profile]) > 1 else row for row in rows]
    workloads: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        workloads.setdefault((row.profile, row.measured), []).append(row)
    alike = {key: _varying([row.raw for row in some]) for key, some in workloads.items()}
    return [_named(row, _short(row.raw, alike[row.profile, row.measured]), ", {}") for row in rows]


def _named(row: Row, told: str, form: str) -> Row:
    if not told:
        return row
    return replace(row, device=row.device + form.format(told), profile=f"{row.profile} {told}")


def _varying(results: Sequence[Mapping[str, Any]]) -> set[str]:
    """The counts of a workload in which these results differ."""
    return {key for key in _WORKLOAD if len({str(result.get(key) or 0) for result in results}) > 1}


def _short(result: Mapping[str, Any], keys: set[str]) -> str:
    """What tells a workload from its neighbours in few words: `prompt 256, batch 8`."""
    return ", ".join(f"{name} {result.get(key) or 0}" for key, name in _WORKLOAD.items() if key in keys)


def render_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """A table for a terminal: devices as rows; predictions are marked and dim."""
    from rich.table import Table
    from rich.text import Text

    rows = make_rows(results)
    # Narrow on purpose: 80 columns hold it, so names are the profiles' and each row has a second line.
    title = Text(f"{results[0]['model']}: {headline(rows)}")
    table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0), show_lines=True, show_edge=False)
    table.add_column("device", no_wrap=True)
    first, *rest = time_names(rows)
    under = f"{first}\n{'p99' if 'p99' in rest else '-'.join(rest)}"  # as the cells have them
    for heading in (f"TTFT, ms\n{under}", f"ITL, ms\n{under}", "tokens\n/s", "memory", "read a\nstep", "of\nlimit"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name = Text(row.profile)
        name.append(f"\n{row.kind}", "bold green" if row.measured else "italic yellow")
        if not row.fits:
            name.append(": no fit", "red")
        figures = (number(row.decode), bytes_text(row.memory), bytes_text(row.bytes_per_token), percent(row.fraction))
        table.add_row(name, *(_two_lines(times) for times in (row.ttft, row.itl)), *map(Text, figures))
    table.caption = Text(times_note(rows))
    return table


def render_markdown(
    results: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]] = (),
    comparison: Comparison | None = None,
) -> str:
    """A Markdown document with one table, and one each for quality and for what changed."""
    from . import report_compare, report_quality

    rows = make_rows(results)
    headings = ["device", "", "weights"]
    headings += [f"{time} {name}, ms" for time in ("TTFT", "ITL") for name in time_names(rows)]
    headings += ["decode tokens/s", "prefill tokens/s", "memory", "read a step", "of limit"]
    lines = [
        f"# Latency report: {markdown_text(results[0]['model'])}",
        "",
        markdown_text(headline(rows)),
        "",
        markdown_row(headings),
        markdown_row(["---"] * 3 + ["---:"] * (len(headings) - 3)),
    ]
    for row in rows:
        cells = [markdown_text(row.device), row.kind if row.measured else f"*{row.kind}*", markdown_text(row.weights)]
        for times in (row.ttft, row.itl):
            cells += [number(times.p50), *_spread(times)]
        cells += [number(row.decode), number(row.prefill), bytes_text(row.memory), bytes_text(row.bytes_per_token)]
        lines.append(markdown_row([*cells, percent(row.fraction)]))
    lines += ["", times_note(rows)]
    if comparison is not None:
        lines += report_compare.render_markdown(comparison)
    if evaluations:
        lines += report_quality.render_markdown(evaluations)
    return "\n".join(lines) + "\n"


def render_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """CSV_COLUMNS with a header line: figures as in the JSON, empty where not known, nested keys with a dot."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in make_rows(results):
        writer.writerow([_csv_cell(row.raw, column) for column in CSV_COLUMNS])
    return out.getvalue()


def headline(rows: Sequence[Row]) -> str:
    """What was asked of the devices, where it is the same for all, and how many rows are of which kind."""
    workloads = list(dict.fromkeys(row.workload for row in rows))
    measured = sum(row.measured for row in rows)
    what = workloads[0] if len(workloads) == 1 else f"{len(workloads)} workloads"
    return f"{what}; {measured} measured, {len(rows) - measured} predicted"


def time_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """What the three figures of a time are called in the head of a table."""
    return PERCENTILES if any(row.measured for row in rows) else ("expected", *BAND)


def times_note(rows: Sequence[Row]) -> str:
    """What the columns of times are; a prediction has no percentiles."""
    mixed = {row.measured for row in rows} == {True, False}
    predicted = " Predicted rows: the expected time instead of p50, then low and high." if mixed else ""
    return f"TTFT: time to first token. ITL: time between tokens.{predicted}"


def number(value: float | None, significant: int = 3) -> str:
    """`significant` digits, thousands apart; a dash where not known."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    digits = max(0, significant - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 4)}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%" if value >= 0.1 else f"{100 * value:.1f}%"


def bytes_text(value: float | None) -> str:
    return "-" if value is None else size(value)


def _check_one_model(results: Sequence[Mapping[str, Any]], origins: Sequence[str]) -> None:
    if not results:
        raise ReportError("no results to report; make some with `moedge bench --json` or `moedge estimate --json`")
    first: dict[str, str] = {}
    for result, origin in zip(results, origins, strict=True):
        first.setdefault(result["model"], origin)
    if len(first) > 1:
        models = ", ".join(f"{model} ({origin})" for model, origin in first.items())
        raise ReportError(f"results of {len(first)} models in one report: {models}; make one report for each model")


def _row(result: Mapping[str, Any]) -> Row:
    ttft, itl = (Times(*(result[key].get(name) for name in (*PERCENTILES, *BAND))) for key in TIMES)
    group = result["group_size"]
    weights = str(result["weights"] or "-")
    return Row(
        device=result["device"],
        profile=result["profile"],
        backend=result["backend"],
        weights=f"{weights}, group {group}" if group else weights,
        workload=_workload(result),
        measured=result["measured"],
        fits=result.get("fits") is not False,
        ttft=ttft,
        itl=itl,
        decode=result["decode_tokens_per_s"],
        prefill=result["prefill_tokens_per_s"],
        memory=result["peak_memory_bytes"],
        bytes_per_token=result["bytes_per_token"],
        fraction=result["fraction_of_limit"],
        energy=result["energy_j_per_token"],
        usd=result.get("usd_per_million_tokens"),
        raw=result,
    )


def _workload(result: Mapping[str, Any]) -> str:
    behind = f" behind {result['context_tokens']:,}" if result.get("context_tokens") else ""
    scenario = f", {result['scenario']}" if result.get("scenario") else ""
    tokens = f"{result['prompt_tokens']} prompt and {result['new_tokens']} new tokens{behind}"
    return f"{tokens}, batch {result['batch']}{scenario}"


def _two_lines(times: Times) -> Text:
    from rich.text import Text

    under = ""
    if times.p99 is not None:
        under = f"\n{number(times.p99)}"
    elif times.low is not None and times.high is not None:
        under = f"\n{number(times.low, 2)}-{number(times.high, 2)}"
    return Text(number(times.p50)).append(under, "dim")


def _spread(times: Times) -> tuple[str, str]:
    """p90 and p99, or the ends of a prediction's band."""
    if times.p90 is None and times.p99 is None and times.low is not None:
        return f"*low {number(times.low)}*", f"*high {number(times.high)}*"
    return number(times.p90), number(times.p99)


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cell.strip() for cell in cells) + " |"


def markdown_text(text: Any) -> str:
    """Text that is neither markup nor the end of a cell."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\")
    return "".join(f"\\{letter}" if letter in "|*_`[]#" else letter for letter in plain)


def _csv_cell(result: Mapping[str, Any], column: str) -> str:
    value: Any = result
    for key in column.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else str(value)
