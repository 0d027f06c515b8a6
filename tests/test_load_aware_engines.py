"""Load-aware bundles: exported on request, the load carried by every engine, right whatever happens to a sequence."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import make_model, save_model
from click.testing import CliRunner
from fake_engine import write_tokenizer
from fake_trt import FakeDevice
from family_cases import make_model as make_family_model
from family_cases import save_model as save_family_model

import moedge
from moedge.bundle import Bundle
from moedge.cli import main as cli
from moedge.errors import BuildError, CheckpointError, ParityError
from moedge.export.gating import list_gates, load_aware
from moedge.export.load_balance import START_TOKENS
from moedge.export.options import LoadAware
from moedge.profiles.build import build
from moedge.profiles.targets import _trt_check, _trt_gates
from moedge.profiles.targets._trt_check import check_numerics
from moedge.runtime.preflight import read_engine
from moedge.runtime.sessions import SessionOptions, onnxruntime_cpu, onnxruntime_cuda
from moedge.runtime.sessions._trt_session import TensorrtSession

SETTINGS = LoadAware(penalty=0.3, capacity_factor=1.25, decay=0.95)
ROOM, CHUNK, EXPERTS, TOP_K = 160, 16, 8, 2
START = START_TOKENS * TOP_K / EXPERTS
JETSON = "jetson-agx-orin-64gb"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of four experts, one of them kept, and routers that like some experts far better than others."""
    import torch

    model = make_model(seed=12)
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(torch.linspace(0.4, -0.4, EXPERTS)[torch.randperm(EXPERTS)])
    folder = save_model(model, tmp_path_factory.mktemp("skewed") / "checkpoint")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint: Path) -> Bundle:
    options: dict[str, Any] = {"weights": "int8", "group_size": 32, "load_aware": SETTINGS}
    made: Bundle = moedge.export(checkpoint, checkpoint.parent / "b", **options)
    moedge.build(made.path, "cpu", max_seq_len=ROOM)
    return made


@pytest.fixture(scope="module")
def prepared(bundle: Bundle) -> Path:
    return build(bundle.path, JETSON, max_seq_len=ROOM)


def load(bundle: Bundle, **options: Any) -> Any:
    return moedge.load(bundle.path, "cpu", threads=1, prefill_chunk=CHUNK, **options)


