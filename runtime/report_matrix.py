"""`moedge report --matrix`: any bundles on any devices, on as many of each as hold the model; latency and cost.

All of it is predicted. More than one device is an estimate on top of an estimate and is marked so.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..bundle import Bundle, staged_file
from ..errors import ReportError
from ..profiles.device import load_profile
from ..profiles.multi import SOURCE, devices_needed, estimate_devices
from .report import bytes_text, check_suffix, markdown_row, markdown_text, number
from .report_input import read_documents
from .report_quality import check_evaluation, check_together, find_evaluation, is_evaluation

SUFFIXES = (".html", ".md", ".csv")
CSV_COLUMNS = (
    "model weights group_size weight_bytes profile devices ttft_ms.p50 ttft_ms.low ttft_ms.high itl_ms.p50 itl_ms.low "
    "itl_ms.high decode_tokens_per_s usd_per_hour usd_per_million_tokens usd_per_million_tokens_busy bits_per_byte"
).split()


@dataclass(frozen=True, kw_only=True)
class MatrixRow:
    """A bundle on a kind of device: `result` as `estimate_devices` gives it, None where no number of them holds it."""

    model: str
    weights: str
    group_size: int | None
    weight_bytes: int
    profile: str
    device: str
    result: Mapping[str, Any] | None
    evaluation: Mapping[str, Any] | None

    @property
    def devices(self) -> int | None:
        return None if self.result is None else int(self.result["devices"])

    @property
    def bits_per_byte(self) -> float | None:
        return None if self.evaluation is None else float(self.evaluation["bits_per_byte"])

    def figure(self, *keys: str) -> float | None:
        """A figure of the result by its keys; None where it is not known."""
        value: Any = self.result
        for key in keys:
            value = None if value is None else value[key]
        return None if value is None else float(value)


def split_inputs(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Bundle], list[dict[str, Any]]]:
    """Folders are bundles, files are evaluations (`moedge eval --json`).

    Raises:
        BundleError: a folder that is none. ReportError: a file that is no evaluation, or no bundle at all.
    """
    bundles: list[Bundle] = []
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
        else:
            bundles.append(Bundle.open(path))
    evaluations = []
    for document, origin in read_documents(files):
        if not is_evaluation(document):
            raise ReportError(f"{origin}: --matrix takes bundles, and results of `moedge eval --json`; this is neither")
        check_evaluation(document, origin)
        evaluations.append(document)
    check_together(evaluations)
    if not bundles:
        raise ReportError("no bundles for the matrix; name the folders that `moedge export` wrote")
    return bundles, evaluations


def make_matrix(
    bundles: Sequence[Bundle],
    profiles: Sequence[str],
    evaluations: Sequence[Mapping[str, Any]] = (),
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
) -> list[MatrixRow]:
    """A row for each bundle and profile, in the order given.

    Raises:
        ProfileError: an unknown profile. UsageError: more tokens than a model has positions.
    """
    rows = []
    for bundle in bundles:
        quantization = bundle.manifest["quantization"]
        name = str(bundle.manifest["model"]["name"])
        weights, group = quantization.get("weights"), quantization.get("group_size")
        for profile in dict.fromkeys(profiles):
            device = load_profile(profile)
            count = devices_needed(bundle.manifest, device, 1, prompt_tokens + new_tokens)
            result = None
            if count is not None:
                result = estimate_devices(
                    bundle.manifest, device, count, prompt_tokens=prompt_tokens, new_tokens=new_tokens
                )
            rows.append(
                MatrixRow(
                    model=name,
                    weights=str(weights),
                    group_size=group,
                    weight_bytes=sum(bundle.sizes.values()),
                    profile=device.name,
                    device=device.title,
                    result=result,
                    evaluation=find_evaluation(evaluations, weights, group, name),
                )
            )
    return rows


def write_matrix(rows: Sequence[MatrixRow], path: str | os.PathLike[str]) -> None:
    """Write the rows as `path`'s suffix says (.html, .md, .csv); a failure leaves nothing behind.

    Raises:
        ReportError: another suffix, or the place cannot be written.
    """
    target = check_suffix(path, SUFFIXES)
    render = {".html": render_html, ".md": render_markdown, ".csv": render_csv}[target.suffix.lower()]
    with staged_file(target, error=ReportError) as staged:
        staged.write_text(render(rows), encoding="utf-8")


def render_html(rows: Sequence[MatrixRow]) -> str:
    """The whole document."""
    from .report_html import page

    models = list(dict.fromkeys(row.model for row in rows))
    workload = _workload(rows)
    header = (
        f'<header><p class="eyebrow">Latency and cost</p><h1>{escape(", ".join(models))}</h1>'
        f'<p class="facts">{escape(workload)}all predicted, nothing measured</p></header>'
    )
    section = '<section><h2>Models on devices</h2><p class="note">{}</p>{}</section>'
    parts = [
        header,
        section.format(escape(_TABLE_NOTE), _table(rows)),
        _chart_section(rows),
        f'<section><h2>How these figures were made</h2><ul class="made">{_made(rows)}</ul></section>',
    ]
    return page(f"Latency and cost: {', '.join(models)}", parts)


def render_markdown(rows: Sequence[MatrixRow]) -> str:
    """A Markdown document with one table."""
    headings = ["model", "weights", "size", "devices", *(name for name, _ in _COLUMNS)]
    lines = ["# Latency and cost", "", f"{_workload(rows)}all predicted.", "", markdown_row(headings)]
    lines.append(markdown_row(["---"] * 4 + ["---:"] * len(_COLUMNS)))
    for row in rows:
        cells = [markdown_text(row.model), markdown_text(_weights(row)), bytes_text(row.weight_bytes)]
        lines.append(markdown_row([*cells, markdown_text(_devices(row)), *(cell(row) for _, cell in _COLUMNS)]))
    return "\n".join([*lines, "", _TABLE_NOTE]) + "\n"


def render_csv(rows: Sequence[MatrixRow]) -> str:
    """CSV_COLUMNS with a header line, figures in full, empty where not known."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    own = {"model", "weights", "group_size", "weight_bytes", "profile", "devices", "bits_per_byte"}
    for row in rows:
        values = [getattr(row, name) if name in own else row.figure(*name.split(".")) for name in CSV_COLUMNS]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


