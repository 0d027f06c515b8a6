"""Scores of a text: against the same sums made otherwise, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner

import moedge
from moedge.errors import DependencyError, EngineError, UsageError
from moedge.runtime.eval import evaluate, make_stream, read_text_file, windows
from moedge.runtime.eval_commands import eval_command

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TEXT = "def main(argument):\n    return argument + 1  # Zoë's\r\n" * 3


@pytest.fixture(scope="module")
def result(tiny_bundle: Path, tiny_checkpoint: Path) -> dict[str, Any]:
    return evaluate(tiny_bundle, TEXT, against=tiny_checkpoint, context=32, stride=12, threads=1)


@pytest.mark.parametrize(("context", "stride"), [(512, 256), (8, 4), (8, 8), (8, 1), (7, 3), (1, 1)])
@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 31, 800])
def test_windows_score_each_token_once(context: int, stride: int, count: int) -> None:
    targets: list[int] = []
    for start, stop, first in windows(count, context, stride):
        assert 0 <= start <= first < stop <= count - 1 and stop - start <= context
        assert start == 0 or first - start == context - stride
        targets += range(first + 1, stop + 1)
    assert targets == list(range(1, count))


def test_figures_by_other_means(result: dict[str, Any], tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    """torch's log_softmax over transformers' and the engine's logits, token by token."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, torch_dtype=torch.float32)
    nats, other, same, divergence = 0.0, 0.0, 0, []
    with moedge.load(tiny_bundle, threads=1) as engine, torch.no_grad():
        stream, start = make_stream(engine, TEXT)
        assert stream[0] == start and stream[1:].tolist() == list(TEXT.encode())
        for place in range(1, len(stream)):
            window = max(0, math.ceil((place - 32) / 12)) * 12
            ids = stream[window:place]
            ours = torch.log_softmax(torch.from_numpy(engine.logits(ids)[-1]).double(), -1)
            theirs = torch.log_softmax(model(torch.from_numpy(ids)[None]).logits[0, -1].double(), -1)
            nats -= float(ours[stream[place]])
            other -= float(theirs[stream[place]])
            same += int(ours.argmax() == theirs.argmax())
            divergence.append(float(torch.nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)))
    count, size = len(stream) - 1, len(TEXT.encode())
    assert result["tokens"] == result["scored_tokens"] == count and result["bytes"] == size
    assert result["nats"] == pytest.approx(nats, rel=1e-5)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4)
    against = result["against"]
    assert (against["name"], against["kind"]) == (tiny_checkpoint.name, "checkpoint")
    assert against["bits_per_byte"] == pytest.approx(other / math.log(2) / size, rel=1e-4)
    assert against["top1_agreement"] == pytest.approx(same / count)
    assert against["kl_nats"]["mean"] == pytest.approx(np.mean(divergence), rel=1e-3)
    assert against["kl_nats"]["p99"] == pytest.approx(np.percentile(divergence, 99), rel=1e-2)


