"""Quantization algorithms by themselves, and zero points through the graphs that onnxruntime runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from checkpoints import make_model, save_model
from click.testing import CliRunner
from lowered_graph import LoweredGraph

import moedge
from moedge import cli
from moedge.bundle import Bundle
from moedge.export import writer
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.layout import plan_layout
from moedge.export.options import ALGORITHMS, BY_CHANNEL, GROUP_SIZES
from moedge.export.quantization import (
    Quantized,
    find_algorithm,
    gptq,
    hqq,
    pack_int4,
    pick_group_size,
    unpack_int4,
)
from moedge.export.quantization.calibration import Calibration
from moedge.export.reader import WeightsReader
from moedge.export.weights import plain
from moedge.export.writer import write_weights
from moedge.profiles.targets import onnxruntime as target
from moedge.profiles.targets._canonical import load_canonical

Array = np.ndarray[Any, Any]
DATA_FREE = [name for name in ALGORITHMS if name != "gptq"]


def heavy_tailed(rows: int = 96, columns: int = 512) -> Array:
    """Student's t, scaled by row: outliers in most groups, as in trained models."""
    rng = np.random.default_rng(11)
    return (rng.standard_t(5, (rows, columns)) * rng.uniform(0.01, 0.1, (rows, 1))).astype(np.float32)


def relative_error(values: Array, quantized: Quantized) -> float:
    return float(np.linalg.norm(quantized.dequantize() - values) / np.linalg.norm(values))


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", GROUP_SIZES)
def test_hqq_is_better_than_rtn_at_equal_group(group: int, bits: int, zero_points: bool) -> None:
    values = heavy_tailed()
    errors = {
        name: relative_error(values, find_algorithm(name).quantize(values, bits, group, zero_points=zero_points))
        for name in ("rtn", "hqq")
    }
    # A scale of a byte leaves less to find where there is one for few codes.
    small = group < 64 and zero_points
    assert errors["hqq"] < errors["rtn"] * (0.999 if bits > 4 else 0.98 if small else 0.97)


def test_hqq_with_zero_points_at_group_128_is_better_than_rtn_at_group_32_of_normal_weights() -> None:
    values = np.random.default_rng(12).normal(0, 0.02, (128, 1024)).astype(np.float32)
    wide = find_algorithm("hqq").quantize(values, 4, 128, zero_points=True)
    narrow = find_algorithm("rtn").quantize(values, 4, 32)
    assert relative_error(values, wide) < relative_error(values, narrow) * 1.12
    assert relative_error(values, find_algorithm("hqq").quantize(values, 4, 32)) < relative_error(values, narrow) * 0.93


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DATA_FREE)
def test_codes_are_the_nearest_of_their_grid(name: str, bits: int, zero_points: bool) -> None:
    values = heavy_tailed(7, 96)
    quantized = find_algorithm(name).quantize(values, bits, 32, zero_points=zero_points)
    assert (quantized.zero_points is not None) == zero_points
    assert quantized.codes.dtype == np.uint8 and quantized.scales.dtype == np.float32
    grid = np.arange(1 << bits, dtype=np.float32)
    zero = np.full(quantized.scales.shape, 1 << (bits - 1)) if not zero_points else quantized.zero_points
    assert zero is not None and zero.max() < 1 << bits
    levels = (grid - zero[..., None].astype(np.float32)) * quantized.scales[..., None]
    distance = np.abs(values.reshape(7, 3, 32, 1) - levels[:, :, None, :]).min(axis=-1)
    steps = np.abs(quantized.dequantize() - values).reshape(7, 3, 32) - distance
    assert (steps <= 1e-5 * quantized.scales[..., None]).all()


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("name", DATA_FREE)
def test_odd_groups_are_exact_or_near(name: str, zero_points: bool) -> None:
    """Zeros, one constant, one sign, one outlier, subnormal values: finite positive scales, values near."""
    values = np.zeros((6, 32), np.float32)
    values[1] = 0.75
    values[2] = np.linspace(1, 2, 32)
    values[3, 5] = -1e4
    values[4] = 1e-38
    values[5] = -3e37
    with np.errstate(all="raise", under="ignore"):
        quantized = find_algorithm(name).quantize(values, 4, 32, zero_points=zero_points)
    assert np.isfinite(quantized.scales).all() and (quantized.scales > 0).all()
    restored = quantized.dequantize()
    assert not restored[0].any()
    np.testing.assert_allclose(restored[[1, 3, 5]], values[[1, 3, 5]], rtol=0.15)
    np.testing.assert_allclose(restored[2], values[2], atol=0.16)
    assert np.abs(restored[4]).max() < 1e-30