def draw(count: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(0, 320, count).tolist()
    return ids


def go_on(engine: Any, prompt: list[int]) -> list[int]:
    """30 tokens after a prompt."""
    text = engine.generate(prompt, max_new_tokens=30, temperature=1.0, seed=5)
    for _ in text:
        pass
    tokens: list[int] = list(text.tokens)
    return tokens


def sum_load(experts: Any, decay: float = SETTINGS.decay) -> Any:
    """float64 [layers, experts] of routes [layers, tokens, k]: every choice by its age, and what there was before."""
    worth = decay ** np.arange(experts.shape[1] - 1, -1, -1.0)
    sums = [[((layer == expert) * worth[:, None]).sum() for expert in range(EXPERTS)] for layer in experts]
    return np.array(sums) + START * decay ** experts.shape[1]


# export


def test_the_command_line_asks_for_it_and_inspect_shows_it(checkpoint: Path, tmp_path: Path) -> None:
    for options, expected in ((["--load-aware"], LoadAware()), (["--load-penalty", "0.5"], LoadAware(penalty=0.5))):
        command = ["export", str(checkpoint), "-o", str(tmp_path / "b"), "--no-verify", "--force", *options]
        assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
        (gate,) = Bundle.open(tmp_path / "b").manifest["gating"]
        assert gate["op"] == "moedge.LoadAwareGate" and gate["over"]["op"] == "moedge.SigmoidTopKGate"
        found = LoadAware(**{name: gate["attributes"][name] for name in ("penalty", "capacity_factor", "decay")})
        assert found == expected
    shown = CliRunner().invoke(cli, ["inspect", str(tmp_path / "b")], env={"COLUMNS": "400"}).stdout
    assert "moedge.LoadAwareGate (top_k 2," in shown and ") over moedge.SigmoidTopKGate (top_k 2," in shown


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (LoadAware(capacity_factor=0.5), "capacity_factor 0.5 is below 1: 8 experts would have room for 1 of the 2"),
        (LoadAware(capacity_factor=-3), "capacity_factor -3 is below 1: 8 experts would have room for -6 of the 2"),
        (LoadAware(capacity_factor=float("inf")), "capacity_factor inf is no number; 4 has room for every choice"),
        (LoadAware(penalty=-1), "penalty -1 is below 0"),
        (LoadAware(decay=1.01), "decay 1.01 is not between 0 and 1"),
    ],
)
def test_what_contradicts_is_refused_with_both_figures(
    settings: LoadAware, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        moedge.export(checkpoint, tmp_path / "b", load_aware=settings)
    assert str(caught.value).startswith(f"load-aware gate: {message}")
    assert str(caught.value).endswith("; mend --load-penalty, --load-capacity or --load-decay")
    assert not (tmp_path / "b").exists()


def test_a_gate_without_scores_is_refused(tmp_path: Path) -> None:
    save_family_model(make_family_model("phimoe", "plain_norms"), "phimoe", tmp_path / "c")
    with pytest.raises(CheckpointError, match="^SparseMixerGate cannot be load-aware: .* SoftmaxTopKGate; leave"):
        moedge.export(tmp_path / "c", tmp_path / "b", load_aware=LoadAware())


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("op", ["SoftmaxTopKGate", "SigmoidTopKGate"])
def test_without_penalty_and_bound_it_is_the_gate_itself(op: str, groups: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    logits, bias = rng.standard_normal((500, 12)).astype("f"), 0.1 * rng.random(12).astype("f")
    gate: Any = list_gates()[op]
    inputs = [bias] if op.startswith("Sigmoid") else []
    free = {"top_k": 3, "norm_topk_prob": 1, "routed_scaling_factor": 2.0}
    base = free | {"n_group": groups[0], "topk_group": groups[1]}
    free |= {"penalty": 0.0, "capacity_factor": 4.0, "decay": 1.0}
    scores, choice = gate.score_reference(logits, *inputs, **base)
    found = load_aware.reference(scores, choice, np.zeros(12, "f"), **free)
    expected = gate.reference(logits, *inputs, **base)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-6)


# the canonical graph and the CPU engine


def test_the_load_is_an_input_that_may_be_left_out(bundle: Bundle) -> None:
    session = ort.InferenceSession(str(bundle.path / "model.onnx"))
    ids = np.array([draw(24)])
    assert [value.name for value in session.get_inputs()] == ["input_ids"]
    assert {value.name for value in session.get_overridable_initializers()} == {"load.1", "load.2"}
    outputs = session.run(["logits", "new_load.1", "new_load.2"], {"input_ids": ids})
    even = {f"load.{layer}": np.full(EXPERTS, START, "f") for layer in (1, 2)}
    for found, again in zip(outputs, session.run(None, {"input_ids": ids} | even), strict=True):
        np.testing.assert_array_equal(found, again)
    assert abs(outputs[1].sum() - TOP_K * (1 - 0.95**24) / 0.05 - EXPERTS * START * 0.95**24) < 1e-3
    busy = {"load.1": np.eye(EXPERTS, dtype="f")[outputs[1].argmax()] * 50}
    (other,) = session.run(["logits"], {"input_ids": ids} | busy)
    assert np.abs(other - outputs[0]).max() > 0.01


def test_the_engine_carries_the_load_from_step_to_step(bundle: Bundle) -> None:
    """Each chunk's routes are those of the gate on the load that the routes before it sum to, within the capacity."""
    ids = draw(100)
    with load(bundle) as engine:
        routing = engine.routing(ids)
        np.testing.assert_allclose(engine.session.load.load, sum_load(routing.experts), rtol=1e-6)
        for start in range(0, 100, CHUNK):
            part = routing.experts[:, start : start + CHUNK]
            most = load_aware.find_capacity(part.shape[1], TOP_K, EXPERTS, SETTINGS.capacity_factor)
            assert max(np.bincount(layer.ravel()).max() for layer in part) <= most
    canonical = ort.InferenceSession(str(bundle.path / "model.onnx"))
    (expected,) = canonical.run(["new_load.1"], {"input_ids": np.array([ids[:CHUNK]])})
    np.testing.assert_allclose(expected, sum_load(routing.experts[:, :CHUNK])[0], rtol=1e-5)


def test_truncated_reused_copied_and_saved_it_is_the_same_to_the_bit(bundle: Bundle, tmp_path: Path) -> None:
    prompt, other = draw(70, 1), draw(90, 2)
    with load(bundle, reuse="off") as engine:
        expected, again = go_on(engine, prompt), go_on(engine, prompt)
        state = engine.session.load.load.copy()
    assert expected == again and len(expected) == 30
    with load(bundle) as engine:
        go_on(engine, prompt[:50] + other[:70])
        assert go_on(engine, prompt) == expected
        np.testing.assert_array_equal(engine.session.load.load, state)
        assert go_on(engine, prompt) == expected
        assert engine.save_snapshot(tmp_path / "s") == 70
        session = engine.session
        rows = session.read_rows(0, 70)
        session.truncate(33)
        np.testing.assert_allclose(session.load.load, sum_load(session.load.routes[:, :33]), rtol=1e-6)
        another = session.another()
        another.append_rows(rows)
        session.truncate(0)
        assert (session.load.load == START).all() and (another.load.load != START).any()
        session.append_rows(rows)
        np.testing.assert_array_equal(session.load.load, another.load.load)
        another.close()
    with load(bundle) as engine:
        engine.load_snapshot(tmp_path / "s")
        assert go_on(engine, prompt) == expected
        np.testing.assert_array_equal(engine.session.load.load, state)


def test_the_trace_has_the_figures(bundle: Bundle, checkpoint: Path, tmp_path: Path) -> None:
    """Utilization, recomputed from `moedge trace`'s JSON, is better than the skewed router's, which shows below 70%."""
    moedge.export(checkpoint, tmp_path / "plain", weights="int8", group_size=32, verify=False)
    moedge.build(tmp_path / "plain", "cpu", max_seq_len=ROOM)
    utilization = []
    for path in (tmp_path / "plain", bundle.path):
        output = tmp_path / "trace.json"
        command = ["trace", str(path), "-p", "def read(self, name):\n" * 6, "-o", str(output), "--threads", "1"]
        assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
        (text,) = json.loads(output.read_text())["texts"]
        counts = [np.bincount(np.ravel(layer), minlength=EXPERTS) for layer in text["experts"]]
        assert [row["mean_over_max"] for row in text["load"]] == [each.mean() / each.max() for each in counts]
        utilization.append(min(each.mean() / each.max() for each in counts))
    assert utilization[0] < 0.7 < utilization[1], utilization


def test_the_documents_commands(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "load-balance.md").read_text(encoding="utf-8")
    (commands,) = re.findall(r"^```sh\n(.*?)^```", page, flags=re.M | re.S)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    for command in commands.splitlines():
        result = CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert "moedge.LoadAwareGate" in result.output


def test_onnxruntime_on_cuda_carries_the_load(checkpoint: Path, tmp_path: Path) -> None:
    """Its graph and session on the CPU, in half precision: each step takes the load that the routes sum to."""
    made: Bundle = moedge.export(checkpoint, tmp_path / "b", weights="fp16", load_aware=SETTINGS, verify=False)
    build(made.path, "cpu", max_seq_len=ROOM)
    build(made.path, "rtx4090", backend="onnxruntime", max_seq_len=ROOM)
    options = SessionOptions(threads=1)
    session: Any = onnxruntime_cuda.open_on(onnxruntime_cuda.CPU, made, read_engine(made, "rtx4090"), options)
    cpu: Any = onnxruntime_cpu.open_session(made, read_engine(made, "cpu"), options)
    for part in np.split(np.array(draw(60)), [30, 31, 32]):
        for each in (session, cpu):
            each.step(part, np.zeros(0, np.int64))
        most = load_aware.find_capacity(len(part), TOP_K, EXPERTS, SETTINGS.capacity_factor)
        assert max(np.bincount(layer.ravel()).max() for layer in session.routing.experts) <= most
        np.testing.assert_allclose(session.load.load, sum_load(session.load.routes[:, : session.length]), rtol=1e-6)
    assert (session.load.routes[:, :60] == cpu.load.routes[:, :60]).mean() > 0.9
    rows, last = session.read_rows(0, 60), session.step(np.array([3]), np.zeros(1, np.int64)).copy()
    session.truncate(0)
    assert (session.load.load == START).all()
    session.append_rows(rows)
    np.testing.assert_array_equal(session.step(np.array([3]), np.zeros(1, np.int64)), last)


# TensorRT's network


def test_the_network_is_checked_with_and_without_the_capacity(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_numerics(bundle)["difference"] < 1e-5
    lower_right = _trt_check.lower_network

    def lower_wrong(model: Any, *args: Any, **options: Any) -> Any:
        for node in model.graph:
            if node.op_type == "LoadAwareGate":
                node.attributes["penalty"] = ir.AttrFloat32("penalty", 0.0)  # the load is then no matter
        return lower_right(model, *args, **options)

    monkeypatch.setattr(_trt_check, "lower_network", lower_wrong)
    with pytest.raises(ParityError, match="differs from the canonical graph"):
        check_numerics(bundle)


@pytest.mark.parametrize("rounds", [_trt_gates.ROUNDS, 1])
def test_a_session_settles_every_chunk(
    rounds: int, bundle: Bundle, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too few rounds a chunk is run in halves: the experts are those of calls of those lengths."""
    if rounds != _trt_gates.ROUNDS:
        monkeypatch.setattr(_trt_gates, "ROUNDS", rounds)
        monkeypatch.setattr(_trt_check, "_SEEDS", range(20))  # until one settles in a round: the check asks for no more
        prepared = build(bundle.path, JETSON, max_seq_len=ROOM)
    info = read_engine(bundle, JETSON)
    device = FakeDevice(info.session["parts"])
    session, ids = TensorrtSession(device, prepared, info, ROOM), np.array(draw(60))
    for start in (0, 40):
        session.step(ids[start : start + 40], np.empty(0, np.int64))
        routes = session.load.routes[:, : session.length]  # type: ignore[union-attr]
        np.testing.assert_allclose(session.load.load, sum_load(routes), rtol=1e-6)  # type: ignore[union-attr]
        assert all(len(set(token)) == TOP_K for layer in session.routing.experts.tolist() for token in layer)
    runs = [tokens for _, tokens, _ in device.runs]
    assert (runs == [40, 20]) if rounds > 1 else (runs[0] == 40 and len(runs) > 2)
    rows, last = session.read_rows(0, 60), session.step(ids[:1], np.zeros(1, np.int64)).copy()
    session.truncate(0)
    session.append_rows(rows)
    np.testing.assert_array_equal(session.step(ids[:1], np.zeros(1, np.int64)), last)


def test_several_sequences_a_run_are_refused(bundle: Bundle) -> None:
    with pytest.raises(BuildError, match="max_batch 2"):
        build(bundle.path, "rtx4090", max_batch=2)
