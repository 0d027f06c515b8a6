"""What the report is given by others: whatever stands in a file, it is a report or one clear line."""

from __future__ import annotations

import copy
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_manifests import deepseek_v2_lite
from rich.console import Console
from test_report import MEASURED
from test_report_compare import evaluation

from moedge.errors import MoedgeError, ReportError
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate
from moedge.runtime import report_input
from moedge.runtime.report import load_inputs, load_results, render_table, write_report
from moedge.runtime.report_commands import report_command
from moedge.runtime.report_compare import compare

HOSTILE: tuple[Any, ...] = (
    None, True, False, "", "x", "\ud800", "\x00\x1b[2J", "<b>", 0, -1, 1e308, 5e-324, 10**400, float("nan"),
    float("inf"), [], {}, [1], {"a": 1}, "NaN", 1e-30, "a" * 100_000, [[[[]]]], {"p50": 1}, "\u202e", 2**63,
)  # fmt: skip
GONE = object()


def places(document: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of nested objects, as a path."""
    if isinstance(document, dict):
        for key, value in document.items():
            yield (*above, key)
            yield from places(value, (*above, key))


def change(document: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        document = document[key]
    if value is GONE:
        del document[place[-1]]
    else:
        document[place[-1]] = value


def test_a_hostile_value_anywhere_is_a_report_or_one_line(tmp_path: Path) -> None:
    """500 files, a value changed at random in each (seed 8): nothing but MoedgeError, of one line that can be read."""
    predicted = estimate(deepseek_v2_lite(), load_profile("rtx4090"))
    sound = {"measured": MEASURED, "predicted": predicted, "evaluation": evaluation()}
    everywhere = [(kind, place) for kind, document in sound.items() for place in places(document)]
    draw = random.Random(8)
    refused = 0
    for _ in range(500):
        kind, place = draw.choice(everywhere)
        value = draw.choice((*HOSTILE, GONE))
        documents = copy.deepcopy(sound)
        change(documents[kind], place, value)
        path = tmp_path / "given.json"
        path.write_text(json.dumps(list(documents.values())))
        try:
            results, evaluations = load_inputs([path])
            changes = compare(results, [MEASURED], "earlier", 0.05)
            for suffix in (".html", ".md", ".csv"):
                target = tmp_path / f"report{suffix}"
                write_report(results, target, evaluations=evaluations, comparison=changes)
                assert target.stat().st_size < 1_000_000
            Console(file=io.StringIO(), width=80).print(render_table(results))
        except MoedgeError as error:
            refused += 1
            assert len(str(error)) < 1000 and len(str(error).splitlines()) == 1, (kind, place, value)
    assert 100 < refused < 450


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        (b"", "not readable as JSON (Expecting value: line 1 column 1 (char 0)); make results with `moedge bench "),
        (b"\x9a\x00\x01", "not readable as JSON (not text: invalid start byte at byte 0)"),
        (b'{"a":' * 50_000, "not readable as JSON (objects or lists too deep in one another)"),
        (b"9" * 5000, "not readable as JSON (a number of thousands of digits)"),
        (b"null", "no bench result (it has no schema); make results with `moedge bench --json`"),
        (b"[[], []]", "[0]: no bench result (it has no schema); "),
        (b'{"schema": true}', "result of schema True, this version reads schema 1; measure again"),
        (b'{"schema": "' + b"a" * 9999 + b'"}', "result of schema 'aaa"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, raw: bytes, told: str) -> None:
    path = tmp_path / "given.json"
    path.write_bytes(raw)
    with pytest.raises(ReportError) as raised:
        load_results([path])
    assert str(raised.value).startswith(f"{path}") and told in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"decode_tokens_per_s": 1e308}, "decode_tokens_per_s is 1e+308, which no such figure can be; measure again"),
        ({"peak_memory_bytes": 10**400}, "peak_memory_bytes is a number of more than 20 digits, which no such figure"),
        ({"weights": {}}, "weights is {}; a text or null was expected"),
        ({"versions": 3}, "versions is 3; an object was expected"),
        ({"device": "a" * 501}, "device has 501 characters; at most 500 were expected"),
        ({"machine": {"cpu": "\ud800"}}, r"'\ud800' is not Unicode text; write the file again"),
        ({"model_info": {"layers": float("nan")}}, "nan stands in it, which no figure can be; measure again"),
    ],
)
def test_values_that_no_result_has(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ReportError) as raised:
        report_input.check_result(MEASURED | changes, "given")
    assert str(raised.value).startswith(f"given: {told}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_results_in_what_a_shell_writes(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "given.json"
    path.write_text(json.dumps(MEASURED, ensure_ascii=False), encoding=encoding)
    assert load_results([path]) == [MEASURED]


def test_a_file_without_end_and_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_input, "_LARGEST_FILE", 1 << 20)
    with pytest.raises(ReportError, match="/dev/zero: larger than 1 MiB: no result of `moedge bench --json`"):
        load_results(["/dev/zero"])
    with pytest.raises(ReportError, match="not readable \\(Is a directory\\)"):
        load_results([tmp_path])


def test_an_output_that_cannot_be_one(tmp_path: Path) -> None:
    source = tmp_path / "given.json"
    source.write_text(json.dumps(MEASURED))
    (tmp_path / "folder.html").mkdir()
    for target, told in (
        ("folder.html", f"{tmp_path / 'folder.html'} is a folder, not a file; name an output file"),
        ("given.json/r.html", f"{source} is a file, not a folder; name another output file"),
        (f"{'a' * 300}.html", "cannot be written (File name too long)"),
    ):
        with pytest.raises(ReportError) as raised:
            CliRunner().invoke(report_command, [str(source), "-o", str(tmp_path / target)], catch_exceptions=False)
        assert told in str(raised.value)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "folder.html", source]
