"""Targets tensorrt_rtx and tensorrt: numerics of the lowered network, real engines for SM80 and SM89, failures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import CONFIGURATIONS, make_model, save_model

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError, ParityError
from moedge.profiles.build import build, finish_build
from moedge.profiles.device import DeviceProfile, load_profile
from moedge.profiles.targets import BuildRequest, _trt_build, _trt_check, tensorrt, tensorrt_rtx
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner, canonical_logits, check_numerics
from moedge.profiles.targets._trt_log import read_build_log
from moedge.profiles.targets._trt_network_files import shape_profiles
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network

SLOTS = 48
LENGTH = 24

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt_rtx: pip install 'moedge[rtx]'"
)


def export(folder: Path, weights: str, group_size: int = 16, **changes: Any) -> Bundle:
    checkpoint = save_model(make_model(11, **changes), folder / "checkpoint")
    return moedge.export(checkpoint, folder / "bundle", weights=weights, group_size=group_size, verify=False)


def lower(bundle: Bundle, folder: Path, real: ir.DataType = ir.DataType.FLOAT) -> NetworkRunner:
    model, config = load_canonical(bundle)
    network = lower_network(model, config, SLOTS, real=real)
    network.weights.write(folder / WEIGHTS_FILE)
    network.save(folder, MODEL)
    return NetworkRunner(folder / MODEL)


def draw_ids(bundle: Bundle) -> np.ndarray[Any, Any]:
    return np.random.default_rng(3).integers(0, bundle.config["vocab_size"], LENGTH)


# the network, on onnxruntime


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_lowered_equals_canonical_in_one_chunk_in_chunks_and_by_token(name: str, weights: str, tmp_path: Path) -> None:
    bundle = export(tmp_path, weights, **CONFIGURATIONS[name])
    ids = draw_ids(bundle)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    lower(bundle, tmp_path)
    for cuts in ([], [7, 15, 16], list(range(1, LENGTH))):
        runner = NetworkRunner(tmp_path / MODEL)
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["fp16", "int8", "int4"])
def test_half_precision_form_is_close_and_what_lies_behind_the_length_is_masked(weights: str, tmp_path: Path) -> None:
    bundle = export(tmp_path, weights)
    ids = draw_ids(bundle)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    runner = lower(bundle, tmp_path, ir.DataType.FLOAT16)
    for rows in runner.cache.values():
        rows[:] = 100.0  # leftovers of another sequence
    found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, [1, 9])])
    assert np.abs(found - expected).max() < 0.1
    assert (found.argmax(axis=-1) == expected.argmax(axis=-1)).mean() > 0.9


def test_routing_is_an_output_and_agrees_between_the_halves(tmp_path: Path) -> None:
    bundle = export(tmp_path, "int4")
    ids = draw_ids(bundle)
    runner = lower(bundle, tmp_path)
    whole = runner.step(ids)
    again = NetworkRunner(tmp_path / MODEL)
    steps = [again.step([token]) for token in ids]
    for layer in bundle.config["moe"]["layers"]:
        assert whole[f"experts.{layer}"].shape == (LENGTH, bundle.config["moe"]["num_experts_per_tok"])
        np.testing.assert_array_equal(
            whole[f"experts.{layer}"], np.concatenate([step[f"experts.{layer}"] for step in steps])
        )


def test_codes_are_kept_to_the_bit(tmp_path: Path) -> None:
    """Nothing is quantized again: the lowered codes are the bundle's, flipped to signed and moved."""
    bundle = export(tmp_path, "int4", n_shared_experts=2)
    lower(bundle, tmp_path)
    model, config = load_canonical(bundle)
    values = model.graph.initializers
    gate_up = values["layers.1.experts.gate_up.weight"].const_value.numpy().astype(np.int8)
    down = values["layers.1.experts.down.weight"].const_value.numpy().astype(np.int8)
    shared = values["layers.1.shared.down.weight"].const_value.numpy().astype(np.int8)
    lowered = ir.load(tmp_path / MODEL).graph.initializers
    count, double, width = gate_up.shape
    found = lowered["layers.1.experts.gate_up.lowered"].const_value.numpy().astype(np.int8)
    found = found.reshape(count + 2, 2, double // 2, width)
    np.testing.assert_array_equal(found[:count, 0], gate_up[:, 0::2] - 8)
    np.testing.assert_array_equal(found[:count, 1], gate_up[:, 1::2] - 8)
    columns = lowered["layers.1.experts.down.lowered"].const_value.numpy().astype(np.int8)
    columns = columns.reshape(config.hidden_size, count + 2, -1)
    np.testing.assert_array_equal(columns[:, :count], down.transpose(1, 0, 2) - 8)
    np.testing.assert_array_equal(columns[:, count:].reshape(config.hidden_size, -1), shared - 8)


def test_check_fails_by_name_when_the_network_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export(tmp_path, "int4")
    assert check_numerics(bundle)["difference"] < 1e-5
    lower_right = _trt_check.lower_network

    def lower_wrong(model: ir.Model, *args: Any, **options: Any) -> Any:
        network = lower_right(model, *args, **options)
        for node in network.model.graph:
            if node.op_type == "Sigmoid":
                node.op_type = "Tanh"
        return network

    monkeypatch.setattr(_trt_check, "lower_network", lower_wrong)
    with pytest.raises(ParityError, match=r"differs from the canonical graph by .* over 3 of 3 layers .*--profile cpu"):
        check_numerics(bundle)


# engines


@dataclasses.dataclass
class Built:
    bundle: Bundle
    folder: Path
    engine: dict[str, Any]
    said: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(tmp_path_factory.mktemp("tiny"), "int4", hidden_size=128, intermediate_size=256, vocab_size=512)


@pytest.fixture(scope="module", params=["rtx4090", "a100-80gb"])
def built(request: pytest.FixtureRequest, tiny: Bundle) -> Built:
    said: list[tuple[str, int, int]] = []
    folder = build(
        tiny.path,
        request.param,
        max_seq_len=128,
        latent_attention="absorbed",
        progress=lambda *step: said.append(step),
    )
    return Built(tiny, folder, json.loads((folder / "engine.json").read_text()), said)


@needs_rtx
def test_engine_is_real_well_formed_and_described(built: Built) -> None:
    import tensorrt_rtx as trt

    engine = built.engine
    assert engine["backend"] == "tensorrt_rtx" and engine["backend_version"] == trt.__version__
    assert tuple(engine["compute_capability"]) == load_profile(engine["profile"]).compute_capability
    assert sorted(engine["files"]) == ["build.log", "engine.plan", "model.onnx"]
    plan = (built.folder / "engine.plan").read_bytes()
    assert len(plan) > 1 << 20
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    assert not int(runtime.get_engine_validity(plan[:64])[1]) & 32
    assert int(runtime.get_engine_validity(b"\0" * 64)[1]) & 32  # the check itself tells
    session = engine["session"]
    assert session["parts"][0]["validity"]["well_formed"] and session["numerics"]["checked"]
    (part,) = session["parts"]
    assert part["inputs"][:3] == ["input_ids", "start", "rows"] and part["engine"] == "engine.plan"
    assert [shapes["input_ids"] for shapes in part["profiles"]] == [[[1]] * 3, [[2], [128], [128]]]
    assert {entry["name"]: (entry["width"], entry["dtype"]) for entry in engine["cache"]}["latent.1"] == (32, "float16")
    assert session["cache"]["aliased"]["past.rope.2"] == "present.rope.2"
    assert any(what.startswith(f"building for {engine['profile']} (SM8") for what, _, _ in built.said)


@needs_rtx
def test_log_shows_weights_once_and_no_expert_written_out_while_decoding(built: Built) -> None:
    session, config = built.engine["session"], built.bundle.config
    log = read_build_log(built.folder / "build.log")
    assert log.weights_bytes is not None
    assert abs(log.weights_bytes - session["network_weights_bytes"]) <= 0.03 * session["network_weights_bytes"]
    assert len(log.activation_bytes) == 2 and min(log.activation_bytes) > 0
    assert {kernel.profile for kernel in log.kernels} == {0, 1}
    smallest = config["moe"]["intermediate_size"] * config["hidden_size"]
    experts = [kernel for kernel in log.kernels if any(each.elements >= 8 * smallest for each in kernel.constants)]
    assert {kernel.profile for kernel in experts} == {0, 1}  # the log does show who reads them
    assert log.materialized(0, smallest) == []
    assert session["memory"] == log.to_json(smallest)


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_other_precisions_keep_their_weights_once_too(weights: str, tmp_path: Path) -> None:
    bundle = export(tmp_path, weights, hidden_size=128)
    folder = build(bundle.path, "rtx4090", max_seq_len=64)
    session = json.loads((folder / "engine.json").read_text())["session"]
    planned = session["network_weights_bytes"]
    assert abs(session["memory"]["weights_bytes"] - planned) <= 0.03 * planned
    assert session["memory"]["materialized_matrices"][0] == 0
    # What is told from the log is told at all: INT8 chunks are known to write their matrices out.
    assert (session["memory"]["materialized_matrices"][1] > 0) == (weights == "int8")


# failures


@pytest.fixture
def fake_builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Puts a script in the builder's place; it gets the job as `job` and the line-writer `say`."""

    def use(script: str) -> None:
        prelude = (
            "import json, os, signal, sys, time\n"
            "job = json.load(open(sys.argv[1]))\n"
            "say = lambda **message: print(json.dumps(message), flush=True)\n"
            "log = lambda text: open(job['log'], 'a').write(text)\n"
        )
        command = [sys.executable, "-c", prelude + script]
        monkeypatch.setattr(_trt_build, "builder_command", lambda job_path: [*command, str(job_path)])

    yield use


def run_fake(tmp_path: Path, progress: Any = None) -> Any:
    job = _trt_build.BuildJob(
        package="tensorrt_rtx",
        model=tmp_path / MODEL,
        folder=tmp_path,
        compute_capabilities=((8, 9),),
        profiles=[],
        settings={"tf32": False},
        failed_log=tmp_path / "kept" / "rtx4090.failed.log",
    )
    return _trt_build.run_builder(job, "building for rtx4090 (SM89)", progress)


def test_crash_is_one_line_with_the_kept_log_and_the_last_error(tmp_path: Path, fake_builder: Any) -> None:
    fake_builder("log('[I] fine\\n[E] first\\n[E] shape 7\\n[V] more\\n'); os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(BuildError) as caught:
        run_fake(tmp_path)
    kept = tmp_path / "kept" / "rtx4090.failed.log"
    assert str(caught.value) == (
        f"tensorrt_rtx built no engine: the builder crashed (SIGSEGV) after: [E] shape 7; its log: {kept}"
    )
    assert kept.read_text().startswith("[I] fine")


def test_refusal_and_python_fault_are_said_in_their_own_words(tmp_path: Path, fake_builder: Any) -> None:
    fake_builder("say(error='tensorrt_rtx 1.7 does not take the network: node 3'); sys.exit(1)")
    with pytest.raises(BuildError, match="^tensorrt_rtx built no engine: tensorrt_rtx 1.7 does not take the network"):
        run_fake(tmp_path)
    fake_builder("raise OSError('no libcuda')")
    with pytest.raises(BuildError, match="^tensorrt_rtx built no engine: OSError: no libcuda$"):
        run_fake(tmp_path)


def test_malformed_engine_is_refused(tmp_path: Path, fake_builder: Any) -> None:
    fake_builder("say(result={'validity': {'well_formed': False}})")
    with pytest.raises(BuildError, match="calls its own engine malformed"):
        run_fake(tmp_path)


def test_ctrl_c_cancels_the_builder(tmp_path: Path, fake_builder: Any) -> None:
    fake_builder("say(what='x', done=1, total=2); sys.stdin.read(); open(job['engine'], 'w').write('cancelled')")

    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_fake(tmp_path, interrupt)
    assert (tmp_path / "engine.plan").read_text() == "cancelled"  # it heard of it and ended by itself


@needs_rtx
def test_ctrl_c_cancels_tensorrts_own_build(tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through IProgressMonitor: TensorRT itself says that it was cancelled, long before it would be killed."""
    model, config = load_canonical(tiny)
    network = lower_network(model, config, 64, real=ir.DataType.FLOAT16)
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    monkeypatch.setattr(_trt_build, "_CANCEL_SECONDS", 120.0)
    job = _trt_build.BuildJob(
        package="tensorrt_rtx",
        model=tmp_path / MODEL,
        folder=tmp_path,
        compute_capabilities=((8, 9),),
        profiles=shape_profiles(network, 64),
        settings={"tf32": False},
        failed_log=tmp_path / "failed.log",
    )

    def interrupt(what: str, done: int, total: int) -> None:
        if total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _trt_build.run_builder(job, "building", interrupt)
    assert "BuildCanceled" in job.log.read_text() or "cancel" in job.log.read_text().lower()
    assert not (tmp_path / "engine.plan").exists()


def test_real_builder_says_what_the_parser_says(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / MODEL).write_bytes(b"no onnx")
    with pytest.raises(BuildError, match=r"^tensorrt_rtx built no engine: tensorrt_rtx [\d.]+ does not take the netw"):
        run_fake(tmp_path)


def request_for(bundle: Bundle, profile: str | DeviceProfile, **changes: Any) -> BuildRequest:
    device = load_profile(profile) if isinstance(profile, str) else profile
    return BuildRequest(**{"bundle": bundle, "device": device, "max_batch": 1, "max_seq_len": 64, **changes})


@needs_rtx
def test_devices_and_sizes_beyond_the_target(tiny: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"does not build for h100 \(SM90\); it builds for SM120, SM121, SM75, SM80"):
        tensorrt_rtx.build(request_for(tiny, "h100"), tmp_path, None)
    with pytest.raises(BuildError, match="^cpu has no compute capability, .*; use --backend onnxruntime$"):
        tensorrt_rtx.build(request_for(tiny, "cpu"), tmp_path, None)
    with pytest.raises(BuildError, match="needs room for 2 tokens or more"):
        tensorrt_rtx.build(request_for(tiny, "rtx4090", max_seq_len=1), tmp_path, None)


def test_failed_build_leaves_its_log_and_no_engine(tiny: Bundle, tmp_path: Path, fake_builder: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = tiny.engine_dir("rtx5090")
    fake_builder("log('[E] boom\\n'); os.abort()")
    device = dataclasses.replace(load_profile("rtx4090"), name="rtx5090")
    with pytest.raises(BuildError, match=r"crashed \(SIGABRT\) after: \[E\] boom; its log: .*rtx5090.failed.log$"):
        build(tiny.path, device, max_seq_len=64)
    assert not folder.exists() and folder.with_name("rtx5090.failed.log").read_text() == "[E] boom\n"


# the folder for a device


@pytest.fixture
def prepared(tiny: Bundle) -> Path:
    return build(tiny.path, "jetson-agx-orin-64gb", max_seq_len=64)


def test_folder_holds_all_that_the_device_needs(prepared: Path, tiny: Bundle) -> None:
    engine = json.loads((prepared / "engine.json").read_text())
    assert (engine["status"], engine["backend"], engine["compute_capability"]) == ("prepared", "tensorrt", [8, 7])
    manifest = json.loads((prepared / "build.json").read_text())
    assert sorted(manifest["files"]) == [MODEL, WEIGHTS_FILE] and manifest["package_minimum"] == "10.15"
    assert len((prepared / "README.txt").read_text().splitlines()) == 3
    runner = NetworkRunner(prepared / MODEL)
    ids = draw_ids(tiny)
    expected = canonical_logits(tiny, tiny.config["num_hidden_layers"], ids)
    # Of a token; the median: where half precision takes another expert, a random model goes its own way.
    assert np.median(np.abs(runner.step(ids)["logits"] - expected).max(axis=-1)) < 0.05


def test_folder_is_refused_without_tensorrt_elsewhere_and_when_damaged(
    prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        everything = (
            r"cannot be finished here: the Python package 'tensorrt' \(TensorRT 10.15 or later\) is not installed; on "
            r"a Jetson .*; and it is for NVIDIA Jetson AGX Orin 64GB .* has no GPU with a driver: .*; then: moed"
        )
        with pytest.raises(BuildError, match=everything):
            finish_build(prepared)
    pretend_package(prepared, package="numpy", package_minimum="1.0")
    monkeypatch.setattr(tensorrt.machine, "gpus", lambda: [])
    with pytest.raises(BuildError, match=r"here: it is for NVIDIA Jetson AGX Orin 64GB \(compute capability 8.7\)"):
        finish_build(prepared)
    pretend_package(prepared, package="numpy", package_minimum="99.1")
    with pytest.raises(BuildError, match=r"TensorRT [\d.]+ is installed, and this network needs 99.1 or later"):
        finish_build(prepared)
    weights = prepared / WEIGHTS_FILE
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BuildError, match="model.weights does not have the checksum in the manifest: the folder was d"):
        finish_build(prepared)
    (prepared / "build.json").write_text("{}")
    with pytest.raises(BuildError, match="missing format, profile, device, package.*prepare the folder again"):
        tensorrt.finish(prepared, None)


def pretend_package(folder: Path, **changes: str) -> None:
    path = folder / "build.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@needs_rtx
def test_folder_is_finished_where_the_device_is(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensorrt_rtx in tensorrt's place: the same builder, told the compute capability that it would find."""
    pretend_package(prepared, package="tensorrt_rtx", package_minimum="1.0")
    monkeypatch.setattr(tensorrt, "_is_here", lambda capability: True)
    run_builder = _trt_build.run_builder
    monkeypatch.setattr(
        tensorrt,
        "run_builder",
        lambda job, *rest: run_builder(dataclasses.replace(job, compute_capabilities=((8, 6),)), *rest),
    )
    finish_build(prepared)
    engine = json.loads((prepared / "engine.json").read_text())
    assert engine["status"] == "ready" and engine["files"]["engine.plan"]["bytes"] > 1 << 20
    assert engine["session"]["memory"]["materialized_matrices"][0] == 0
    assert engine["session"]["numerics"]["checked"]