@pytest.mark.parametrize("name", DATA_FREE)
def test_the_same_values_give_the_same_codes_whatever_lies_beside(name: str) -> None:
    """Parts of a tensor are quantized apart, in parts whose size depends on the memory there is."""
    values = np.tile(heavy_tailed(), (8, 1))
    algorithm = find_algorithm(name)
    whole, again = (algorithm.quantize(values, 4, 64, zero_points=True) for _ in range(2))
    part = algorithm.quantize(values[96:101], 4, 64, zero_points=True)
    for field in ("codes", "scales", "zero_points"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(again, field))
        np.testing.assert_array_equal(getattr(whole, field)[96:101], getattr(part, field))


def test_an_unknown_algorithm_lists_the_known() -> None:
    with pytest.raises(moedge.CheckpointError, match=r"^algorithm 'magic' is not known; known: rtn, hqq"):
        find_algorithm("magic")


def test_nibbles_go_low_first_and_come_back() -> None:
    codes = np.random.default_rng(1).integers(0, 16, (3, 4, 6)).astype(np.uint8)
    packed = pack_int4(codes)
    assert packed[0, 0, 0] == codes[0, 0, 0] | codes[0, 0, 1] << 4
    np.testing.assert_array_equal(unpack_int4(packed), codes)
    assert pack_int4(np.array([3, 4, 5], np.uint8)).tolist() == [0x43, 0x05]


def test_rows_of_zero_points_start_at_a_byte() -> None:
    """ONNX packs a tensor of nibbles as a whole, the kernels row by row: the same bytes for even numbers of groups."""
    assert pick_group_size(128, 384) == 128 and pick_group_size(128, 384, even=True) == 64
    assert pick_group_size(64, 48, even=True) is None
    weights = [
        plain("a", "a", (8, 384), "attention", "linear"),
        plain("b", "b", (8, 48), "attention", "linear"),
        plain("c", "c", (8, 384), "head", "table"),
    ]
    layout = plan_layout(weights, "int4", 128, zero_points=True)
    assert [(layout[name].group_size, layout[name].shared_zero_points) for name in "abc"] == [
        (64, False),
        (16, True),
        (128, True),
    ]
    assert layout["a"].zero_points is not None and layout["a"].zero_points.shape == (8, 6)


@pytest.mark.parametrize("bits", [4, 8])
def test_wider_forms_hold_the_same_values(bits: int) -> None:
    values = heavy_tailed(5, 128)
    quantized = find_algorithm("hqq").quantize(values, bits, 128, zero_points=bits == 4)
    for group in (128, 32):
        for zero_points in (False, True):
            wider = quantized.regroup(8, group, zero_points=zero_points)
            assert (wider.bits, wider.group_size, wider.zero_points is None) == (8, group, not zero_points)
            np.testing.assert_array_equal(wider.dequantize(), quantized.dequantize())


def run_lowered(bundle: Path, ids: Array, accuracy_level: int) -> tuple[Array, list[str]]:
    model, _ = load_canonical(Bundle.open(bundle))
    fused = target.has_router_weights()
    cache = target.lower(model, accuracy_level=accuracy_level, fused_experts=fused)
    graph = LoweredGraph(model, cache, bundle)
    return graph.step(ids)["logits"], [node.op_type for node in model.graph]


