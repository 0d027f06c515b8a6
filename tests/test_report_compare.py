"""Differences against an earlier report: recomputed, judged, shown; quality beside them; the matrix."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from model_manifests import deepseek_v2_lite, olmoe
from test_report import FETCH_OR_RUN, MEASURED, Page, results

from moedge.bundle import Bundle
from moedge.errors import ReportError
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import estimate
from moedge.profiles.fit import check_fit
from moedge.profiles.multi import devices_needed, estimate_devices
from moedge.runtime.report import load_inputs, make_rows, number, render_markdown
from moedge.runtime.report_commands import report_command
from moedge.runtime.report_compare import compare
from moedge.runtime.report_html import render_html
from moedge.runtime.report_matrix import CSV_COLUMNS, make_matrix, render_csv, split_inputs
from moedge.runtime.report_matrix import render_html as render_matrix

EVALUATION: dict[str, Any] = {
    "schema": 1,
    "kind": "eval",
    "model": "DeepSeek-V2-Lite",
    "weights": "int4",
    "group_size": 128,
    "text": "held.txt",
    "text_sha256": "ab",
    "bits_per_byte": 0.71828,
    "perplexity": 5.4321,
    "against": {
        "name": "the checkpoint",
        "kind": "checkpoint",
        "top1_agreement": 0.98765,
        "kl_nats": {"mean": 0.00123, "p50": 0.0001, "p99": 0.0456, "max": 1.0},
    },
}


def slower(share: float) -> list[dict[str, Any]]:
    changed = copy.deepcopy(results())
    measured = changed[2]
    measured["itl_ms"] = {key: value * (1 + share) for key, value in measured["itl_ms"].items()}
    measured["decode_tokens_per_s"] *= 1.25
    return changed


def evaluation(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(EVALUATION) | changes


# Against an earlier report


def test_changes_are_those_of_the_time() -> None:
    comparison = compare(slower(0.12), results(), "old.json", 0.05)
    (row,) = [row for row in comparison.rows if row.name == "cpu int4"]
    found = {change.figure.label: change for change in row.changes}
    assert found["ITL p50, ms"].change == pytest.approx(0.12) and found["ITL p99, ms"].change == pytest.approx(0.12)
    assert found["decode, tokens/s"].change == pytest.approx(1 / 1.25 - 1)
    assert found["TTFT p50, ms"].change == 0 and found["prefill, tokens/s"].change == 0
    assert comparison.failures == ["cpu int4 (512+64 tokens, batch 1, measured): ITL p50 +12.0%"]
    assert compare(slower(0.12), results(), "old.json", 0.12 + 1e-9).failures == []
    assert compare(slower(0.12), results(), "old.json").failures == []


def test_what_got_slower_is_red_in_words_too() -> None:
    text = render_html(slower(0.12), (), compare(slower(0.12), results(), "old.json", 0.05))
    page = Page(text)
    assert "Slower by more than 5%: cpu int4 (512+64 tokens, batch 1, measured): ITL p50 +12.0%." in page.text
    assert text.count('<td class="slower">') == 3 and text.count('<td class="faster">') == 1
    assert "+12.0% slower, above the limit" in page.text and "was 52.1" in page.text and "-20.0% faster" in page.text
    good = render_html(results(), (), compare(results(), results(), "old.json", 0.05))
    assert "Nothing that is judged got slower by more than 5%." in good and 'class="slower"' not in good
    shown = render_markdown(slower(0.12), (), compare(slower(0.12), results(), "old.json", 0.05))
    assert "| **58.4 (+12.0%)** |" in shown and "| 23.6 (-20.0%) |" in shown


def test_runs_that_do_not_match_are_named() -> None:
    now = results()
    now[0]["prompt_tokens"] = 100
    now[2]["versions"] = {"moedge": "9"}
    comparison = compare(now, results(), "old.json")
    assert comparison.only_now == ("rtx4090 int4 (100+64 tokens, batch 1, predicted)",)
    assert comparison.only_before == ("rtx4090 int4 (512+64 tokens, batch 1, predicted)",)
    notes = [note for row in comparison.rows for note in row.notes]
    assert notes == ["versions were moedge 0.1.0, backend 1.31.1, are moedge 9"]
    other = copy.deepcopy(MEASURED) | {"batch": 3}
    with pytest.raises(ReportError) as raised:
        compare([other], [MEASURED], "old.json")
    assert str(raised.value) == (
        "old.json has none of these runs to compare with: it has cpu int4 (512+64 tokens, batch 1, measured); the "
        "results are cpu int4 (512+64 tokens, batch 3, measured)"
    )
    with pytest.raises(ReportError) as mixed:
        compare([copy.deepcopy(MEASURED) | {"model": "other"}], [MEASURED], "old.json")
    assert str(mixed.value) == (
        "old.json is of model DeepSeek-V2-Lite, the results are of other; compare results of one model"
    )


def test_command_fails_above_the_limit_and_writes_first(tmp_path: Path) -> None:
    now, old, target = tmp_path / "now.json", tmp_path / "old.json", tmp_path / "r.html"
    now.write_text(json.dumps(slower(0.12)))
    old.write_text(json.dumps(results()))
    options = [str(now), "-o", str(target), "--against", str(old), "--fail-above"]
    failed = CliRunner().invoke(report_command, [*options, "5%"])
    assert isinstance(failed.exception, ReportError) and target.is_file()
    assert str(failed.exception) == (
        f"slower than {old} by more than 5%: cpu int4 (512+64 tokens, batch 1, measured): ITL p50 +12.0%"
    )
    assert CliRunner().invoke(report_command, [*options, "12.5"]).exit_code == 0
    for wrong, told in (("fast", "'fast' is no percentage; for example 5%"), ("-1", "no percentage of 0 or more")):
        refused = CliRunner().invoke(report_command, [*options, wrong])
        assert refused.exit_code == 2 and told in " ".join(refused.stderr.split())
    alone = CliRunner().invoke(report_command, [str(now), "-o", str(target), "--fail-above", "5%"])
    assert alone.exit_code == 2 and "--fail-above needs --against EARLIER.json" in alone.stderr


# Quality


def test_quality_is_joined_by_weights(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([*results(), evaluation(), evaluation(weights="int8", bits_per_byte=0.7)]))
    found, evaluations = load_inputs([path])
    assert len(found) == 4 and len(evaluations) == 2
    text = render_html(found, evaluations)
    page = Page(text)
    assert not page.open and "Quality, latency, cost" in page.text
    for told in ("0.7183", "98.77% same choice", "98.77%", "0.00123", "0.0456", "5.432", "On held.txt, compared with"):
        assert told in page.text
    assert "0.7000" in page.text  # int8 has no row in the chart, and its line in the table
    chart, cost = (part.split("</figure>")[0] for part in text.split('<figure class="scatter">')[1:])
    priced = [row for row in make_rows(found) if row.usd is not None]
    assert len(priced) == cost.count("<circle") == 3 and f"{number(priced[0].usd)} USD, 0.7183 bits per byte" in cost
    assert chart.count("<circle") == 4
    rows = make_rows(found)
    assert f"2: {rows[1].device}, {number(rows[1].itl.p50)} ms, 0.7183 bits per byte" in chart
    assert number(rows[1].usd) in page.text
    assert "| int4, group 128 | 0.7183 | 5.432 | 98.77% | 0.00123 | 0.0456 |" in render_markdown(found, evaluations)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schema": 2}, "evaluation of schema 2, this version reads schema 1; evaluate again with this version's"),
        ({"bits_per_byte": -1}, "bits_per_byte is -1; a number of 0 or more was expected"),
        ({"perplexity": "low"}, "perplexity is 'low'; a number of 0 or more or null was expected"),
        ({"against": 3}, "against is no comparison; evaluate again"),
        ({"against": {"kl_nats": {}}}, "top1_agreement is None; a number of 0 or more was expected"),
        ({"model": "other"}, "an evaluation is of model other, the results are of DeepSeek-V2-Lite; give evaluations"),
        ({"text_sha256": "cd", "text": "b.txt"}, "evaluations on 2 texts (held.txt, b.txt) do not compare; give those"),
    ],
)
def test_bad_evaluations(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([MEASURED, evaluation(), evaluation(**changes)]))
    with pytest.raises(ReportError) as raised:
        load_inputs([path])
    assert told in str(raised.value) and "\n" not in str(raised.value)
    missing = {key: value for key, value in EVALUATION.items() if key != "text"}
    path.write_text(json.dumps([MEASURED, missing]))
    with pytest.raises(ReportError, match=r"all\.json\[1\]: text missing; evaluate again"):
        load_inputs([path])


# The matrix


def large() -> dict[str, Any]:
    """DeepSeek-V2-Lite in fp16 with eight times the experts: more than one device holds."""
    manifest = deepseek_v2_lite("fp16")
    manifest["model"]["name"] = "Large"
    manifest["config"]["moe"]["num_experts"] *= 8
    manifest["sizes"]["experts"] *= 8
    return manifest


def bundle(manifest: dict[str, Any], folder: Path) -> Bundle:
    folder.mkdir()
    (folder / "moedge.json").write_text(json.dumps(manifest))
    return Bundle.open(folder)


def test_devices_needed_by_hand() -> None:
    manifest, device = large(), load_profile("a100-80gb")
    sizes, fit = manifest["sizes"], check_fit(manifest, device, 1, 576)
    inner = sum(sizes.values()) - sizes["embedding"] - sizes["head"] + fit.cache_bytes
    fixed = sizes["head"] + fit.workspace_bytes + fit.runtime_bytes
    assert fixed + inner * 14 / 27 > device.available_bytes >= fixed + inner * 9 / 27  # two devices, three
    assert devices_needed(manifest, device, 1, 576) == 3
    assert devices_needed(deepseek_v2_lite(), device, 1, 576) == 1
    assert devices_needed(manifest, load_profile("jetson-orin-nano-8gb"), 1, 576) is None


def test_one_device_is_the_estimate_and_more_add_hand_overs() -> None:
    device, manifest = load_profile("rtx4090"), deepseek_v2_lite()
    alone, one = estimate(manifest, device), estimate_devices(manifest, device, 1)
    for key in ("ttft_ms", "itl_ms", "decode_tokens_per_s", "usd_per_million_tokens"):
        assert one[key] == pytest.approx(alone[key])
    four = estimate_devices(manifest, device, 4)
    extra = {"low": 10e-6, "p50": 30e-6, "high": 100e-6}
    for key, latency in extra.items():
        itl = alone["itl_ms"][key] + 1e3 * 3 * (latency + 2 * 2048 / 16e9)
        ttft = alone["ttft_ms"][key] + 1e3 * 2 * 3 * (latency + 2 * 256 * 2048 / 16e9)
        assert four["itl_ms"][key] == pytest.approx(itl) and four["ttft_ms"][key] == pytest.approx(ttft)
    rate = 1e3 / four["itl_ms"]["p50"]
    assert four["decode_tokens_per_s"] == pytest.approx(rate) and four["usd_per_hour"] == pytest.approx(4 * 0.34)
    assert four["usd_per_million_tokens"] == pytest.approx(4 * 0.34 / 3600 / rate * 1e6)
    assert four["usd_per_million_tokens_busy"] == pytest.approx(0.34 / 3600 / rate * 1e6)


def test_matrix(tmp_path: Path) -> None:
    paths = [bundle(large(), tmp_path / "large").path, bundle(olmoe(), tmp_path / "small").path]
    (tmp_path / "e.json").write_text(json.dumps(evaluation(model="OLMoE-1B-7B")))
    bundles, evaluations = split_inputs([*paths, tmp_path / "e.json"])
    rows = make_matrix(bundles, ["a100-80gb", "rtx4090", "jetson-orin-nano-8gb", "rtx4090"], evaluations)
    assert [(row.model, row.profile) for row in rows][:4] == [
        ("Large", "a100-80gb"), ("Large", "rtx4090"), ("Large", "jetson-orin-nano-8gb"), ("OLMoE-1B-7B", "a100-80gb"),
    ]  # fmt: skip
    assert rows[0].devices is not None and rows[0].devices > 1 and rows[2].devices is None and rows[3].devices == 1
    page = Page(render_matrix(rows))
    assert not page.open and {tag for tag, _ in page.tags}.isdisjoint(FETCH_OR_RUN)
    assert page.text.count("estimated sum") == 2 and "does not fit any number of them" in page.text
    assert "0.7183" in page.text and "all predicted, nothing measured" in page.text
    parsed = list(csv.DictReader(io.StringIO(render_csv(rows))))
    assert tuple(parsed[0]) == tuple(CSV_COLUMNS) and len(parsed) == 6
    assert float(parsed[0]["itl_ms.p50"]) == rows[0].figure("itl_ms", "p50")
    assert parsed[2]["devices"] == "" and parsed[3]["bits_per_byte"] == "0.71828"


def test_matrix_command(tmp_path: Path) -> None:
    folder = bundle(olmoe(), tmp_path / "small").path
    options = [str(folder), "--matrix", "-o", str(tmp_path / "m.md")]
    done = CliRunner().invoke(report_command, [*options, "--profile", "rtx4090", "--profile", "a100-80gb"])
    assert done.exit_code == 0 and "| OLMoE-1B-7B | int4, group 128 |" in (tmp_path / "m.md").read_text()
    none = CliRunner().invoke(report_command, options)
    assert none.exit_code == 2 and "--matrix needs devices: --profile NAME" in none.stderr
    (tmp_path / "r.json").write_text(json.dumps(MEASURED))
    wrong = CliRunner().invoke(report_command, [str(tmp_path / "r.json"), *options, "--profile", "rtx4090"])
    assert str(wrong.exception) == (
        f"{tmp_path / 'r.json'}: --matrix takes bundles, and results of `moedge eval --json`; this is neither"
    )
    png = CliRunner().invoke(report_command, [*options[:3], str(tmp_path / "m.png"), "--profile", "rtx4090"])
    assert "the report's format is its suffix; known: .html, .md, .csv" in str(png.exception)