def test_same_definition_as_the_sample_models_card(
    result: dict[str, Any], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import distill_train

    monkeypatch.setattr(distill_train, "CONTEXT", 32)
    monkeypatch.setattr(distill_train, "STRIDE", 16)
    found = evaluate(tiny_bundle, TEXT, context=32, threads=1)
    assert found["stride"] == 16
    with moedge.load(tiny_bundle, threads=1) as engine:
        stream, end = make_stream(engine, TEXT)
        whole = np.append(stream, end)  # the card's stream ends with the end token, which is not scored
        wanted = distill_train.bits_per_byte(engine.logits, whole, len(TEXT.encode()), end)
    assert found["bits_per_byte"] == pytest.approx(wanted, rel=1e-9)


def test_against_itself(tiny_bundle: Path) -> None:
    found = evaluate(tiny_bundle, TEXT, against=tiny_bundle, context=64, threads=1)
    assert found["against"]["top1_agreement"] == 1.0 and found["against"]["kind"] == "bundle"
    assert found["against"]["kl_nats"]["max"] < 1e-9
    assert found["against"]["bits_per_byte"] == pytest.approx(found["bits_per_byte"])


def test_routing_utilization(result: dict[str, Any], tiny_bundle: Path) -> None:
    with moedge.load(tiny_bundle, threads=1) as engine:
        stream, _ = make_stream(engine, TEXT)
        parts = [engine.routing(stream[start : start + 32][: len(stream) - 1 - start]) for start in
                 range(0, len(stream) - 1, 32)]  # fmt: skip
        layers, experts = engine.info.moe_layers, engine.info.num_experts
    taken = np.concatenate([part.experts for part in parts], axis=1)
    assert [row["layer"] for row in result["routing"]] == list(layers)
    for row, of_layer in zip(result["routing"], taken, strict=True):
        counts = [int((of_layer == expert).sum()) for expert in range(experts)]
        assert row["counts"] == counts and sum(counts) == 2 * (len(stream) - 1)
        assert row["mean_over_max"] == pytest.approx(np.mean(counts) / max(counts))
        assert row["coefficient_of_variation"] == pytest.approx(np.std(counts) / np.mean(counts))
        share = np.array(counts) / sum(counts)
        assert row["entropy"] == pytest.approx(-(share[share > 0] * np.log2(share[share > 0])).sum() / 3)
        assert row["unused"] == counts.count(0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "{}: no such file; give a UTF-8 text file"),
        (b"", "{} is empty; give a UTF-8 text file"),
        (b"PK\x03\x04\x00\x00", "{} is not text (byte 4 is zero); give a UTF-8 text file"),
        (b"caf\xe9 noir", "{} is not UTF-8 (byte 3); give a UTF-8 text file, converted if need be"),
        (b"\xff\xfeh\x01", "{} is not UTF-8 (byte 0); give a UTF-8 text file, converted if need be"),
    ],
)
def test_what_is_no_text(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError) as raised:
        read_text_file(path)
    assert str(raised.value) == told.format(path)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        read_text_file(tmp_path)
    assert str(raised.value) == f"{tmp_path}: not readable (Is a directory); give a UTF-8 text file"


def test_refusals(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=r"^context is 9000; engine 'cpu' has room for 1 to \d+ tokens$"):
        evaluate(tiny_bundle, TEXT, context=9000)
    with pytest.raises(UsageError, match=r"^stride is 9; it must be from 1 to the context \(8\)$"):
        evaluate(tiny_bundle, TEXT, context=8, stride=9)
    with pytest.raises(UsageError, match="^the text has no tokens; give a longer one$"):
        evaluate(tiny_bundle, "")
    other = fake_engine.write_bundle(tmp_path / "other")
    with pytest.raises(EngineError) as raised:
        evaluate(tiny_bundle, TEXT, against=other)
    assert str(raised.value) == (
        f"{other} has 300 tokens and {tiny_bundle} 320: they are not of one model, and only bits per byte compares "
        "them; evaluate each by itself"
    )
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError) as missing:
        evaluate(tiny_bundle, TEXT, against=tiny_checkpoint)
    assert str(missing.value) == (
        "transformers is not installed (needed to run a checkpoint as the reference); install it: "
        "pip install 'moedge[eval]'"
    )


def test_command(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    options = [str(tiny_bundle), "--text", str(path), "--context", "32", "--threads", "1"]
    shown = CliRunner().invoke(eval_command, [*options, "--json"])
    document = json.loads(shown.stdout)
    assert document["schema"] == 1 and document["kind"] == "eval" and document["text"] == "text.txt"
    assert document["against"] is None and document["weights"] == "int4"
    written = CliRunner().invoke(eval_command, [*options, "--against", str(tiny_bundle), "--json", str(tmp_path / "e")])
    assert written.exit_code == 0, written.output
    assert json.loads((tmp_path / "e").read_text())["nats"] == document["nats"]
    assert f"{document['bits_per_byte']:.4f}" in written.stdout and "100.00%" in written.stdout