@pytest.mark.parametrize("group", GROUP_SIZES)
@pytest.mark.parametrize("sizes", [(256, 256), (384, 384), (96, 48)])
def test_kernels_read_zero_points_as_the_canonical_graph_does(
    sizes: tuple[int, int], group: int, tmp_path: Path
) -> None:
    """Even and odd numbers of groups to a row, in matrices and in stacks of experts."""
    hidden, inner = sizes
    model = make_model(3, hidden_size=hidden, moe_intermediate_size=inner, num_hidden_layers=2, n_routed_experts=4)
    checkpoint = save_model(model, tmp_path / "c")
    moedge.export(checkpoint, tmp_path / "b", weights="int4", group_size=group, algorithm="hqq", zero_points=True)
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    zeros = [tensor for tensor in graph.initializer if tensor.name.endswith(".zero_points")]
    places = {entry.value for tensor in zeros for entry in tensor.external_data if entry.key == "offset"}
    assert len(places) > 5  # symmetric matrices of one type share theirs
    ids = np.random.default_rng(2).integers(0, 320, 24)
    canonical = ort.InferenceSession(str(tmp_path / "b" / "model.onnx"))
    (expected,) = canonical.run(None, {"input_ids": ids[None]})
    logits, kinds = run_lowered(tmp_path / "b", ids, 0)
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-4)
    assert "QMoE" in kinds or not target.has_router_weights()
    near, _ = run_lowered(tmp_path / "b", ids, target.ACCURACY_LEVEL)
    assert np.median(np.abs(near - expected[0])) < 0.15 * expected.std()


@pytest.mark.parametrize("weights", ["int4", "int8"])
@pytest.mark.parametrize("size", ["32", "64", "128", "channel"])
def test_the_command_takes_any_group_with_and_without_zero_points(weights: str, size: str, tmp_path: Path) -> None:
    """Parity checked, said in the manifest, and run by the kernels as by the canonical graph."""
    model = make_model(6, hidden_size=256, moe_intermediate_size=256, intermediate_size=256, num_hidden_layers=2)
    checkpoint = save_model(model, tmp_path / "c")
    errors = {}
    for option in ("--zero-points", "--symmetric"):
        command = ["export", checkpoint, "-o", tmp_path / "b", "--weights", weights, "--group-size", size, option]
        result = CliRunner().invoke(cli.main, [str(part) for part in (*command, "--json", "--force")])
        assert result.exit_code == 0, result.output
        manifest = json.loads(result.stdout)
        experts = manifest["quantization"]["classes"]["experts"]
        assert experts["zero_points"] is (option == "--zero-points") and manifest["provenance"]["verified"]
        assert experts["group_size"] == (128 if size == "channel" else int(size))
        errors[option] = experts["relative_error"]
        ids = np.random.default_rng(2).integers(0, 320, 24)
        (expected,) = ort.InferenceSession(str(tmp_path / "b" / "model.onnx")).run(None, {"input_ids": ids[None]})
        logits, _ = run_lowered(tmp_path / "b", ids, 0)
        off = np.abs(logits - expected[0])  # kernels for 8 bits round the activations too
        assert off.max() < 1e-4 if weights == "int4" else np.median(off) < 0.05 * expected.std()
    assert errors["--zero-points"] < errors["--symmetric"]


