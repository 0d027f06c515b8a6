"""NaN in a router is never picked silently: every form of a gate gives weights of NaN, and an engine an error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fake_engine import file_entry
from fake_trt import FakeDevice
from onnx.reference import ReferenceEvaluator
from test_gating import CASES, attributes_of, draw_inputs, every_way, function_model

import moedge
from moedge.bundle import ENGINE_MANIFEST, MANIFEST, WEIGHTS, Bundle, read_json, sealed, write_json
from moedge.errors import EngineError
from moedge.profiles.build import build, write_engine_manifest
from moedge.runtime.initializers import read_placed
from moedge.runtime.preflight import read_engine
from moedge.runtime.sessions import Routing, SessionOptions, check_routing, onnxruntime_cpu, onnxruntime_cuda
from moedge.runtime.sessions._trt_session import TensorrtSession

ALL = [(op, case) for op in ("SoftmaxTopKGate", "SigmoidTopKGate", "SparseMixerGate") for case in CASES[op]]


def forms(op: str, attributes: dict[str, Any], inputs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from every_way(op, attributes, inputs).items()
    yield "evaluator", ReferenceEvaluator(function_model(op, attributes)).run(None, inputs)
    if op != "SparseMixerGate":
        torch = pytest.importorskip("torch")
        from moedge.export import torch_ops

        tensors = [torch.tensor(each) for each in inputs.values()]
        yield "torch", [each.numpy() for each in torch_ops._OPS[op](*tensors, *attributes.values())]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("op", "case"), ALL, ids=str)
def test_every_form_gives_a_token_with_a_nan_weights_of_nan(op: str, case: tuple[Any, ...]) -> None:
    """One NaN among an odd token's logits, in each place in turn; the tokens between are untouched."""
    inputs = draw_inputs(op, case[0], 2 * case[0] + 1)
    clean = {name: each.copy() for name, each in inputs.items()}
    for expert in range(case[0]):
        inputs["logits"][2 * expert + 1, expert] = np.nan
    attributes = attributes_of(op, case)
    expected = every_way(op, attributes, clean)["reference"]
    for name, (experts, weights) in forms(op, attributes, inputs):
        assert np.isnan(weights[1::2]).any(axis=1).all(), name
        np.testing.assert_array_equal(experts[::2], expected[0][::2], err_msg=name)
        np.testing.assert_allclose(weights[::2], expected[1][::2], rtol=1e-5, atol=1e-6, err_msg=name)
        assert ((experts >= 0) & (experts < case[0])).all(), name


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_nan_in_the_correction_bias_shows_too() -> None:
    for case in CASES["SigmoidTopKGate"]:
        inputs = draw_inputs("SigmoidTopKGate", case[0], 20)
        inputs["bias"][case[0] // 2] = np.nan
        for name, (_, weights) in forms("SigmoidTopKGate", attributes_of("SigmoidTopKGate", case), inputs):
            assert np.isnan(weights).any(axis=1).all(), name


def poison(bundle: Path, name: str, rows: slice) -> None:
    """NaN in rows of a float32 tensor of weights.bin, and checksums as if it had always been there."""
    (tensor,) = [each for each in read_placed(bundle / "model.onnx") if each.name == name]
    weights = np.memmap(bundle / WEIGHTS, np.float32, "r+", tensor.offset, (tensor.length // 4,))
    weights.reshape(tensor.shape)[rows] = np.nan
    weights.flush()
    entry = file_entry(bundle / WEIGHTS)
    manifest = read_json(bundle / MANIFEST)
    manifest["files"][WEIGHTS] = entry
    write_json(bundle / MANIFEST, sealed(manifest))
    document = read_json(bundle / "engines/cpu" / ENGINE_MANIFEST)
    document["made_from"][WEIGHTS] = entry["sha256"]
    write_engine_manifest(bundle / "engines/cpu", document)


def test_an_engine_names_the_layer_and_the_token(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    poison(bundle, "embed.weight.scales", slice(7, 8))  # token 7 alone
    damaged = "the weights or the engine are damaged; check them with `moedge verify`"
    with moedge.load(bundle, prefill_chunk=2) as engine:
        assert np.isfinite(engine.logits([1, 2, 3])).all()
        for call in (engine.logits, engine.routing, lambda ids: list(engine.generate(ids, max_new_tokens=2))):
            with pytest.raises(EngineError) as caught:
                call([1, 2, 7])  # first of its chunk: in attention 0 times NaN would reach those before it
            assert str(caught.value) == f"the router of layer 1 gave NaN for token 2: {damaged}"
        session = engine.begin()
        session.step(np.array([1, 2]), np.empty(0, np.int64))
        with pytest.raises(EngineError, match="of layer 1 gave NaN for token 2"):
            session.step(np.array([7]), np.array([0]))
        assert session.length == 2  # as before: the context goes on
        assert np.isfinite(session.step(np.array([3]), np.array([0]))).all()


def test_one_experts_row_of_a_router_is_enough(tiny_bundle: Path, tmp_path: Path) -> None:
    """Its logit alone is NaN, and top-k would pass it over."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    poison(bundle, "layers.2.router.weight", slice(5, 6))
    with moedge.load(bundle) as engine, pytest.raises(EngineError, match="the router of layer 2 gave NaN for token 0"):
        list(engine.generate("a", max_new_tokens=2))


def damage_graphs(folder: Path, name: str) -> None:
    """In every graph of an engine's folder a router of zeros but for a NaN in the first expert's row."""
    for path in folder.glob("*.onnx"):
        model = ir.load(path)
        for value in model.graph.initializers.values():
            if str(value.name).startswith(name):
                values = np.zeros(value.const_value.shape.numpy(), value.const_value.dtype.numpy())  # type: ignore[union-attr]
                values.reshape(-1)[0] = np.nan
                value.const_value = ir.tensor(values, name=value.name)
        path.write_bytes(ir.to_proto(model).SerializeToString())


@pytest.fixture(scope="module")
def damaged(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Engines for the CPU, onnxruntime on CUDA and TensorRT whose second router has a NaN."""
    made: Bundle = moedge.export(tiny_checkpoint, tmp_path_factory.mktemp("nan") / "b", weights="fp32", verify=False)
    for profile, backend in (("cpu", None), ("rtx4090", "onnxruntime"), ("jetson-agx-orin-64gb", None)):
        build(made.path, profile, backend=backend, max_seq_len=48)
        damage_graphs(made.engine_dir(profile), "layers.2.router.weight")
    return made


def open_damaged(bundle: Bundle, which: str) -> Any:
    options = SessionOptions(threads=1, lanes=2 if which == "lanes" else 1)
    if which == "onnxruntime_cuda":
        return onnxruntime_cuda.open_on(onnxruntime_cuda.CPU, bundle, read_engine(bundle, "rtx4090"), options)
    if which == "tensorrt":
        info = read_engine(bundle, "jetson-agx-orin-64gb")
        folder = bundle.engine_dir("jetson-agx-orin-64gb")
        return TensorrtSession(FakeDevice(info.session["parts"]), folder, info, 48)
    return onnxruntime_cpu.open_session(bundle, read_engine(bundle, "cpu"), options)


@pytest.mark.parametrize("which", ["onnxruntime", "lanes", "onnxruntime_cuda", "tensorrt"])
def test_every_session_reports_it_and_stays_what_it_was(which: str, damaged: Bundle) -> None:
    session = open_damaged(damaged, which)
    for _ in range(2):
        for ids in (np.array([5]), np.arange(7)):
            with pytest.raises(EngineError, match="^the router of layer 2 gave NaN for token 0: the weights or the"):
                session.step(ids, np.array([len(ids) - 1]))
            assert session.length == 0
        with pytest.raises(EngineError, match="^the router of layer 2 gave NaN for token 0: "):
            session.step_together([], np.array([5]))
        assert session.length == 0
    if which == "lanes":
        other = session.another()
        with pytest.raises(EngineError, match="^the router of layer 2 gave NaN for token 0: "):
            session.step_together([other], np.array([5, 6]))
        assert session.length == other.length == 0
        other.close()
    session.close()


def test_routes_are_checked_by_layer_then_token() -> None:
    weights = np.ones((2, 3, 2), np.float32)
    routing = Routing(np.zeros((2, 3, 2), np.int64), weights)
    check_routing(routing, (3, 5), 10)
    weights[1, 0, 1] = np.nan
    with pytest.raises(EngineError, match="the router of layer 5 gave NaN for token 10:"):
        check_routing(routing, (3, 5), 10)
    weights[0, 2, 0] = np.nan
    with pytest.raises(EngineError, match="the router of layer 3 gave NaN for token 12:"):
        check_routing(routing, (3, 5), 10)
