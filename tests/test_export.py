"""Export of DeepSeek-V3: the canonical graph against transformers, and what a bundle holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import CONFIGURATIONS, make_model, save_model, transformers_logits
from onnx.reference import ReferenceEvaluator

import moedge
from moedge.bundle import sha256_file
from moedge.export.config import moe_config_from_json

SEEDS = {name: 100 + place for place, name in enumerate(CONFIGURATIONS)}


def run_canonical(bundle: Path, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The graph as it is, on onnxruntime with nothing registered."""
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    logits: np.ndarray[Any, Any] = session.run(None, {"input_ids": ids})[0]
    return logits


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_fp32_logits_equal_transformers_on_every_position(name: str, tmp_path: Path) -> None:
    model = make_model(SEEDS[name], **CONFIGURATIONS[name])
    moedge.export(save_model(model, tmp_path / "checkpoint"), tmp_path / "bundle", weights="fp32")
    onnx.checker.check_model(str(tmp_path / "bundle" / "model.onnx"), full_check=True)
    rng = np.random.default_rng(SEEDS[name])
    for shape in ((2, 64), (1, 1), (3, 2)):
        ids = rng.integers(0, 320, shape)
        expected = transformers_logits(model, ids)
        np.testing.assert_allclose(run_canonical(tmp_path / "bundle", ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights", ["fp32", "fp16", "int8", "int4"])
def test_reference_evaluator_runs_the_same_graph(weights: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    moedge.export(tiny_checkpoint, tmp_path / "bundle", weights=weights, group_size=32, verify=False)
    path = tmp_path / "bundle" / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    ids = np.random.default_rng(3).integers(0, 320, (1, 7))
    (expected,) = ReferenceEvaluator(onnx.load(path)).run(None, {"input_ids": ids})
    np.testing.assert_allclose(run_canonical(tmp_path / "bundle", ids), expected, rtol=0, atol=1e-4)


def test_every_moedge_op_is_a_function_of_standard_ops(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    domains = {node.domain for node in model.graph.node}
    assert domains == {"", "moedge"}
    assert {node.domain for function in model.functions for node in function.node} == {""}
    called = {node.op_type for node in model.graph.node if node.domain == "moedge"}
    assert called == {function.name for function in model.functions}
    assert {"SigmoidTopKGate", "Experts", "LatentAttention"} <= called


def test_weights_are_stored_once_aligned_and_described(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "moedge.json").read_text())
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    places = {}
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            assert external["location"] == "weights.bin"
            places[tensor.name] = (int(external["offset"]), int(external["length"]))
    assert all(offset % 64 == 0 for offset, _ in places.values())
    own = sorted(place for name, place in places.items() if not name.endswith(".zero_points"))
    assert all(first + length <= second for (first, length), (second, _) in zip(own, own[1:], strict=False))
    size = (tiny_bundle / "weights.bin").stat().st_size
    assert sum(manifest["sizes"].values()) == sum(length for _, length in own)
    assert max(offset + length for offset, length in places.values()) <= size < sum(manifest["sizes"].values()) * 1.1
    for name, entry in manifest["files"].items():
        assert entry == {"bytes": (tiny_bundle / name).stat().st_size, "sha256": sha256_file(tiny_bundle / name)}


def test_manifest_says_what_the_model_is(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "moedge.json").read_text())
    config = moe_config_from_json(manifest["config"])
    assert config.to_json() == manifest["config"]
    assert config.moe.layers == (1, 2) and config.moe.num_experts == 8
    (gating,) = manifest["gating"]
    assert gating["op"] == "moedge.SigmoidTopKGate" and gating["layers"] == [1, 2]
    assert gating["attributes"]["n_group"] == 2
    experts = manifest["quantization"]["classes"]["experts"]
    assert experts["dtype"] == "uint4" and experts["group_size"] == 32 and 0.05 < experts["relative_error"] < 0.15
    assert manifest["quantization"]["classes"]["router"] == {"dtype": "float32"}
    parameters = sum(parameter.numel() for parameter in make_model(seed=7).parameters())
    assert manifest["model"]["parameters"] == parameters + 2 * 8  # and the correction biases, which are buffers


def test_a_group_size_that_does_not_divide_gives_way(tiny_checkpoint: Path, tmp_path: Path) -> None:
    moedge.export(tiny_checkpoint, tmp_path / "bundle", weights="int4", group_size=128)
    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert shapes["layers.1.attn.o.weight.scales"] == (64, 1)  # width 64: group 64
    assert shapes["layers.1.attn.q_b.weight.scales"] == (96, 3)  # width 48: group 16
    assert shapes["layers.1.experts.gate_up.weight.scales"] == (8, 64, 2)  # 64 and 32 share one group: 32


def test_extra_layer_for_multi_token_prediction_is_left_out_with_a_word(tmp_path: Path) -> None:
    model = make_model(5, num_hidden_layers=3)
    save_model(model, tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    bundle = moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32")
    (note,) = bundle.manifest["provenance"]["notes"]
    assert "multi-token-prediction layer" in note


def test_sharded_bfloat16_checkpoint(tmp_path: Path) -> None:
    import torch
    from transformers import DeepseekV3ForCausalLM

    make_model(6).to(torch.bfloat16).save_pretrained(tmp_path / "checkpoint", max_shard_size="100KB")
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 2
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", weights="fp32")
    ids = np.random.default_rng(6).integers(0, 320, (1, 33))
    expected = transformers_logits(model, ids)
    np.testing.assert_allclose(run_canonical(tmp_path / "bundle", ids), expected, rtol=0, atol=1e-4)
