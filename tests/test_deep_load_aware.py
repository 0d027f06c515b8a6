"""`moedge verify --deep` of load-aware gates: each target's choices, with the load and the room that they find."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from checkpoints import make_model, save_model
from onnx import numpy_helper
from test_deep_verify import edit_engine, faults_of, run_deep

import moedge
from moedge.bundle import ENGINE_MANIFEST, Bundle, read_json
from moedge.export.gating import _compare_load, list_gates, load_aware, sigmoid_topk
from moedge.export.gating._compare import compare_choices
from moedge.export.options import LoadAware
from moedge.profiles.build import build, write_engine_manifest
from moedge.profiles.targets import _trt_gates, _trt_network_files

JETSON = "jetson-agx-orin-64gb"
ENGINES: dict[str, dict[str, Any]] = {"cpu": {}, "rtx4090": {"backend": "onnxruntime"}, JETSON: {}}
right = load_aware.lower


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a penalty that moves choices and a capacity that binds in calls of several tokens."""
    import torch

    model = make_model(seed=12)
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.linspace(0.4, -0.4, 8)[torch.randperm(8)])
    checkpoint = save_model(model, tmp_path_factory.mktemp("deep") / "checkpoint")
    settings = LoadAware(penalty=0.3, capacity_factor=1.25, decay=0.95)
    made: Bundle = moedge.export(
        checkpoint, checkpoint.parent / "b", weights="fp16", load_aware=settings, verify=False
    )
    return made.path


def build_again(bundle: Path, profile: str) -> None:
    build(bundle, profile, max_seq_len=48, **ENGINES[profile])


def followed(bundle: Path, profile: str) -> dict[str, Any]:
    result = run_deep(bundle, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)["deep"]["engines"][profile]
    return found


@pytest.fixture(autouse=True)
def no_engines(bundle: Path) -> None:
    shutil.rmtree(bundle / "engines", ignore_errors=True)


@pytest.mark.parametrize("profile", ENGINES)
def test_a_sound_engine_passes(profile: str, bundle: Path) -> None:
    build_again(bundle, profile)
    found = followed(bundle, profile)
    assert [layer["layer"] for layer in found["layers"]] == [1, 2] and found["faults"] == []
    for layer in found["layers"]:
        assert (layer["gate"], layer["compared"]) == ("moedge.LoadAwareGate", "on its own logits")
        assert layer["near_ties"] <= 2 and layer["logits_drift"] < 0.05


def test_a_network_that_needs_more_rounds_is_compared_in_halves(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_trt_gates, "ROUNDS", 1)
    monkeypatch.setattr(_trt_network_files, "check_numerics", lambda *_, **__: {})  # one call is one run there
    build_again(bundle, JETSON)
    assert len(followed(bundle, JETSON)["layers"]) == 2


def test_a_number_of_experts_that_is_a_layers_too(tmp_path: Path) -> None:
    """Two experts and a layer 2: once a constant and an output of that name."""
    model = make_model(n_routed_experts=2, num_experts_per_tok=1, n_group=1)
    folder = save_model(model, tmp_path / "checkpoint").parent
    options: dict[str, Any] = {"weights": "fp16", "load_aware": LoadAware(penalty=0.3), "verify": False}
    made = moedge.export(tmp_path / "checkpoint", folder / "b", **options).path
    build_again(made, "cpu")
    build(made, JETSON, max_seq_len=48, expert_buckets=True, prefill_chunk=16)
    assert [len(followed(made, profile)["layers"]) for profile in ("cpu", JETSON)] == [2, 2]


# planted


Lower = Callable[[Any, Sequence[Any], dict[str, Any]], Any]


