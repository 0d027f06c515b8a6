"""Target and session of onnxruntime on CUDA, on the CPU provider: the same graph, the same buffers, no GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from test_tensorrt import export as export_latent
from test_tensorrt_families import BUILT, export

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError, EngineError
from moedge.profiles.build import build
from moedge.profiles.deep import verify_routes
from moedge.profiles.device import load_profile
from moedge.profiles.targets import onnxruntime_cuda, pick_target
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import canonical_logits
from moedge.runtime import machine
from moedge.runtime.preflight import read_engine
from moedge.runtime.sessions import SessionOptions
from moedge.runtime.sessions import onnxruntime_cuda as backend

SLOTS = 48


def lower_and_run(bundle: Bundle, ids: np.ndarray[Any, Any], real: ir.DataType) -> np.ndarray[Any, Any]:
    """Logits of the lowered graph: a chunk, a token, a chunk behind others; the cache copied, not bound."""
    import onnxruntime as ort

    model, _ = load_canonical(bundle)
    cache = onnxruntime_cuda.lower(model, max_seq_len=SLOTS, real=real)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    dtype = np.float16 if real == ir.DataType.FLOAT16 else np.float32
    held = {
        each.name: np.zeros((1, each.heads, SLOTS, each.width // each.heads) if each.heads else (0, each.width), dtype)
        for each in cache
    }
    pieces, length, names = [], 0, [value.name for value in session.get_outputs()]
    for part in np.split(ids, [7, 8]):
        feeds = {"input_ids": part, "rows": np.arange(len(part)), "length": np.array([length])}
        feeds |= {f"past.{name}": rows for name, rows in held.items()}
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        found = dict(zip(names, session.run(names, taken), strict=True))
        for each in cache:
            new = found[f"new.{each.name}"]
            held[each.name] = new if each.heads else np.concatenate([held[each.name], new])
        pieces.append(found["logits"])
        length += len(part)
    return np.concatenate(pieces)


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "mixtral", "phimoe", "qwen2_moe"])
def test_the_graph_without_router_weights_is_the_canonical_one(family: str, tmp_path: Path) -> None:
    """Softmax, sigmoid, sparse mixer and scaled gates, through a kernel that routes by itself."""
    bundle = export(family, BUILT[family], tmp_path)
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 20)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    assert np.abs(lower_and_run(bundle, ids, ir.DataType.FLOAT) - expected).max() < 1e-4
    # Of a token; the median: where half precision takes another expert, a random model goes its own way.
    assert np.median(np.abs(lower_and_run(bundle, ids, ir.DataType.FLOAT16) - expected).max(axis=-1)) < 0.05


# The CPU's QMoE of 8 bits rounds activations to int8 whatever `accuracy_level` says: a wrong wiring is far beyond.
@pytest.mark.parametrize(
    ("weights", "algorithm", "tolerance"), [("int8", "rtn", 0.2), ("int4", "hqq", 1e-4), ("fp16", "rtn", 1e-4)]
)
def test_other_weights(weights: str, algorithm: str, tolerance: float, tmp_path: Path) -> None:
    bundle = export("qwen3_moe", BUILT["qwen3_moe"], tmp_path, weights, algorithm)
    ids = np.random.default_rng(4).integers(0, bundle.config["vocab_size"], 12)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    assert np.abs(lower_and_run(bundle, ids, ir.DataType.FLOAT) - expected).max() < tolerance


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Latent attention, experts in groups of 64."""
    folder = tmp_path_factory.mktemp("cuda")
    changes = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 256}
    bundle = export_latent(folder, "int4", group_size=64, **changes)
    build(bundle.path, "rtx4090", backend="onnxruntime", max_seq_len=SLOTS)
    return bundle


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("cuda-grouped")
    changes = {"hidden_size": 128, "moe_intermediate_size": 64, "vocab_size": 256}
    checkpoint = export("qwen3_moe", BUILT["qwen3_moe"], folder, **changes).path.parent / "checkpoint"
    bundle = moedge.export(checkpoint, folder / "wide", weights="int4", group_size=64, verify=False)
    build(bundle.path, "a100-80gb", backend="onnxruntime", max_seq_len=SLOTS)
    return bundle


def open_on_cpu(bundle: Bundle, profile: str) -> backend.OnnxruntimeCudaSession:
    return backend.open_on(backend.CPU, bundle, read_engine(bundle, profile), SessionOptions(threads=1))


def test_the_engine_is_described_and_its_kernels_get_what_they_need(built: Bundle) -> None:
    engine = json.loads((built.engine_dir("rtx4090") / "engine.json").read_text())
    assert (engine["target"], engine["backend"]) == ("onnxruntime_cuda", "onnxruntime_cuda")
    assert (engine["compute_capability"], engine["status"]) == ([8, 9], "ready")
    assert {entry["dtype"] for entry in engine["cache"]} == {"float16"}
    model = ir.load(built.engine_dir("rtx4090") / MODEL)
    mixtures = [node for node in model.graph if node.op_type == "QMoE"]
    assert len(mixtures) == len(built.config["moe"]["layers"])
    for node in mixtures:
        values = {name: attribute.value for name, attribute in node.attributes.items()}
        assert (values["use_sparse_mixer"], values["weights_prepacked"], values["block_size"]) == (0, 0, 64)
        assert len(node.inputs) <= 14 or node.inputs[14] is None  # no router_weights
        assert node.inputs[2].const_value.location == "weights.bin"  # the bundle's own codes