def test_gptq_keeps_products_better_than_hqq() -> None:
    """Inputs with structure, as trained models have: what one channel loses another can make up for."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(128, 128)) * np.exp(rng.normal(size=128))
    inputs = (rng.normal(size=(512, 128)) @ mix).astype(np.float32)
    values = rng.normal(size=(48, 128)).astype(np.float32)
    factor = gptq.factorize(inputs)
    for zero_points in (False, True):
        for group in (32, 128):
            fitted = gptq.fit_codes(values, factor, 4, group, zero_points=zero_points)
            plain = find_algorithm("hqq").quantize(values, 4, group, zero_points=zero_points)
            errors = [np.linalg.norm(inputs @ (q.dequantize() - values).T) for q in (fitted, plain)]
            assert errors[0] < 0.9 * errors[1]


def test_gptq_without_structure_is_hqq() -> None:
    values = heavy_tailed(9, 64)
    fitted = gptq.fit_codes(values, np.eye(64, dtype=np.float32), 4, 32, zero_points=True)
    plain = find_algorithm("hqq").quantize(values, 4, 32, zero_points=True)
    np.testing.assert_array_equal(fitted.scales, plain.scales)
    np.testing.assert_allclose(fitted.dequantize(), plain.dequantize(), atol=1.01 * plain.scales.max())
    assert np.mean(fitted.codes != plain.codes) < 0.01


def test_gptq_refuses_to_run_without_a_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(moedge.CheckpointError) as caught:
        moedge.export(tiny_checkpoint, tmp_path / "b", algorithm="gptq")
    assert str(caught.value) == (
        "algorithm 'gptq' needs a text to calibrate with; name one with --calibration FILE, or use --algorithm hqq"
    )
    checkpoint = Checkpoint.open(tiny_checkpoint)
    config = find_family(checkpoint).read_config(checkpoint)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(moedge.CheckpointError, match=r"short.txt: \d+ tokens of 320 known, at least 64 are needed"):
        gptq.read_sequences(checkpoint, tmp_path / "short.txt", config)
    with pytest.raises(moedge.CheckpointError, match=r"none.txt: cannot be read as text"):
        gptq.read_sequences(checkpoint, tmp_path / "none.txt", config)


def test_calibration_records_what_each_matrix_is_multiplied_with(tiny_checkpoint: Path) -> None:
    """Against hooks in transformers' own layers, experts by themselves."""
    import torch
    from transformers import DeepseekV3ForCausalLM

    checkpoint = Checkpoint.open(tiny_checkpoint)
    family = find_family(checkpoint)
    config = family.read_config(checkpoint)
    ids = np.random.default_rng(6).integers(0, 320, (2, 40))
    calibration = Calibration(checkpoint, config, family.plan_weights(config), list(ids))
    model = DeepseekV3ForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    seen: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, inputs, __, name=name: seen.update({name: inputs[0].numpy()}))
    with torch.no_grad():
        model(torch.from_numpy(ids))
    attention, experts = "model.layers.1.self_attn", "model.layers.2.mlp.experts"
    pairs = [
        ("layers.0.mlp.down.weight", 0, "model.layers.0.mlp.down_proj"),
        ("layers.1.attn.q_b.weight", 0, f"{attention}.q_b_proj"),
        ("layers.1.attn.k_up.weight", 0, f"{attention}.kv_b_proj"),
        ("layers.1.attn.o.weight", 0, f"{attention}.o_proj"),
        *((f"layers.2.experts.{ours}.weight", expert, f"{experts}.{expert}.{theirs}")
          for expert in range(8) for ours, theirs in (("gate_up", "up_proj"), ("down", "down_proj"))),
        ("head.weight", 0, "lm_head"),
    ]  # fmt: skip
    for name, unit, theirs in pairs:
        ours = calibration.inputs(name, unit)
        assert ours is not None
        expected = seen[theirs].reshape(-1, ours.shape[-1]) if theirs in seen else np.zeros((0, ours.shape[-1]))
        assert len(ours) == len(expected)
        np.testing.assert_allclose(ours.T @ ours, expected.T @ expected, rtol=1e-3, atol=1e-3)
    assert calibration.inputs("embed.weight", 0) is None