def load_lost(build: Any, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
    return right(build, inputs, {**attributes, "penalty": 0.0})


def capacity_lost(build: Any, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
    return right(build, inputs, {**attributes, "capacity_factor": 8.0})


def renormalized(build: Any, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
    return right(build, inputs, {**attributes, "norm_topk_prob": 1 - attributes["norm_topk_prob"]})


CHOSE = r"it chose experts \d, \d where its load and logits give \d, \d"
WEIGHED = r"it weighs expert \d by [\d.]+ where .*, as if the weights were not divided by their sum"


@pytest.mark.parametrize(
    ("profile", "lower", "what"),
    [
        ("cpu", load_lost, f"{CHOSE}, as if the load were not counted"),
        ("rtx4090", load_lost, f"{CHOSE}, as if the load were not counted"),
        ("cpu", capacity_lost, f"{CHOSE}, as if the capacity were not kept"),
        (JETSON, capacity_lost, f"{CHOSE}, as if the capacity were not kept"),
        ("cpu", renormalized, WEIGHED),
    ],
)
def test_a_wrong_gate_is_named(
    profile: str, lower: Lower, what: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_aware, "lower", lower)
    monkeypatch.setattr(_trt_network_files, "check_numerics", lambda *_, **__: {})  # which would refuse it
    build_again(bundle, profile)
    monkeypatch.undo()
    (fault,) = faults_of(bundle)
    again = f"build it again: moedge build BUNDLE --profile {profile}"
    wanted = rf"engine '{profile}': layer 1, token \d+, moedge.LoadAwareGate: {what}; {again}"
    assert re.fullmatch(wanted, fault), fault


def test_a_lost_bias_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base gate's, of which the engine's graph has plain nodes alone."""
    build_again(bundle, "cpu")

    def plant(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.float32), "planted.zero"))
        for node in model.graph.node:
            node.input[:] = ["planted.zero" if name == "layers.1.router.bias" else name for name in node.input]

    edit_engine(bundle, "cpu", plant)
    assert "as if the correction bias were lost" in faults_of(bundle)[0]


def test_a_session_that_counts_otherwise_is_named(bundle: Path) -> None:
    build_again(bundle, "cpu")
    folder = bundle / "engines/cpu"
    document = read_json(folder / ENGINE_MANIFEST)
    start = document["session"]["load_start"]
    document["session"] |= {"load_start": 0.1, "load_decay": 0.5}
    write_engine_manifest(folder, document)
    decay, begin, followed = faults_of(bundle)
    assert decay.startswith("engine 'cpu': load_decay is 0.5 and the model's 0.95; build it again")
    assert begin.startswith(f"engine 'cpu': load_start is 0.1 and the model's {start}; build it again")
    assert followed.startswith("engine 'cpu': layer 1, token ") and " where its load and logits give " in followed


# the comparison


def test_each_token_is_judged_behind_the_choices_before_it() -> None:
    """What the reference gives call by call is right; with one token's choice exchanged that token alone is wrong."""
    rng = np.random.default_rng(5)
    logits, bias = rng.standard_normal((40, 6)).astype("f"), rng.standard_normal(6).astype("f") / 4
    base: dict[str, Any] = {"n_group": 2, "topk_group": 1}
    own = {"top_k": 2, "norm_topk_prob": 1, "routed_scaling_factor": 2.0}
    own |= {"penalty": 0.4, "capacity_factor": 1.1, "decay": 0.9}
    start, calls = np.full(6, 3, np.float32), [17, 1, 1, 21]
    scores, choice = sigmoid_topk.score_reference(logits, bias, **own, **base)
    pieces, load, first = [], start, 0
    for length in calls:
        rows = slice(first, first + length)
        *route, load = list_gates()["LoadAwareGate"].reference(scores[rows], choice[rows], load, **own)  # type: ignore[misc]
        pieces.append(route)
        first += length
    experts, weights = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    reference = _compare_load.reference_behind("SigmoidTopKGate")

    def compare() -> Any:
        by_token = _compare_load.follow_load(experts, calls, start, own)
        return compare_choices(reference, [logits, bias, *by_token], base | own, experts, weights)

    assert compare().token is None
    experts[29, 1] = next(expert for expert in range(6) if expert not in experts[29])
    assert (compare().token, compare().fault) == (29, compare().fault) and "chose experts" in compare().fault
