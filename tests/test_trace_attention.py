"""Attention in a trace: equal to transformers' own, in every form; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_engine
import numpy as np
import pytest
from checkpoints import make_model as make_deepseek
from click.testing import CliRunner
from family_cases import make_model, save_model

import moedge
from moedge.errors import EngineError, UsageError
from moedge.runtime.trace import trace, write_trace
from moedge.runtime.trace_attention import MAX_TOKENS, parse_choice
from moedge.runtime.trace_commands import trace_command
from moedge.runtime.trace_html import render_html

TEXT = "one two three, and four"


def attention_of(model: Any, ids: list[int]) -> list[np.ndarray[Any, Any]]:
    """transformers' attention weights [heads, T, T] by layer."""
    import torch

    model.eval().config._attn_implementation = "eager"
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_attentions=True).attentions
    return [layer[0].numpy() for layer in found]


@pytest.mark.parametrize(
    "family,name", [("deepseek_v2", "many_groups_yarn"), ("qwen3_moe", ""), ("gpt_oss", ""), ("mixtral", "")]
)
def test_equal_to_transformers(family: str, name: str, tmp_path: Path) -> None:
    """Latent, grouped, with sinks and with sliding windows; int4 does not matter, so fp32."""
    from family_cases import FAMILIES

    model = make_model(family, name or next(iter(FAMILIES[family].configurations)))
    save_model(model, family, tmp_path / "checkpoint")
    fake_engine.write_tokenizer(tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32", verify=False)
    moedge.build(tmp_path / "bundle", "cpu")
    layers = model.config.num_hidden_layers
    found = trace(tmp_path / "bundle", [("text", TEXT)], attention=dict.fromkeys(range(layers)), threads=1)
    (text,) = found.texts
    expected = attention_of(model, text.ids)
    heads = expected[0].shape[0]
    assert [(look.layer, look.head) for look in text.attention] == [(i, h) for i in range(layers) for h in range(heads)]
    for look in text.attention:
        np.testing.assert_allclose(look.weights, expected[look.layer][look.head], atol=2e-5)


def test_choice_of_heads_in_every_format(tiny_bundle: Path, tmp_path: Path) -> None:
    options = [str(tiny_bundle), "-p", TEXT, "--attention", "2:3,1", "--attention", "0", "--threads", "1"]
    done = CliRunner().invoke(trace_command, [*options, "-o", str(tmp_path / "t.json")])
    assert done.exit_code == 0, done.output
    (text,) = json.loads((tmp_path / "t.json").read_text())["texts"]
    looks = text["attention"]
    assert [(look["layer"], look["head"]) for look in looks] == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1), (2, 3)]
    for look in looks:  # nobody looks ahead, and every row is a share
        assert [len(row) for row in look["weights"]] == list(range(1, len(text["tokens"]) + 1))
        np.testing.assert_allclose([sum(row) for row in look["weights"]], 1, atol=1e-3)
    traced = trace(tiny_bundle, [("a", TEXT), ("b", "other")], attention={1: [2]}, threads=1)
    page = render_html(traced)
    assert page.count("<canvas") == 2 and "layer 1, head 2" in page
    write_trace(traced, tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    assert "<canvas" not in render_html(trace(tiny_bundle, [("a", TEXT)], threads=1))


def test_a_long_text_is_looked_at_from_its_beginning(tmp_path: Path) -> None:
    model = make_deepseek(seed=3, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "checkpoint")
    fake_engine.write_tokenizer(tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", verify=False)
    moedge.build(tmp_path / "bundle", "cpu")
    (text,) = trace(tmp_path / "bundle", [("long", "abcdefgh" * 40)], attention={0: [0]}, threads=1).texts
    assert len(text.ids) == 320 and text.attention[0].weights.shape == (MAX_TOKENS, MAX_TOKENS)


@pytest.mark.parametrize(
    "choice,said",
    [
        ({3: None}, "attention of layer 3: this model has layers 0 to 2"),
        ({1: [0, 4]}, "attention of layer 1, head 4: it has 0 to 3"),
    ],
)
def test_what_is_not_there(choice: Any, said: str, tiny_bundle: Path) -> None:
    with pytest.raises(UsageError) as raised:
        trace(tiny_bundle, [("text", TEXT)], attention=choice, threads=1)
    assert str(raised.value) == said


@pytest.mark.parametrize("text", ["", "x", "1:", "-1", "1:2,", "1;2"])
def test_what_is_no_choice(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_choice([text])
    assert str(raised.value) == f"attention {text!r}: give LAYER or LAYER:HEAD,HEAD, such as 3 or 3:0,2"


def test_an_engine_without_attention_to_look_at(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moedge.runtime.sessions.onnxruntime_attention._NAME", "nothing.")
    with pytest.raises(EngineError) as raised:
        trace(tiny_bundle, [("text", TEXT)], attention={0: None}, threads=1)
    assert str(raised.value) == (
        "engine 'cpu' has no attention of layer 0 to look at; build it again with this version of moedge: moedge build "
        "BUNDLE --profile cpu"
    )
