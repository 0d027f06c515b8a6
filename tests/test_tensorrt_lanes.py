"""Several sequences in one run of a TensorRT network, each as if alone; idle lanes leave no trace; the session too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fake_trt import FakeDevice
from small_process import small_process
from test_tensorrt import needs_rtx
from test_tensorrt_families import export
from test_tensorrt_session import NO_ROWS, PROFILE, SLOTS, Prepared, draw

from moedge.bundle import MODEL, Bundle
from moedge.errors import EngineError
from moedge.export.config import moe_config_from_json
from moedge.profiles.build import build
from moedge.profiles.device import load_profile
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits, check_numerics
from moedge.profiles.targets._trt_form import NetworkForm
from moedge.profiles.targets._trt_inputs import count_slots
from moedge.profiles.targets._trt_log import read_build_log
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network
from moedge.runtime.preflight import read_engine
from moedge.runtime.sessions._trt_session import TensorrtSession

LANES = 3


def lower(bundle: Bundle, folder: Path, lanes: int = LANES) -> NetworkRunner:
    model, config = load_canonical(bundle)
    network = lower_network(model, config, SLOTS, real=ir.DataType.FLOAT, form=NetworkForm(lanes=lanes))
    network.weights.write(folder / WEIGHTS_FILE)
    network.save(folder, MODEL)
    runner = NetworkRunner(folder / MODEL, lanes=lanes)
    for rows in runner.cache.values():
        rows[:] = 50.0  # leftovers of other sequences
    return runner


# the network, on onnxruntime


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("deepseek_v2", "many_groups_yarn"),  # latent attention, shared experts
        ("mixtral", "top_1_mqa_tied_odd_heads"),
        ("mixtral", "odd_experts_short_window"),  # every expert for a step of all lanes
        ("olmoe", "longrope"),  # frequencies by each lane's own length
        ("mixtral", "dynamic"),
        ("qwen2_moe", "one_layer_dense"),
        ("gpt_oss", "alternate_windows"),  # sinks, biased experts
    ],
)
def test_sequences_of_several_lengths_are_each_as_if_alone(family: str, name: str, tmp_path: Path) -> None:
    bundle = export(family, name, tmp_path)
    runner = lower(bundle, tmp_path)
    texts = [draw(bundle, count) for count in (36, 12, 17)]
    pieces: list[list[Any]] = [[], [], []]
    for lane, cuts in enumerate(([0, 30], [0, 3, 4, 5], [0, 9])):
        for start, stop in zip(cuts, cuts[1:], strict=False):
            pieces[lane].append(runner.step(texts[lane][start:stop], lane)["logits"])
    for busy in ([0, 1, 2], [1, 2], [0], [2], [0, 2]):
        found = runner.step_together({lane: int(texts[lane][runner.lengths[lane]]) for lane in busy})["logits"]
        for lane in busy:
            pieces[lane].append(found[lane : lane + 1])
    assert runner.lengths == [33, 7, 13]
    rope = moe_config_from_json(bundle.config).rope
    for lane, text in enumerate(texts):
        length = runner.lengths[lane]
        expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], text[:length])
        if rope.kind == "fixed" or length <= rope.original_length:  # else keys in the cache keep their frequencies
            np.testing.assert_allclose(np.concatenate(pieces[lane]), expected, rtol=0, atol=1e-4)
    assert rope.kind == "fixed" or runner.lengths[0] > rope.original_length  # and the others must not follow it


def test_an_idle_lane_takes_a_busy_ones_experts_and_its_sequence_stays(tmp_path: Path) -> None:
    bundle = export("qwen3_moe", "normalized_mqa", tmp_path)
    runner = lower(bundle, tmp_path)
    ids = draw(bundle, 12)
    runner.step(ids, 1)
    before = {name: rows[1, :, :12].copy() for name, rows in runner.cache.items()}
    runner.step(ids[:4], 0)
    steps = [runner.step_together({0: int(token)}) for token in ids[4:8]]
    for name, rows in runner.cache.items():
        np.testing.assert_array_equal(rows[1, :, :12], before[name])
    assert all(np.isfinite(step["logits"]).all() for step in steps)
    graph = ir.load(tmp_path / MODEL).graph
    gathers = [node for node in graph if node.op_type == "Gather" and _is_slice_of(node.inputs[1], "source")]
    assert len(gathers) == len(bundle.config["moe"]["layers"])


def _is_slice_of(value: ir.Value | None, name: str) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "Slice" and node.inputs[0] is not None and node.inputs[0].name == name


def test_more_lanes_than_experts_to_choose_from_run_every_expert_once(tmp_path: Path) -> None:
    bundle = export("mixtral", "odd_experts_short_window", tmp_path)
    experts, choices = (bundle.config["moe"][key] for key in ("num_experts", "num_experts_per_tok"))
    for lanes in (experts // choices, experts // choices + 1):
        lower(bundle, tmp_path, lanes)
        graph = ir.load(tmp_path / MODEL).graph
        by_source = [node for node in graph if _is_slice_of(node.inputs[1] if len(node.inputs) > 1 else None, "source")]
        assert bool(by_source) == (lanes * choices <= experts)


def test_a_lanes_cache_has_a_spare_slot_and_begins_where_a_tensor_may() -> None:
    assert count_slots(64, 1, [512]) == 64
    assert count_slots(64, 4, [512, 64]) == 72
    assert count_slots(63, 4, [512, 64]) == 64
    for widths in ([24], [33, 8], [1]):
        slots = count_slots(100, 2, widths)
        assert slots > 100 and all(2 * slots * width % 256 == 0 for width in widths)


def test_every_build_checks_its_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path)
    together: list[dict[int, int]] = []
    step = NetworkRunner.step_together
    monkeypatch.setattr(
        NetworkRunner, "step_together", lambda self, tokens: together.append(tokens) or step(self, tokens)
    )
    assert check_numerics(bundle, form=NetworkForm(lanes=4))["difference"] < 1e-5
    assert [sorted(tokens) for tokens in together] == [[3], [0, 3]]


# the session


@pytest.fixture(scope="module", params=["qwen2_moe whole", "deepseek_v2 cut"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    family, how = request.param.split()
    name = {"deepseek_v2": "greedy_first_dense", "qwen2_moe": "one_layer_dense"}[family]
    bundle = export(family, name, tmp_path_factory.mktemp(family), num_hidden_layers=3)
    bound = (400 << 20) + 500_000 if how == "cut" else None
    with small_process():
        folder = build(bundle.path, load_profile(PROFILE), max_seq_len=SLOTS, max_batch=LANES, max_memory=bound)
    info = read_engine(bundle, PROFILE)
    assert (len(info.session["parts"]) > 1) == (how == "cut")
    assert info.max_batch == LANES and info.session["cache"]["shape"][0] == LANES
    return Prepared(bundle, folder, info)


def open_lanes(prepared: Prepared, capacity: int = SLOTS, lanes: int = LANES) -> tuple[TensorrtSession, FakeDevice]:
    device = FakeDevice(prepared.info.session["parts"])
    return TensorrtSession(device, prepared.folder, prepared.info, capacity, lanes), device


def test_sequences_step_together_each_behind_its_own_length(prepared: Prepared) -> None:
    first, device = open_lanes(prepared)
    second, third = first.another(), first.another()
    sessions = [first, second, third]
    texts = [draw(prepared.bundle, count) for count in (20, 9, 14)]
    alone, _ = open_lanes(prepared, lanes=1)
    for session, text, count in zip(sessions, texts, (16, 3, 1), strict=True):
        session.step(text[:count], NO_ROWS)
    device.runs.clear()
    assert first.lanes == LANES and alone.lanes == 1
    for busy in ([0, 1, 2], [2, 0], [1, 2], [0, 1]):
        group = [sessions[index] for index in busy]
        tokens = np.array([texts[index][sessions[index].length] for index in busy])
        found = group[0].step_together(group[1:], tokens)
        for row, index in zip(found, busy, strict=True):
            alone.truncate(0)
            expected = alone.step(texts[index][: sessions[index].length], np.array([sessions[index].length - 1]))
            np.testing.assert_allclose(row, expected[0], atol=0.03)
            same = sessions[index].routing.experts[:, 0] == alone.routing.experts[:, -1]
            assert sessions[index].routing.experts.shape[1] == 1 and same.mean() > 0.8
    assert [session.length for session in sessions] == [19, 6, 4]
    assert device.runs == [(2, LANES, True)] * 4  # one run for each step, whoever takes part
    for session in sessions:
        session.close()
    assert device.closed and not device.memory


def test_a_full_sequence_idles_unharmed(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, SLOTS)
    full, device = open_lanes(prepared)
    full.step(ids, NO_ROWS)
    rows = full.read_rows(0, SLOTS)
    second, third = full.another(), full.another()
    second.step_together([third], ids[:2])
    for before, after in zip(rows, full.read_rows(0, SLOTS), strict=True):
        np.testing.assert_array_equal(before, after)
    device.runs.clear()
    with pytest.raises(EngineError, match=f"^context is full: it has room for {SLOTS} tokens, {SLOTS} are in it and 1"):
        second.step_together([third, full], ids[:3])
    assert (second.length, third.length, full.length) == (1, 1, SLOTS) and not device.runs
    with pytest.raises(ValueError, match="steps 3 sequences a run, not 4"):
        second.step_together([third, full, second], ids[:4])


def test_more_sequences_than_lanes_lie_in_another_block(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, 8)
    sessions = [open_lanes(prepared)[0]]
    device: Any = sessions[0]._device
    sessions += [sessions[0].another() for _ in range(LANES)]
    sessions[0].step(ids[:3], NO_ROWS)
    sessions[-1].step(ids[:5], NO_ROWS)
    device.runs.clear()
    found = sessions[0].step_together([sessions[-1], sessions[1]], ids[[3, 5, 0]])
    assert device.runs == [(2, LANES, True), (0, 1, True)]
    alone, _ = open_lanes(prepared, lanes=1)
    expected = alone.step(ids[:6], np.array([0, 3, 5]))
    np.testing.assert_allclose(found[[2, 0, 1]], expected, atol=0.03)
    sessions[1].close()
    again = sessions[0].another()  # takes the lane that came free, and finds nothing of what was in it
    assert all(not rows.any() for rows in again.read_rows(0, 0)) and again.length == 0
    held = sum(block.nbytes for block in device.memory.values())
    sessions[-1].close()
    assert sum(block.nbytes for block in device.memory.values()) < held


# engines


@needs_rtx
def test_engine_of_lanes_keeps_weights_once_over_three_profiles(tmp_path: Path) -> None:
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path, "int8", hidden_size=128, vocab_size=512)
    folder = build(bundle.path, "rtx4090", max_seq_len=64, max_batch=4)
    engine = json.loads((folder / "engine.json").read_text())
    session = engine["session"]
    assert engine["max_batch"] == 4 and session["numerics"]["checked"]
    planned, stored = session["network_weights_bytes"], session["memory"]["weights_bytes"]
    assert abs(stored - planned) <= 0.03 * planned
    one, chunk, lanes = session["memory"]["materialized_matrices"]
    assert (one, lanes) == (0, 0) and chunk > 0
    kernels = read_build_log(folder / "build.log").kernels
    layers = bundle.config["num_hidden_layers"]
    for profile in (0, 2):  # a step of all lanes reads the caches as a step of one does
        attention = [each for each in kernels if each.profile == profile and each.name.startswith("_gemv_mha")]
        assert len(attention) == layers