_TABLE_NOTE = (
    "Each model on as few of each device as hold it with its KV cache. Several devices are an estimate on top of an "
    "estimate: they take a token one after the other, so more of them do not make one stream faster. USD a million "
    "tokens: one stream alone, and with as many streams as devices."
)
_COLUMNS: tuple[tuple[str, Any], ...] = (
    ("TTFT expected, ms", lambda row: number(row.figure("ttft_ms", "p50"))),
    ("ITL expected, ms", lambda row: number(row.figure("itl_ms", "p50"))),
    ("ITL low, ms", lambda row: number(row.figure("itl_ms", "low"))),
    ("ITL high, ms", lambda row: number(row.figure("itl_ms", "high"))),
    ("tokens/s", lambda row: number(row.figure("decode_tokens_per_s"))),
    ("USD/h", lambda row: number(row.figure("usd_per_hour"))),
    ("USD/million", lambda row: number(row.figure("usd_per_million_tokens"))),
    ("all busy", lambda row: number(row.figure("usd_per_million_tokens_busy"))),
    ("bits per byte", lambda row: number(row.bits_per_byte, 5)),
)


def _workload(rows: Sequence[MatrixRow]) -> str:
    known = [row.result for row in rows if row.result is not None]
    if not known:
        return ""
    return f"{known[0]['prompt_tokens']} prompt and {known[0]['new_tokens']} new tokens, batch 1; "


def _weights(row: MatrixRow) -> str:
    return f"{row.weights}, group {row.group_size}" if row.group_size else row.weights


