"""The TensorRT session's buffers and shapes, with onnxruntime in the place of TensorRT and numpy in that of a GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_trt import FakeDevice
from small_process import small_process
from test_tensorrt_families import export

from moedge.bundle import Bundle
from moedge.errors import EngineError
from moedge.profiles.build import build
from moedge.profiles.device import load_profile
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits
from moedge.runtime.preflight import EngineInfo, read_engine
from moedge.runtime.sessions import _plans
from moedge.runtime.sessions._trt_session import TensorrtSession, split_runs

SLOTS = 40
PROFILE = "jetson-agx-orin-64gb"


@dataclasses.dataclass
class Prepared:
    bundle: Bundle
    folder: Path
    info: EngineInfo

    def open(self, capacity: int = SLOTS, chunk: int = 8, most: int = 1 << 30) -> tuple[TensorrtSession, FakeDevice]:
        device = FakeDevice(self.info.session["parts"], most)
        info = dataclasses.replace(self.info, session=self.info.session | {"chunk": chunk})
        return TensorrtSession(device, self.folder, info, capacity), device


@pytest.fixture(scope="module", params=["deepseek_v2 whole", "qwen2_moe whole", "deepseek_v2 cut", "qwen3_moe cut"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    family, how = request.param.split()
    name = {"deepseek_v2": "greedy_first_dense", "qwen2_moe": "one_layer_dense", "qwen3_moe": "normalized_mqa"}[family]
    bundle = export(family, name, tmp_path_factory.mktemp(family), num_hidden_layers=3)
    bound = (400 << 20) + 500_000 if how == "cut" else None
    with small_process():
        folder = build(bundle.path, load_profile(PROFILE), max_seq_len=SLOTS, max_memory=bound)
    info = read_engine(bundle, PROFILE)
    assert (len(info.session["parts"]) > 1) == (how == "cut")
    return Prepared(bundle, folder, info)


def draw(bundle: Bundle, count: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(7).integers(0, bundle.config["vocab_size"], count)


NO_ROWS = np.empty(0, np.int64)


def test_any_way_of_stepping_gives_the_networks_logits_and_routing(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, 21)
    runner = NetworkRunner(*[prepared.folder / part["model"] for part in prepared.info.session["parts"]])
    expected = runner.step(ids)
    session, device = prepared.open()
    session.step(ids[:13], NO_ROWS)
    found = [session.step(ids[13:18], np.array([4]))[0]]
    found += [session.step(ids[index : index + 1], np.zeros(1, np.int64))[0].copy() for index in range(18, 21)]
    np.testing.assert_allclose(found, expected["logits"][17:], atol=0.03)
    assert session.length == 21
    # A prompt of 13 in chunks of 8; then tokens one by one, which say that they repeat.
    assert device.runs == [(1, 8, False), (1, 5, False), (1, 5, False), *[(0, 1, True)] * 3]
    session.truncate(0)
    session.step(ids, NO_ROWS)
    for index, layer in enumerate(prepared.info.moe_layers):
        same = session.routing.experts[index] == expected[f"experts.{layer}"]
        assert same.mean() > 0.9  # half precision may turn a close choice
    assert session.routing.experts.shape == (len(prepared.info.moe_layers), 21, prepared.info.num_experts_per_tok)
    session.close()
    assert device.closed and not device.memory


def test_all_rows_come_in_order_and_equal_the_canonical_graph(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, 12)
    session, _ = prepared.open()
    out = np.zeros((12, prepared.info.vocab_size), np.float32)
    assert session.step(ids, np.arange(12), out) is out
    expected = canonical_logits(prepared.bundle, prepared.bundle.config["num_hidden_layers"], ids)
    np.testing.assert_allclose(out, expected, atol=0.1)
    session.truncate(3)
    again = session.step(ids[3:], np.array([8, 0, 8]))
    np.testing.assert_allclose(again, out[[11, 3, 11]], atol=0.03)


def test_room_and_memory_end_in_one_line_and_the_cache_stays(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, 20)
    session, _ = prepared.open(capacity=10)
    session.step(ids[:8], NO_ROWS)
    with pytest.raises(EngineError, match="^context is full: it has room for 10 tokens, 8 are in it and 3 more came$"):
        session.step(ids[8:11], NO_ROWS)
    assert session.length == 8 and session.capacity == 10
    for most in (3_000, 12_000):  # among the buffers, and among the caches
        device = FakeDevice(prepared.info.session["parts"], most)
        with pytest.raises(EngineError, match=r"out of memory \(error 2\)"):
            TensorrtSession(device, prepared.folder, prepared.info, SLOTS)
        assert device.closed and not device.memory


def test_sequences_share_engines_and_nothing_else(prepared: Prepared) -> None:
    ids = draw(prepared.bundle, 14)
    session, device = prepared.open()
    last = session.step(ids, np.array([13])).copy()
    other = session.another()
    assert len(device.plans) == len(prepared.info.session["parts"])
    other.step(ids[::-1], NO_ROWS)
    rows = session.read_rows(0, 13)
    session.truncate(13)
    np.testing.assert_allclose(session.step(ids[13:], np.zeros(1, np.int64)), last, atol=0.03)
    other.truncate(0)
    other.append_rows(rows)
    assert other.length == 13
    np.testing.assert_allclose(other.step(ids[13:], np.zeros(1, np.int64)), last, atol=0.03)
    with pytest.raises(ValueError, match="of another cache"):
        other.append_rows([part[..., :-1] for part in rows])
    session.close()
    session.close()
    assert not device.closed
    other.close()
    assert device.closed and not device.memory


def test_binding_is_done_when_something_changed_only(prepared: Prepared) -> None:
    session, device = prepared.open()
    ids = draw(prepared.bundle, 9)
    session.step(ids[:5], NO_ROWS)
    binds = [plan.binds for plan in device.plans]
    for token in ids[5:]:
        session.step(np.array([token]), np.zeros(1, np.int64))
    assert [plan.binds for plan in device.plans] == binds


def test_engines_that_do_not_chain_are_refused(prepared: Prepared) -> None:
    parts = json.loads(json.dumps(prepared.info.session["parts"]))
    parts[-1]["outputs"].remove("logits")
    info = dataclasses.replace(prepared.info, session=prepared.info.session | {"parts": parts})
    with pytest.raises(EngineError, match=r"its engines do not chain\); build it again: moedge build BUNDLE --profile"):
        TensorrtSession(FakeDevice(parts), prepared.folder, info, SLOTS)


@pytest.mark.parametrize(
    ("count", "rows", "runs"),
    [
        (1, [0], [(0, 1)]),
        (9, [], [(0, 4), (4, 8), (8, 9)]),
        (9, [8], [(0, 4), (4, 8), (8, 9)]),
        (9, [2, 6], [(0, 3), (3, 7), (7, 9)]),
        (3, [0, 1, 2], [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_runs_end_where_rows_are_wanted(count: int, rows: list[int], runs: list[tuple[int, int]]) -> None:
    assert split_runs(count, np.array(rows, np.int64), 4) == runs


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _plans.find_missing("no_such_package", "rtx") == (
        "no_such_package is not installed: pip install 'moedge[rtx]'"
    )