@pytest.mark.parametrize(("which", "profile"), [("built", "rtx4090"), ("grouped", "a100-80gb")])
def test_session_chunks_steps_rewinds_and_keeps_sequences_apart(
    which: str, profile: str, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(which)
    ids = np.random.default_rng(5).integers(0, 256, 16)
    expected = canonical_logits(bundle, bundle.config["num_hidden_layers"], ids)
    session = open_on_cpu(bundle, profile)
    whole = session.step(ids, np.arange(16)).copy()
    # Of a token; the median: where half precision takes another expert, a random model goes its own way.
    assert np.median(np.abs(whole - expected).max(axis=-1)) < 0.05 and session.length == 16
    layers, top_k = len(bundle.config["moe"]["layers"]), bundle.config["moe"]["num_experts_per_tok"]
    assert session.routing.experts.shape == session.routing.weights.shape == (layers, 16, top_k)
    routed = session.routing.experts
    session.truncate(6)
    other = session.another()
    pieces, steps = [], []
    for place in range(6, 16):  # the two take turns
        pieces.append(session.step(ids[place : place + 1], np.array([0])).copy())
        steps.append(session.routing.experts)
        other.step(ids[::-1][place : place + 1], np.array([0]))
    assert np.abs(np.concatenate(pieces) - whole[6:]).max() < 0.05
    np.testing.assert_array_equal(np.concatenate(steps, axis=1), routed[:, 6:])
    kept = session.read_rows(2, 9)
    session.truncate(2)
    session.append_rows(kept)
    assert session.length == 9
    out = np.empty((1, 256), np.float32)
    again = session.step(ids[9:12], np.array([2]), out)
    assert again is out and np.abs(again[0] - whole[11]).max() < 0.05
    with pytest.raises(ValueError, match="of another cache"):
        session.append_rows([rows.astype(np.float64) for rows in kept])
    with pytest.raises(EngineError, match="context is full: it has room for 48 tokens, 12 are in it and 37 more came"):
        session.step(np.zeros(37, np.int64), np.array([0]))
    assert session.step_together([], ids[12:13]).shape == (1, 256)
    for each in (session, other):
        each.close()


def test_its_routes_are_the_canonical_ones(built: Bundle) -> None:
    deep = verify_routes(built, ["rtx4090"])
    assert deep.faults == [] and deep.engines["rtx4090"]["how"] == "its graph on the CPU"
    layers = deep.engines["rtx4090"]["layers"]
    assert [each["layer"] for each in layers] == built.config["moe"]["layers"]
    assert all(each["experts"] == "each token its own" for each in layers)


def test_refusals_name_what_is_missing(built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "gpus", list)
    with pytest.raises(EngineError, match=r"needs a GPU of compute capability 8.9, and this machine has no GPU"):
        moedge.load(built.path, "rtx4090")
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("RTX 4090", (8, 9), 24 << 30)])
    import onnxruntime as ort

    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"that is installed has no CUDAExecutionProvider: pip uninstall onnxruntime"):
        moedge.load(built.path, "rtx4090")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert backend.cannot_run(read_engine(built, "rtx4090")) == (
        "onnxruntime-gpu is not installed: pip install 'moedge[gpu]'"
    )


@pytest.mark.skipif(machine.gpu_driver() is not None, reason="for machines without a GPU")
def test_a_provider_that_does_not_start_is_no_engine(built: Bundle) -> None:
    info = read_engine(built, "rtx4090")
    with (
        pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available"),
        pytest.raises(EngineError, match=r"did not start its CUDAExecutionProvider .* pip install 'moedge\[gpu\]'"),
    ):
        backend.open_session(built, info, SessionOptions(threads=1))
    wrong = dataclasses.replace(info, cache=tuple(dataclasses.replace(e, dtype="float32") for e in info.cache))
    with pytest.raises(EngineError, match=r"not what its engine.json says \(past.latent.0 is missing, or of another"):
        backend.open_on(backend.CPU, built, wrong, SessionOptions(threads=1))


def test_builds_that_the_kernels_would_not_take(tmp_path: Path) -> None:
    bundle = export("qwen3_moe", BUILT["qwen3_moe"], tmp_path)
    with pytest.raises(BuildError, match=r"^experts are quantized in groups of 16, .* --group-size 128 \(or 64\)"):
        build(bundle.path, "rtx4090", backend="onnxruntime", max_seq_len=SLOTS)
    with pytest.raises(BuildError, match=r"^max_batch 2: the onnxruntime engine for a GPU runs one sequence"):
        build(bundle.path, "rtx4090", backend="onnxruntime", max_seq_len=SLOTS, max_batch=2)
    with pytest.raises(BuildError, match=r"^cpu has no compute capability, so no CUDA: use --backend onnxruntime$"):
        build(bundle.path, "cpu", backend="onnxruntime_cuda", max_seq_len=SLOTS)
    assert not bundle.engines()
    assert pick_target("onnxruntime", load_profile("cpu")) == "onnxruntime"
    assert pick_target("onnxruntime", load_profile("l4")) == "onnxruntime_cuda"