def _devices(row: MatrixRow) -> str:
    if row.devices is None:
        return f"{row.device}: does not fit any number of them"
    return row.device if row.devices == 1 else f"{row.devices} x {row.device} (estimated sum)"


def _table(rows: Sequence[MatrixRow]) -> str:
    headings = ("Model", "Devices", "TTFT expected, ms", "ITL expected, ms", "Tokens/s", "USD/h", "USD/million")
    quality = any(row.evaluation is not None for row in rows)
    names = [*headings, *(["Bits per byte"] if quality else [])]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "".join(_line(index, row, quality) for index, row in enumerate(rows, start=1))
    return f'<table class="devices matrix"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _line(index: int, row: MatrixRow, quality: bool) -> str:
    under = f"{_weights(row)}, {bytes_text(row.weight_bytes)}"
    name = f'<th scope="row">{index}. {escape(row.model)}<small>{escape(under)}</small></th>'
    if row.devices is None:
        cells = [("Devices", f'{escape(row.device)}<small class="unfit">does not fit any number of them</small>')]
    else:
        several = row.devices > 1
        title = escape(f"{row.devices} × {row.device}")
        low, high = (number(row.figure("itl_ms", end)) for end in ("low", "high"))
        busy = f"<small>{number(row.figure('usd_per_million_tokens_busy'))} all busy</small>" if several else ""
        cells = [
            ("Devices", title + ("<small>estimated sum</small>" if several else "")),
            ("TTFT expected, ms", number(row.figure("ttft_ms", "p50"))),
            ("ITL expected, ms", f"{number(row.figure('itl_ms', 'p50'))}<small>{low} to {high}</small>"),
            ("Tokens/s", number(row.figure("decode_tokens_per_s"))),
            ("USD/h", number(row.figure("usd_per_hour"))),
            ("USD/million", number(row.figure("usd_per_million_tokens")) + busy),
        ]
        if quality:
            cells.append(("Bits per byte", number(row.bits_per_byte, 5)))
    told = "".join(f'<td data-label="{label}"><span>{value}</span></td>' for label, value in cells)
    return f'<tr class="predicted">{name}{told}</tr>'


def _chart_section(rows: Sequence[MatrixRow]) -> str:
    """Cost over latency; the numbers are those of the table."""
    from .report_chart import Point, scatter
    from .report_html import make_scale

    known = [
        (index, row, latency, cost)
        for index, row in enumerate(rows, start=1)
        if (latency := row.figure("itl_ms", "p50")) is not None
        and (cost := row.figure("usd_per_million_tokens")) is not None
    ]
    if len(known) < 2:
        return ""
    across, up = make_scale(latency for _, _, latency, _ in known), make_scale(cost for *_, cost in known)
    points = [
        Point(
            index,
            latency,
            1 - up.at(cost) / 100,
            "predicted",
            f"{index}: {row.model} {row.weights} on {_devices(row)}, {number(latency)} ms, {number(cost)} USD",
        )
        for index, row, latency, cost in known
    ]
    side = (number(up.high), "USD a million tokens" + (" (logarithmic)" if up.log else ""), number(up.low))
    chart = scatter(points, across, side, "time between tokens, ms; better leftwards and downwards")
    note = "Cost of one stream over its latency; the numbers are the table's rows."
    return f'<section><h2>Cost and latency</h2><p class="note">{note}</p>{chart}</section>'


def _made(rows: Sequence[MatrixRow]) -> str:
    lines = dict.fromkeys(str(row.result["assumptions"]).split(f"; {SOURCE}")[0] for row in rows if row.result)
    said = [f"Roofline: {line}." for line in lines]
    if any((row.devices or 0) > 1 for row in rows):
        said.append(f"Several devices: {SOURCE}.")
    said.append("Prices are the profiles'; `moedge profiles NAME` shows each with its source.")
    return "".join(f"<li>{escape(line)}</li>" for line in said)
