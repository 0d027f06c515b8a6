"""Every model family, one runner: random checkpoints of transformers' own classes, exported, lowered and compared.

A configuration passes when fp32 logits equal transformers' on every position, in the canonical graph and on the cpu
engine, the whole prompt at once and token by token; when the prompt reached every expert; and when an int4 export
passes its parity check and its engine, activations not rounded, gives the canonical graph's logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import transformers_logits
from family_cases import FAMILIES, LENGTH, VOCAB, make_model, save_model
from onnx.reference import ReferenceEvaluator

import moedge
from moedge.export.families import list_families
from moedge.profiles.targets import onnxruntime as target
from moedge.runtime import kernels

Array = np.ndarray[Any, Any]
CASES = [(family, name) for family, case in FAMILIES.items() for name in case.configurations]


def draw_prompts(family: str, name: str) -> Array:
    """int64 [2, LENGTH]."""
    seed, _ = FAMILIES[family].configurations[name]
    return np.random.default_rng(seed).integers(0, VOCAB, (2, LENGTH))


def run_canonical(bundle: Path, ids: Array) -> Array:
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    logits: Array = session.run(None, {"input_ids": ids})[0]
    return logits


def split_prompt(ids: Array) -> list[Array]:
    """A piece of the prompt first, then a token at a time."""
    return np.split(ids, range(13, len(ids)))


def run_in_steps(engine: Any, ids: Array) -> Array:
    session = engine.session
    session.truncate(0)
    return np.concatenate([session.step(part, np.arange(len(part))).copy() for part in split_prompt(ids)])


def transformers_in_steps(model: Any, ids: Array) -> Array:
    """The same steps over transformers' cache, whose keys keep the rotation they were given."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        parts = [torch.tensor(part[None]) for part in split_prompt(ids)]
        return np.concatenate([model(part, past_key_values=cache).logits[0].numpy() for part in parts])


def assert_near(actual: Array, expected: Array) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_fp32_logits_equal_transformers(family: str, name: str, tmp_path: Path) -> None:
    model = make_model(family, name)
    save_model(model, family, tmp_path / "checkpoint")
    ids = draw_prompts(family, name)
    expected = transformers_logits(model, ids)
    bundle = moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32")
    onnx.checker.check_model(str(bundle.path / "model.onnx"), full_check=True)
    assert_near(run_canonical(bundle.path, ids), expected)
    assert_near(run_canonical(bundle.path, ids[:, :1]), transformers_logits(model, ids[:, :1]))
    moedge.build(bundle.path, "cpu")
    with moedge.load(bundle.path, "cpu", threads=1, prefill_chunk=LENGTH) as engine:
        assert_near(engine.logits(ids[0]), expected[0])
        by_steps = expected[0]
        if engine.config["rope"]["kind"] != "fixed":
            by_steps = transformers_in_steps(model, ids[0])
            assert np.abs(by_steps[-1] - expected[0, -1]).max() > 0.01, "the prompt is too short to change the rope"
            notes = bundle.manifest["provenance"]["notes"]
            assert any("differs from the same text computed at once" in note for note in notes)
        assert_near(run_in_steps(engine, ids[0]), by_steps)
        routed = np.concatenate([engine.routing(row).experts for row in ids], axis=1)
    experts = engine.config["moe"]["num_experts"]
    assert [len(np.unique(layer)) for layer in routed] == [experts] * len(routed), "a prompt must reach every expert"


@pytest.mark.parametrize(("family", "name"), CASES)
def test_int4_passes_parity_and_lowers_to_the_same_logits(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(make_model(family, name), family, tmp_path / "checkpoint")
    bundle = moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="int4", group_size=32)
    ids = draw_prompts(family, name)[:1]
    expected = run_canonical(bundle.path, ids)[0]
    monkeypatch.setattr(target, "ACCURACY_LEVEL", 0)
    monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)  # ours round activations whatever the level
    moedge.build(bundle.path, "cpu")
    with moedge.load(bundle.path, "cpu", threads=1, prefill_chunk=LENGTH) as engine:
        at_once = engine.config["rope"]["kind"] != "fixed"  # steps have other frequencies then
        assert_near(engine.logits(ids[0]) if at_once else run_in_steps(engine, ids[0]), expected)


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt_oss", "alternate_windows"), ("phimoe", "longrope"), ("mixtral", "dynamic"), ("granitemoe", "multipliers")],
)
def test_reference_evaluator_runs_the_same_graph(family: str, name: str, tmp_path: Path) -> None:
    """What is not in DeepSeek's graph, on onnx's own evaluator: one token, and more than there are experts."""
    save_model(make_model(family, name), family, tmp_path / "checkpoint")
    bundle = moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32", verify=False)
    evaluator = ReferenceEvaluator(onnx.load(bundle.path / "model.onnx"))
    for length in (1, 40):
        ids = draw_prompts(family, name)[:1, :length]
        (expected,) = evaluator.run(None, {"input_ids": ids})
        assert_near(run_canonical(bundle.path, ids), expected)


def test_every_family_is_here() -> None:
    assert sorted(FAMILIES) == list_families()
    assert all(len(case.configurations) >= 3 for case in FAMILIES.values())
