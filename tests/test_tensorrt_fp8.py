"""FP8 weights for TensorRT: rounding, the network against the canonical graph with the very same weights, engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from test_tensorrt import needs_rtx
from test_tensorrt_families import export

from moedge.bundle import MODEL, Bundle
from moedge.errors import BuildError
from moedge.export.quantization import FLOAT8
from moedge.profiles.build import BuildOptions, build, build_portable
from moedge.profiles.commands import build_command
from moedge.profiles.targets._canonical import find_calls, find_linears, load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner, check_numerics, open_plain_session
from moedge.profiles.targets._trt_form import NetworkForm
from moedge.profiles.targets._trt_fp8 import codes_of, rounded, scales_of
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network

Array = np.ndarray[Any, Any]


def test_rounding_is_to_the_nearest_by_row() -> None:
    rng = np.random.default_rng(5)
    values = (rng.standard_normal((6, 64)) * 10.0 ** rng.integers(-3, 2, (6, 1))).astype(np.float32)
    values[5] = 0.0
    scales, codes = scales_of(values, np.float16), codes_of(values, np.float16)
    assert scales.shape == (6,) and (scales > 0).all()
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = grid[np.isfinite(grid)]
    found = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * scales.astype(np.float32)[:, None]
    np.testing.assert_array_equal(found, rounded(values, np.float16))
    for row, scale, got in zip(values, scales.astype(np.float32), found, strict=True):
        best = np.abs(row[:, None] - grid * scale).min(axis=1)
        np.testing.assert_allclose(np.abs(row - got), best, atol=1e-7 * np.abs(row).max())


def canonical_in_fp8(bundle: Bundle, ids: Array) -> Array:
    """Logits of the canonical graph whose matrices are rounded here one by one, but for embedding, head and router."""
    model, _ = load_canonical(bundle)
    matrices: list[tuple[ir.Value, bool]] = [(node.inputs[1], False) for node in find_linears(model)]
    for kind, down in (("Experts", 4), ("BiasedExperts", 5)):
        for call in find_calls(model, kind):
            matrices += [(call.inputs[3], False), (call.inputs[down], True)]
    for value, is_down in matrices:
        node = value.producer()
        if node is not None and node.op_type == "Transpose":
            value = node.inputs[0]
            node = value.producer()
        source = value if node is None else node.inputs[0]
        if source.producer() is not None:  # codes of 6 bits
            source = source.producer().inputs[0]
        stays = source.name.startswith(("head.", "embed.")) or source.name.endswith(".router.weight")
        if stays or source.shape[0] == 1:
            continue
        numbers = dequantized(node, source)
        width = numbers.shape[-1]
        if is_down:  # a row has one scale over all experts
            rows = numbers.transpose(1, 0, 2).reshape(numbers.shape[1], -1)
            new = rounded(rows, np.float32).reshape(numbers.shape[1], -1, width).transpose(1, 0, 2)
        else:
            new = rounded(numbers.reshape(-1, width), np.float32).reshape(numbers.shape)
        tensor = ir.tensor(np.ascontiguousarray(new), name=f"{source.name}.fp8")
        constant = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        model.graph.register_initializer(constant)
        value.replace_all_uses_with(constant)
    session = open_plain_session(ir.to_proto(model).SerializeToString(), bundle.path)
    logits: Array = session.run(["logits"], {"input_ids": ids[None]})[0][0]
    return logits


def dequantized(node: ir.Node | None, source: ir.Value) -> Array:
    if node is None or node.op_type == "Cast":
        return source.const_value.numpy().astype(np.float32)
    held = node.inputs[1]
    if held.producer() is not None:  # scales in fp16, or in bytes
        held = held.producer().inputs[0]
    codes, scales = (value.const_value.numpy() for value in (source, held))
    codes, scales = codes.astype(np.float32), FLOAT8[scales] if scales.dtype == np.uint8 else scales.astype(np.float32)
    points = node.inputs[2].const_value.numpy().astype(np.float32).reshape(scales.shape)
    block = node.attributes["block_size"].as_int()
    return (codes - np.repeat(points, block, axis=-1)) * np.repeat(scales, block, axis=-1)


@pytest.mark.parametrize(
    ("family", "name", "weights"),
    [
        ("qwen3_moe", "normalized_mqa", "int4"),
        ("qwen2_moe", "odd_experts_top_1_no_bias", "int8"),
        ("gpt_oss", "alternate_windows", "fp16"),
    ],
)
def test_network_equals_the_canonical_graph_with_rounded_weights(
    family: str, name: str, weights: str, tmp_path: Path
) -> None:
    bundle = export(family, name, tmp_path, weights)
    model, config = load_canonical(bundle)
    network = lower_network(model, config, 32, real=ir.DataType.FLOAT, form=NetworkForm(lanes=2, fp8=True))
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 16)
    expected = canonical_in_fp8(bundle, ids)
    for cuts in ([], [7, 8], list(range(1, 16))):
        runner = NetworkRunner(tmp_path / MODEL, lanes=2)
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids, cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    kinds = {value.dtype for value in ir.load(tmp_path / MODEL).graph.initializers.values()}
    assert ir.DataType.FLOAT8E4M3FN in kinds


def test_every_build_checks_the_rounded_network_and_says_what_rounding_costs(tmp_path: Path) -> None:
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path)  # its shared expert rides along
    assert check_numerics(bundle, form=NetworkForm(fp8=True))["difference"] < 1e-5
    folder = build(bundle.path, "jetson-thor", max_seq_len=64, precision="fp8")
    engine = json.loads((folder / "engine.json").read_text())
    assert engine["precision"].startswith("fp8 (from int4) weights, fp16 products")
    # 3 bits of mantissa: uniformly spread quotients are off by 2.6% or less of themselves, root mean square.
    assert 0.01 < engine["session"]["parts"][0]["fp8_error"] < 0.04
    assert engine["session"]["numerics"]["checked"]


def test_devices_without_fp8_are_refused(tmp_path: Path) -> None:
    bundle = export("qwen3_moe", "normalized_mqa", tmp_path)
    options = [str(bundle.path), "--profile", "a100-80gb", "--max-seq-len", "64", "--precision"]
    refused = "^--precision fp8: a100-80gb cannot run it, because fp8 needs compute capability 8.9 or later and it has"
    with pytest.raises(BuildError, match=refused):
        build(bundle.path, "a100-80gb", max_seq_len=64, precision="fp8")
    result = CliRunner().invoke(build_command, [*options, "fp4"])
    assert "--precision fp4: an engine has the bundle's weights, or fp8 made of them" in str(result.exception)
    with pytest.raises(BuildError, match="rtx3090 cannot run it, because"):
        build_portable(bundle.path, ["rtx4090", "rtx3090"], BuildOptions(max_seq_len=64, precision="fp8"))


@needs_rtx
def test_engine_of_fp8_keeps_weights_once_and_writes_no_expert_out(tmp_path: Path) -> None:
    bundle = export("qwen2_moe", "one_layer_dense", tmp_path, hidden_size=128, vocab_size=512)
    folder = build(bundle.path, "rtx4090", max_seq_len=64, precision="fp8")
    session = json.loads((folder / "engine.json").read_text())["session"]
    planned, stored = session["network_weights_bytes"], session["memory"]["weights_bytes"]
    assert abs(stored - planned) <= 0.03 * planned
    assert session["memory"]["materialized_matrices"][0] == 0
    assert session["numerics"]["checked"]
