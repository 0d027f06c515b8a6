"""Routes of a text: the figures recomputed from the raw routes, every format, and what is refused."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner
from test_report import Page

import moedge
from moedge.errors import DependencyError, EngineError, ReportError, UsageError
from moedge.runtime.preflight import read_engine
from moedge.runtime.trace import Trace, compare_loads, trace, write_trace
from moedge.runtime.trace_commands import trace_command
from moedge.runtime.trace_html import render_html
from moedge.runtime.trace_load import Load

EVIL = '</script><script>alert(1)</script><!-- "&\'><b>'
FIRST, SECOND = "def main(a):\n\treturn 'Zoë 東京'", EVIL * 3


@pytest.fixture(scope="module")
def traced(tiny_bundle: Path) -> Trace:
    return trace(tiny_bundle, [("one", FIRST), (EVIL, SECOND)], threads=1)


def test_document_against_the_engine(traced: Trace, tiny_bundle: Path) -> None:
    document = json.loads(json.dumps(traced.to_json(), allow_nan=False))
    with moedge.load(tiny_bundle, threads=1) as engine:
        assert document["layers"] == list(engine.info.moe_layers) and document["num_experts"] == 8
        for text, given in zip(document["texts"], (FIRST, SECOND), strict=True):
            ids = engine.tokenize(given)
            assert [token["id"] for token in text["tokens"]] == ids
            assert "".join(token["text"] for token in text["tokens"]) == given
            routing = engine.routing(ids)
            np.testing.assert_array_equal(text["experts"], routing.experts)
            np.testing.assert_allclose(text["weights"], routing.weights, atol=1e-6)
            assert text["total_tokens"] == len(ids)
            for row, taken in zip(text["load"], routing.experts, strict=True):
                assert row["counts"] == [int((taken == expert).sum()) for expert in range(8)]
    assert document["overhead"]["plain_ms"] > 0 < document["overhead"]["traced_ms"]


def test_load_figures_by_hand() -> None:
    load = Load(3, np.array([4, 2, 2, 0]), np.array([2.0, 1.0, 1.0, 0.0]))
    assert load.share.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert load.mean_over_max == 0.5 and load.unused == 1
    assert load.entropy == pytest.approx((0.5 * 1 + 2 * 0.25 * 2) / 2)  # bits over the 2 bits of four equal shares
    assert load.variation == pytest.approx(np.std([4, 2, 2, 0]) / 2)
    even = Load(0, np.array([5, 5]), np.array([1.0, 1.0]))
    assert (even.mean_over_max, even.entropy, even.variation) == (1.0, pytest.approx(1.0), 0.0)
    nothing = Load(0, np.array([0, 0]), np.array([0.0, 0.0]))
    assert (nothing.mean_over_max, nothing.entropy, nothing.variation) == (0.0, 0.0, 0.0)


def test_comparison_by_hand() -> None:
    one, two = ([Load(5, np.array(counts), np.zeros(3))] for counts in ([2, 2, 0], [0, 2, 2]))
    found = compare_loads(one, two)
    assert found["layers"] == [
        {"layer": 5, "total_variation": 0.5, "jensen_shannon_bits": pytest.approx(0.5)}
    ]  # half of each is alone
    assert found["mean_total_variation"] == 0.5
    assert found["largest"][0] == {"layer": 5, "expert": 0, "shares": [0.5, 0.0]}
    assert compare_loads(one, one)["mean_total_variation"] == 0


def test_html_is_self_contained_and_escapes(traced: Trace) -> None:
    text = render_html(traced)
    page = Page(text)
    assert not page.open
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    assert "@import" not in text and "url(" not in text.replace("url(#hatch)", "")
    assert text.count("<script") == 2 and text.count("</script") == 2
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "onload", "onclick"} & set(attributes)
        assert attributes.get("href") in (None, "data:,") and (tag == "link") == ("href" in attributes)
    assert EVIL in page.text


def test_html_data_are_the_routes(traced: Trace) -> None:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', render_html(traced), re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    assert data["layers"] == list(traced.layers) and data["k"] == 2
    for text, given in zip(data["texts"], traced.texts, strict=True):
        assert text["pieces"] == given.pieces and text["counts"] == [row.counts.tolist() for row in given.loads]
        shape = given.routing.experts.shape
        experts = np.frombuffer(base64.b64decode(text["experts"]), "<u2").reshape(shape)
        weights = np.frombuffer(base64.b64decode(text["weights"]), np.uint8).reshape(shape)
        np.testing.assert_array_equal(np.sort(experts, -1), np.sort(given.routing.experts, -1))
        assert (weights[..., 0] >= weights[..., 1]).all()
        share = given.routing.weights / given.routing.weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights / 255, -np.sort(-share, -1), atol=0.5 / 255 + 1e-6)


def test_html_map_draws_each_load(traced: Trace) -> None:
    """Every cell of the first heat map, from its rectangles: its step is that of the load over an even one."""
    first = render_html(traced).split("<svg data-map")[1].split("</svg>")[0]
    steps = np.zeros((len(traced.layers), 8), int)
    for step, x, y, width in re.findall(r'class="h(\d)" x="(\d+)" y="(\d+)" width="(\d+)"', first):
        steps[int(y), int(x) : int(x) + int(width)] = int(step)
    for row, load in zip(steps, traced.texts[0].loads, strict=True):
        bounds = (0, 0.25, 0.5, 0.75, 1.25, 2, 3, 5)
        assert row.tolist() == [sum(value * 8 > bound for bound in bounds) for value in load.share]


def test_png(traced: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    write_trace(traced, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="matplotlib is not installed .needed to draw the trace as a PNG."):
        write_trace(traced, tmp_path / "no.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.png"]


def test_a_long_text_goes_through_in_windows(tmp_path: Path) -> None:
    """The fake engine has room for 64 tokens: each window begins with an empty context."""
    folder = fake_engine.write_bundle(tmp_path / "bundle")
    found = trace(folder, [("long", "abcdefgh" * 20)], max_tokens=150)
    (text,) = found.texts
    assert (len(text.ids), text.total_tokens) == (150, 160) and text.routing.experts.shape == (1, 150, 2)
    with moedge.load(folder) as engine:
        np.testing.assert_array_equal(text.routing.experts[:, 64:128], engine.routing(text.ids[64:128]).experts)
    assert "the first 150 of 160 tokens" in render_html(found) and found.comparison is None


def test_refusals(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: Trace) -> None:
    with pytest.raises(UsageError, match="^0 texts to trace; give one, or two to compare$"):
        trace(tiny_bundle, [])
    with pytest.raises(UsageError, match="^empty: the text has no tokens; give a longer one$"):
        trace(tiny_bundle, [("empty", "")])
    with pytest.raises(ReportError) as raised:
        write_trace(traced, tmp_path / "t.pdf")
    assert str(raised.value) == f"{tmp_path / 't.pdf'}: the trace's format is its suffix; known: .html, .json, .png"
    folder = fake_engine.write_bundle(tmp_path / "bundle")
    real = read_engine

    def without_experts(*given: Any) -> Any:
        info = real(*given)
        object.__setattr__(info, "moe_layers", ())
        return info

    monkeypatch.setattr("moedge.runtime.engine.read_engine", without_experts)
    with pytest.raises(EngineError) as no_experts:
        trace(folder, [("text", "abc")])
    assert str(no_experts.value) == f"{folder} has no mixture-of-experts layers: there are no routes to trace"


def test_command(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one two three")
    options = [str(tiny_bundle), "-p", "four\nfive", "--text", str(path), "--max-tokens", "10", "--threads", "1"]
    done = CliRunner().invoke(trace_command, [*options, "-o", str(tmp_path / "t.json")])
    assert done.exit_code == 0 and done.stdout == ""
    assert "text.txt: traced the first 10 of 13 tokens; more with --max-tokens" in done.stderr
    document = json.loads((tmp_path / "t.json").read_text())
    assert [text["name"] for text in document["texts"]] == ["four five", "text.txt"]
    none = CliRunner().invoke(trace_command, [str(tiny_bundle), "-o", str(tmp_path / "t.html")])
    assert none.exit_code == 2 and "give one text, or two to compare: -p TEXT or --text FILE" in none.stderr