@pytest.mark.parametrize(("tokens", "fitted"), [(0, False), (gptq.MIN_TOKENS - 1, False), (gptq.MIN_TOKENS, True)])
def test_an_expert_with_too_few_tokens_is_quantized_by_hqq_and_reported(tokens: int, fitted: bool) -> None:
    class FewTokens:
        sequences = (np.zeros(100, np.int64),)

        def inputs(self, weight: str, unit: int) -> Array:
            return np.random.default_rng(unit).normal(size=(tokens if unit == 1 else 200, 64)).astype(np.float32)

    algorithm = gptq.Gptq(FewTokens())  # type: ignore[arg-type]
    values = heavy_tailed(8, 64)
    found = [algorithm.at("layers.0.experts.gate_up.weight", unit).quantize(values, 4, 32) for unit in range(3)]
    plain = find_algorithm("hqq").quantize(values, 4, 32)
    assert [bool((part.codes == plain.codes).all()) for part in found] == [False, not fitted, False]
    few = [note for note in algorithm.notes() if "quantized by hqq" in note]
    assert few == [] if fitted else f"expert 1 of layers.0 ({tokens} tokens)" in few[0]


def test_gptq_exports_layer_by_layer_and_names_the_experts_without_tokens(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away from it. " * 6
    (tmp_path / "text.txt").write_text(text)
    bundle = moedge.export(
        tiny_checkpoint, tmp_path / "b", algorithm="gptq", calibration=tmp_path / "text.txt", group_size=32
    )
    notes = bundle.manifest["provenance"]["notes"]
    assert any(note.startswith("gptq calibrated with") for note in notes)
    assert bundle.manifest["provenance"]["verified"] is True
    few = [note for note in notes if "were quantized by hqq" in note]
    assert few and "expert" in few[0] and "of layers." in few[0]


def test_one_scale_a_channel_is_repeated_for_each_group(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny_checkpoint)
    family = find_family(checkpoint)
    plan = family.plan_weights(family.read_config(checkpoint))
    for zero_points in (False, True):
        layout = plan_layout(plan, "int4", BY_CHANNEL, zero_points=zero_points)
        layout, errors = write_weights(checkpoint, layout, tmp_path / "weights.bin", find_algorithm("hqq"))
        reader = WeightsReader(tmp_path / "weights.bin", layout)
        stored = layout["layers.1.experts.down.weight"]
        assert stored.scales is not None and stored.group_size == (16 if zero_points else 32)
        scales = reader.read_flat(stored.scales, 0, int(np.prod(stored.scales.shape))).reshape(stored.scales.shape)
        assert (scales == scales[..., :1]).all() and len(np.unique(scales)) > 20
        assert 0.05 < errors["experts"].relative < 0.2


@pytest.mark.parametrize("zero_points", [False, True])
def test_hqq_with_the_papers_norm_is_better_than_rtn_too(zero_points: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy_tailed()
    least = relative_error(values, hqq.quantize(values, 4, 64, zero_points=zero_points))
    monkeypatch.setattr(hqq, "NORM", 0.7)
    error = relative_error(values, hqq.quantize(values, 4, 64, zero_points=zero_points))
    rounded = relative_error(values, find_algorithm("rtn").quantize(values, 4, 64, zero_points=zero_points))
    assert least < error < rounded * 0.98


def test_swapped_experts_are_found_under_gptq_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes are not the nearest, so the parity check allows more; not as much as another expert's."""
    real = writer.read_parts

    def swapped(checkpoint: Any, stored: Any, *rest: Any) -> Any:
        parts = list(real(checkpoint, stored, *rest))
        if stored.weight.name == "layers.2.experts.down.weight":
            first, second = parts[3], parts[6]
            parts[3] = writer.Part(first.start, first.stop, second.values)
            parts[6] = writer.Part(second.start, second.stop, first.values)
        yield from parts

    monkeypatch.setattr(writer, "read_parts", swapped)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    with pytest.raises(moedge.ParityError, match=r"2 tensors differ .* first: model.layers.2.mlp.experts.3.down"):
        moedge.export(tiny_checkpoint, tmp_path / "b", algorithm="gptq", calibration=tmp_path / "text.txt")
