"""Target onnxruntime: the lowered graph against the canonical one, and what it must not do."""

from __future__ import annotations

import collections
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import CONFIGURATIONS, make_model, save_model
from lowered_graph import LoweredGraph

import moedge
from moedge.bundle import Bundle
from moedge.profiles.targets import onnxruntime as target
from moedge.profiles.targets._canonical import load_canonical
from moedge.runtime import kernels

LENGTH = 40


def lowered(bundle: Path, accuracy_level: int) -> LoweredGraph:
    model, _ = load_canonical(Bundle.open(bundle))
    cache = target.lower(model, accuracy_level=accuracy_level, fused_experts=target.has_router_weights())
    return LoweredGraph(model, cache, bundle)


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int4"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_lowered_equals_canonical_whole_chunked_and_step_by_step(name: str, weights: str, tmp_path: Path) -> None:
    model = make_model(200, **CONFIGURATIONS[name])
    moedge.export(save_model(model, tmp_path / "c"), tmp_path / "b", weights=weights, group_size=16, verify=False)
    ids = np.random.default_rng(200).integers(0, 320, LENGTH)
    canonical = ort.InferenceSession(str(tmp_path / "b" / "model.onnx"))
    (expected,) = canonical.run(None, {"input_ids": ids[None]})
    whole = lowered(tmp_path / "b", 0).step(ids)["logits"]
    np.testing.assert_allclose(whole, expected[0], rtol=0, atol=1e-4)
    graph = lowered(tmp_path / "b", 0)
    chunks = [graph.step(part)["logits"] for part in np.split(ids, [13, 14, *range(15, LENGTH)])]
    np.testing.assert_allclose(np.concatenate(chunks), expected[0], rtol=0, atol=1e-4)


