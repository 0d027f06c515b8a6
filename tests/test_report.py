"""The latency report: what it refuses, and that every format says what the JSON says."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_manifests import deepseek_v2_lite
from rich.console import Console

from moedge.errors import DependencyError, ReportError
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate
from moedge.runtime.report import (
    CSV_COLUMNS,
    load_results,
    make_rows,
    number,
    render_csv,
    render_markdown,
    render_table,
    write_report,
)
from moedge.runtime.report_breakdown import parts_of
from moedge.runtime.report_commands import report_command
from moedge.runtime.report_html import make_scale, render_html

MEASURED: dict[str, Any] = {
    "schema": 1,
    "model": "DeepSeek-V2-Lite",
    "profile": "cpu",
    "backend": "onnxruntime",
    "device": "AMD EPYC <9354>",
    "weights": "int4",
    "group_size": 128,
    "batch": 1,
    "prompt_tokens": 512,
    "new_tokens": 64,
    "threads": 2,
    "repeat": 5,
    "load_s": 12.25,
    "ttft_ms": {"p50": 9000.5, "p90": 9900.0, "p99": 12000.0},
    "itl_ms": {"p50": 52.125, "p90": 61.0, "p99": 80.1},
    "prefill_tokens_per_s": 56.88,
    "decode_tokens_per_s": 18.9,
    "peak_memory_bytes": 8_900_000_000,
    "bundle_bytes": 8_700_000_000,
    "bytes_per_token": 1_450_000_000,
    "bandwidth_bytes_per_s": 27.4e9,
    "bandwidth_limit_bytes_per_s": 30.1e9,
    "fraction_of_limit": 0.9102990033222591,
    "energy_j_per_token": None,
    "measured": True,
    "created": "2026-11-20T10:00:00+00:00",
    "versions": {"moedge": "0.1.0", "backend": "1.31.1"},
    "machine": {"cpu": "AMD EPYC <9354>", "cores": 2, "gpus": []},
    "energy_reason": "no counters",
}


FETCH_OR_RUN = {"script", "iframe", "img", "object", "embed", "base", "form", "audio", "video"}


def results() -> list[dict[str, Any]]:
    names = ("rtx4090", "a100-80gb", "jetson-orin-nano-8gb")
    predicted = [estimate(deepseek_v2_lite(), load_profile(name)) for name in names]
    return [*predicted[:2], copy.deepcopy(MEASURED), predicted[2]]


def changed(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(MEASURED) | changes


def test_files_hold_one_result_or_a_list(tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    one.write_text(json.dumps(MEASURED))
    made = json.dumps(results())  # once: they say when
    many.write_text(made)
    assert load_results([one, many]) == [MEASURED, *json.loads(made)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not readable as JSON (Expecting property name enclosed in double quotes"),
        ("[" * 100_000, "not readable as JSON ("),
        (b"\xff\xfe", "not readable as JSON ("),
        ("[]", "no results to report; make some with `moedge bench --json` or `moedge estimate --json`"),
        ("3", "no bench result (it has no schema); make results with `moedge bench --json`"),
        ('{"loss": 3}', "no bench result (it has no schema); make results with `moedge bench --json`"),
        (changed(schema=2), "result of schema 2, this version reads schema 1; measure again with this version's"),
        (changed(model=7), "model is 7; a text was expected"),
        (changed(measured="yes"), "measured is 'yes'; true or false was expected"),
        (changed(batch=None), "batch is None; a number of 0 or more was expected"),
        (changed(decode_tokens_per_s="fast"), "decode_tokens_per_s is 'fast'; a number of 0 or more or null was"),
        (changed(decode_tokens_per_s=-1), "decode_tokens_per_s is -1; a number of 0 or more or null was expected"),
        (changed(load_s=float("nan")), "load_s is nan; a number of 0 or more or null was expected"),
        (changed(usd_per_million_tokens="<b>"), "usd_per_million_tokens is '<b>'; a number of 0 or more or null was"),
        (changed(itl_ms=12.0), "itl_ms is 12.0; percentiles p50, p90, p99 were expected"),
        (changed(itl_ms={"p50": 1.0, "p90": 2.0}), "itl_ms.p99 missing; measure again with this version's"),
        (changed(itl_ms={"p50": None, "p90": 2, "p99": 3}), "itl_ms.p50 is None; a number of 0 or more was expected"),
        (
            changed(itl_ms={"p50": 3.0, "p90": 2.0, "p99": 4.0}),
            "itl_ms: p50, p90, p99 do not grow (3.0, 2.0, 4.0); measure again",
        ),
        (
            {key: value for key, value in MEASURED.items() if key not in ("itl_ms", "threads")},
            "threads, itl_ms missing; make results with `moedge bench --json` or `moedge estimate --json`",
        ),
    ],
)
def test_bad_results_are_one_clear_line(tmp_path: Path, content: Any, told: str) -> None:
    path = tmp_path / "bad.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ReportError) as raised:
        load_results([path])
    assert told in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ") or told.startswith("no results")


def test_a_bad_one_of_a_list_is_named(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps([MEASURED, changed(schema=9)]))
    with pytest.raises(ReportError, match=r"list\.json\[1\]: result of schema 9"):
        load_results([path])


def test_missing_file_and_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(ReportError) as raised:
        load_results([path])
    assert str(raised.value) == f"{path}: no such file; make results with `moedge bench --json {path}`"
    with pytest.raises(ReportError) as raised:
        load_results([tmp_path])
    mend = "make results with `moedge bench --json` or `moedge estimate --json`"
    assert str(raised.value) == f"{tmp_path}: not readable (Is a directory); {mend}"


def test_mixed_models(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, model in zip(paths, ("small", "large"), strict=True):
        path.write_text(json.dumps(changed(model=model)))
    with pytest.raises(ReportError) as raised:
        load_results(paths)
    told = f"results of 2 models in one report: small ({paths[0]}), large ({paths[1]}); make one report for each model"
    assert str(raised.value) == told


def test_unknown_suffix_and_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ReportError) as raised:
        write_report([MEASURED], tmp_path / "r.pdf")
    told = f"{tmp_path / 'r.pdf'}: the report's format is its suffix; known: .html, .md, .csv, .png"
    assert str(raised.value) == told
    with pytest.raises(ReportError, match="no results to report"):
        write_report([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []


def test_measured_rows_come_first() -> None:
    assert [row.kind for row in make_rows(results())] == ["measured", "predicted", "predicted", "predicted"]


def test_csv_parses_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    write_report(results(), path)
    parsed = list(csv.DictReader(io.StringIO(path.read_text())))
    given = [results()[2], results()[0], results()[1], results()[3]]
    assert len(parsed) == 4 and tuple(parsed[0]) == tuple(CSV_COLUMNS)
    for read, result in zip(parsed, given, strict=True):
        for column in set(CSV_COLUMNS) - {"created"}:
            value: Any = result
            for key in column.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is None:
                assert read[column] == ""
            elif isinstance(value, bool):
                assert read[column] == str(value).lower()
            else:
                assert type(value)(read[column]) == value, column


def test_markdown_is_one_table() -> None:
    text = render_markdown([changed(device="a|b <i> *c*"), *results()[:1]])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len(lines) == 4 and {len(row) for row in cells} == {14}
    assert cells[2][0].strip() == r"a\|b &lt;i> \*c\*"
    assert [cell.strip() for cell in cells[2][3:9]] == ["9,000", "9,900", "12,000", "52.1", "61.0", "80.1"]
    assert cells[2][1].strip() == "measured" and cells[3][1].strip() == "*predicted*"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside style and title."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.text += data


def test_html_is_self_contained_and_well_formed() -> None:
    text = render_html(results())
    page = Page(text)
    assert not page.open
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "@import" not in text and "url(" not in text.replace("url(#hatch)", "")
    names = {tag for tag, _ in page.tags}
    assert not names & FETCH_OR_RUN
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "onload", "onclick", "style"} & set(attributes)
        assert attributes.get("href") in (None, "data:,") and (tag == "link") == ("href" in attributes)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags


def test_html_escapes_what_it_is_given() -> None:
    evil = '<script>alert(1)</script>"&\'><b>'
    nasty = changed(
        model=evil,
        device=evil,
        profile=evil,
        backend=evil,
        weights=evil,
        created=evil,
        machine={"cpu": evil},
        versions={evil: evil},
        limit_note=evil,
        model_info={"family": evil, "layers": evil, "experts": evil},
    )
    predicted = copy.deepcopy(nasty) | {"measured": False, "assumptions": evil, "fits": False}
    page = Page(render_html([nasty, predicted]))
    assert not page.open and "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(evil) > 10


def test_html_says_what_the_json_says() -> None:
    page = Page(render_html(results()))
    latencies = ("9,000", "p90 9,900, p99 12,000", "52.1", "p90 61.0, p99 80.1")
    for told in (*latencies, "18.9", "91%", "8.3 GiB", "AMD EPYC <9354>"):
        assert told in page.text
    for result in results():
        if not result["measured"]:
            times = result["itl_ms"]
            assert f"{number(times['low'])} to {number(times['high'])}" in page.text
    assert "does not fit" in page.text and page.text.count("measured") > 5 < page.text.count("predicted")
    assert "1 measured, 3 predicted" in page.text and "no counters" in page.text and "backend 1.31.1" in page.text


def test_html_draws_each_percentile_at_its_place() -> None:
    """Positions in the ITL chart, recomputed from the raw figures: a log scale from 1 to 100 ms."""
    chart = render_html(results()).split("Time between tokens")[1].split("</ul>")[0]
    measured = chart.split('aria-label="AMD EPYC')[1].split("</svg>")[0]
    def place(value: float) -> str:
        return f'{100 * math.log10(value) / 2:.2f}%"'

    assert f'<circle cx="{place(52.125)}' in measured
    ticks = re.findall(r'class="tick" x1="([\d.]+%")', measured)
    assert ticks == [place(61.0), place(80.1)]
    assert "measured: p50 52.1 ms, p90 61.0 ms, p99 80.1 ms" in chart
    band = results()[0]["itl_ms"]
    line = chart.split('aria-label="NVIDIA GeForce RTX 4090')[1].split("</svg>")[0]
    assert f'class="band" x1="{place(band["low"])} x2="{place(band["high"])}' in line


def test_scale_holds_everything() -> None:
    linear = make_scale([3.0, 7.0, 19.0])
    assert (linear.low, linear.high, linear.log, linear.ticks) == (0.0, 20.0, False, (0.0, 5.0, 10.0, 15.0, 20.0))
    far = make_scale([0.5, 700.0])
    assert far.log and (far.low, far.high) == (0.1, 1000.0)
    assert far.at(10.0) == pytest.approx(50) and far.at(0.1) == 0 and far.at(1000.0) == pytest.approx(100)
    assert make_scale([]).ticks[0] == 0 and make_scale([0.0]).at(0.0) == 0
    for values in ([1e-3], [1.0, 19.9], [5e9, 6e9], [1e-6, 1e9]):
        scale = make_scale(values)
        assert all(0 <= scale.at(value) <= 100 for value in values) and 2 <= len(scale.ticks) <= 7


def test_png_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.png"
    write_report([changed(model="a $b$ c"), changed(model="a $b$ c", device="$x_{", measured=False)], path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match=r"matplotlib is not installed .*pip install 'moedge\[report\]'"):
        write_report([MEASURED], tmp_path / "r.png")
    assert list(tmp_path.iterdir()) == []


def test_terminal_table_fits_80_columns() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(render_table(results()))
    text = out.getvalue()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert re.search(r"cpu +┃|cpu +│", text) and "jetson-orin-nano-8gb" in text
    assert text.count("measured") == 2 and "predicted: no fit" in text and "52.1" in text and "80.1" in text


def test_every_table_names_its_times() -> None:
    """A prediction has no percentiles, and is not said to have."""
    mixed, alone = results(), [result for result in results() if not result["measured"]]
    told = "TTFT: time to first token. ITL: time between tokens."
    both = f"{told} Predicted rows: the expected time instead of p50, then low and high."
    cases = ((mixed, ("p50", "p90", "p99"), "p99", both), (alone, ("expected", "low", "high"), "low-high", told))
    for rows, (first, *rest), under, note in cases:
        document = render_markdown(rows)
        assert " | ".join(f"ITL {name}, ms" for name in (first, *rest)) in document and document.endswith(f"\n{note}\n")
        page = render_html(rows)
        assert f'<th scope="col">ITL<small>{first}, ms</small>' in page and note in page
        out = io.StringIO()
        Console(file=out, width=80).print(render_table(rows))
        head = re.sub("[┃│]", " ", out.getvalue().split("━")[0]).splitlines()
        assert [line.split().count(word) for line, word in zip(head[-2:], (first, under), strict=True)] == [2, 2]
        assert note in " ".join(out.getvalue().split())


def test_numbers_have_three_digits() -> None:
    values = (None, 0, 0.00123, 0.0456, 1, 9.994, 31.42, 314.2, 3142.4, 1234567.8)
    assert [number(value) for value in values] == [
        "-", "0", "0.0012", "0.0456", "1.00", "9.99", "31.4", "314", "3,142", "1,234,568",
    ]  # fmt: skip


def test_command(tmp_path: Path) -> None:
    source, target = tmp_path / "r.json", tmp_path / "new" / "r.html"
    source.write_text(json.dumps(results()))
    done = CliRunner().invoke(report_command, [str(source), "-o", str(target)])
    assert done.exit_code == 0 and done.stderr == f"wrote {target}\n" and done.stdout == ""
    assert target.read_text().startswith("<!doctype html>")
    assert list(target.parent.iterdir()) == [target]


def test_a_device_with_several_weights_is_told_apart() -> None:
    rows = make_rows([changed(weights="int4"), changed(weights="int8"), changed(profile="other", device="Other")])
    assert [row.profile for row in rows] == ["cpu int4", "cpu int8", "other"]
    assert all(row.device.endswith(end) for row, end in zip(rows, ("(int4)", "(int8)", "Other"), strict=True))


def test_a_sweep_is_told_apart_by_what_differs() -> None:
    swept = [changed(batch=batch, context_tokens=context) for batch in (1, 8) for context in (0, 4096)]
    rows = make_rows([*swept, results()[0]])
    assert [row.profile for row in rows] == [
        "cpu batch 1, context 0", "cpu batch 1, context 4096", "cpu batch 8, context 0", "cpu batch 8, context 4096",
        "rtx4090",
    ]  # fmt: skip
    assert rows[3].workload == "512 prompt and 64 new tokens behind 4,096, batch 8"
    text = render_html([changed(prompt_tokens=count) for count in range(1, 14)])
    assert text.count('<table class="figures">') == 3 and not Page(text).open  # six columns each, for paper
    assert list(csv.DictReader(io.StringIO(render_csv(swept))))[1]["context_tokens"] == "4096"


def test_where_a_steps_time_goes() -> None:
    """Shares of the measured operations, and of a prediction's parts, which add up to its inter-token latency."""
    decode = [{"op": "MatMul", "nodes": 2, "ms": 3.0, "share": 0.6}, {"op": "<b>", "nodes": 1, "ms": 1.0, "share": 0.2}]
    predicted = results()[0]
    assert sum(row["ms"] for row in predicted["per_op"]) == pytest.approx(predicted["itl_ms"]["p50"])
    both = [changed(breakdown={"decode": decode, "prefill": []}), predicted, changed(profile="other")]
    assert parts_of(both[0]) == [("MatMul", 0.75), ("<b>", 0.25)] and parts_of(both[2]) == []
    text = render_html(both)
    section = text.split("Where a step&#x27;s time goes")[1].split("</section>")[0]
    assert "MatMul 75%, &lt;b&gt; 25%" in section and 'width="75.00%"' in section
    assert section.count("<li") == 2 and "experts" in section and not Page(text).open
    for broken in (3, {"decode": 3}, {"decode": [3, {"op": {}, "ms": "x"}, {"ms": -1.0}]}):
        assert "time goes" not in render_html([changed(breakdown=broken)])