def test_int8_activations_stay_near(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """accuracy_level 4 rounds activations to int8; the canonical graph does not. Wiring faults are far larger."""
    for weights in ("int4", "int8"):
        moedge.export(tiny_checkpoint, tmp_path / weights, weights=weights, group_size=32, verify=False)
        ids = np.random.default_rng(8).integers(0, 320, LENGTH)
        (expected,) = ort.InferenceSession(str(tmp_path / weights / "model.onnx")).run(None, {"input_ids": ids[None]})
        actual = lowered(tmp_path / weights, target.ACCURACY_LEVEL).step(ids)["logits"]
        # The median: where a rounding flips an expert, a random model goes its own way.
        assert np.median(np.abs(actual - expected[0])) < 0.15 * np.abs(expected).std()


def test_weights_are_those_of_the_canonical_graph(tiny_bundle: Path) -> None:
    def places(path: Path) -> set[tuple[str, str]]:
        model = onnx.load(path, load_external_data=False)
        externals = [{e.key: e.value for e in tensor.external_data} for tensor in model.graph.initializer]
        return {(external["offset"], external["length"]) for external in externals if external}

    engine = tiny_bundle / "engines" / "cpu"
    names = [name for stock in ("model.onnx", "model.lanes.onnx") for name in (kernels.own_name(stock), stock)]
    for name in names:
        assert places(engine / name) <= places(tiny_bundle / "model.onnx")
        assert (engine / name).stat().st_size < 100_000
    assert places(engine / "model.lanes.onnx") == places(engine / "model.onnx")
    assert {path.name for path in engine.iterdir() if path.suffix != ".json"} == {"genai.onnx", *names}


@pytest.mark.parametrize("name", ["model.onnx", "model.lanes.onnx"])
def test_the_graph_never_copies_the_cache(name: str, tiny_bundle: Path, tmp_path: Path) -> None:
    """A cache is only ever the right-hand side of a product, and its outputs are rows of new tokens alone."""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    engine = moedge.build(bundle, "cpu", kv_cache="fp32")  # what stock graphs have by themselves
    graph = onnx.load(engine / name, load_external_data=False).graph
    users = collections.defaultdict(list)
    for node in graph.node:
        for place, value in enumerate(node.input):
            if value.startswith("cache."):
                users[value].append((node.op_type, place))
    lanes = [""] if name == "model.onnx" else [f".{lane}" for lane in range(target.LANES)]
    assert sorted(users) == sorted(f"cache.latent.{layer}{lane}" for layer in range(3) for lane in lanes)
    products = {("FusedMatMul", 1), ("MatMul", 1)}
    first = f"cache.latent.0{lanes[0]}"
    assert set(users[first]) == products | {("Shape", 0)}
    assert all(set(uses) == products for value, uses in users.items() if value != first)
    rows = {output.name: output.type.tensor_type.shape.dim[0].dim_param for output in graph.output}
    new = {value: rows[value] for value in rows if value.startswith("new.")}
    assert len(new) == len(users) and all(value + ".rows" == dimension for value, dimension in new.items())


def test_experts_and_matrices_run_in_the_quantized_kernels(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "engines" / "cpu" / "model.onnx", load_external_data=False).graph
    counts = collections.Counter(node.op_type for node in graph.node)
    if target.has_router_weights():
        assert counts["QMoE"] == 2
        assert counts["DequantizeLinear"] == 1  # the embedding's few rows
    assert counts["MatMulNBits"] == 3 * 4 + 2 + 2 * 2 + 1
    for node in graph.node:
        if node.op_type in ("QMoE", "MatMulNBits"):
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            assert attributes["accuracy_level"] == 4


@pytest.mark.parametrize("name", ["model.onnx", "model.lanes.onnx"])
def test_own_kernels_take_every_quantized_product(name: str, tiny_bundle: Path) -> None:
    """And nothing in that graph is left that onnxruntime would repack but the few matrices in floating point."""
    graph = onnx.load(tiny_bundle / "engines" / "cpu" / kernels.own_name(name), load_external_data=False).graph
    counts = collections.Counter(node.op_type for node in graph.node)
    # Of each layer q_a beside kv_a, q_b, and o, and the head; the dense layer's MLP; all of a mixture is one.
    assert (counts["Moe"], counts["Projections"], counts["Mlp"]) == (2, 3 * 3 + 1, 1)
    assert not counts["Experts"] + counts["Router"] + counts["QMoE"]
    assert not counts["MatMulNBits"] + counts["Scan"] + counts["Linear"] + counts["TopK"]


def test_the_cache_holds_the_latent_not_keys_and_values(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    attention = bundle.config["attention"]
    model, _ = load_canonical(bundle)
    assert {entry.width for entry in target.lower(model)} == {attention["kv_lora_rank"] + attention["qk_rope_head_dim"]}


def test_the_interface_is_what_sessions_bind(tiny_bundle: Path) -> None:
    graph = onnx.load(tiny_bundle / "engines" / "cpu" / "model.onnx", load_external_data=False).graph
    caches = [f"cache.latent.{layer}" for layer in range(3)]
    assert [value.name for value in graph.input] == ["input_ids", "rows", *caches]
    routing = {f"{kind}.{layer}" for kind in ("experts", "weights") for layer in (1, 2)}
    assert {value.name for value in graph.output} == {"logits", *(f"new.latent.{i}" for i in range(3)), *routing}


def test_experts_without_the_kernel_run_as_their_function(tiny_bundle: Path) -> None:
    """What an older onnxruntime gets: no `QMoE`, the same logits."""
    ids = np.random.default_rng(9).integers(0, 320, LENGTH)
    (expected,) = ort.InferenceSession(str(tiny_bundle / "model.onnx")).run(None, {"input_ids": ids[None]})
    model, _ = load_canonical(Bundle.open(tiny_bundle))
    cache = target.lower(model, accuracy_level=0, fused_experts=False)
    assert not [node for node in model.graph if node.op_type == "QMoE"]
    logits = LoweredGraph(model, cache, tiny_bundle).step(ids)["logits"]
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-4)
