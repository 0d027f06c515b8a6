"""Quantized checkpoints: integers kept bit for bit, float formats unpacked right, and what is wrong with them named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from checkpoints import edit_config, make_model, transformers_logits
from packed_checkpoints import (
    AWQ_ORDER,
    AWQ_SETTINGS,
    FP8_SETTINGS,
    Convert,
    awq,
    convert_checkpoint,
    ct_settings,
    float8_blocks,
    gptq,
    gptq_settings,
    make_codes,
    pack_quantized,
    read_one,
    unpack,
)
from safetensors.torch import load_file, save_file

import moedge
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.layout import plan_layout
from moedge.export.quantization.sources import FORMATS, bind_sources
from moedge.export.reader import WeightsReader
from moedge.export.weights import Piece, Weight, read_piece, read_rows, read_unit

Array = np.ndarray[Any, Any]
SEED = 20


def integers(pack: Callable[..., Any], bits: int, group: int, symmetric: bool) -> Convert:
    """A conversion by `pack(stem, codes, scales, zeros)`; `group` 0 is by channel."""

    def convert(stem: str, values: Array) -> Any:
        width = values.shape[1]
        codes, scales, zeros = make_codes(values, bits, group or width, symmetric)
        if pack is compressed or pack is compressed_8:
            scales = scales.astype(ml_dtypes.bfloat16)
        return pack(stem, codes, scales, zeros), unpack(codes, scales, zeros)

    return convert


def gptq_4(stem: str, *parts: Array) -> Any:
    return gptq(stem, *parts, bits=4)


def gptq_8(stem: str, *parts: Array) -> Any:
    return gptq(stem, *parts, bits=8)


def gptq_v2(stem: str, *parts: Array) -> Any:
    return gptq(stem, *parts, bits=4, add=0)


def compressed(stem: str, codes: Array, scales: Array, zeros: Array) -> Any:
    return pack_quantized(stem, codes, scales, zeros if (zeros != 8).any() else None, 4)


def compressed_8(stem: str, codes: Array, scales: Array, zeros: Array) -> Any:
    tensors = {f"{stem}.weight": (codes ^ 0x80).view(np.int8), f"{stem}.weight_scale": scales}
    if (zeros != 128).any():
        tensors[f"{stem}.weight_zero_point"] = (zeros ^ 0x80).view(np.int8)
    return tensors


# name: (conversion, quantization_config)
INTEGER_FORMATS: dict[str, tuple[Convert, dict[str, Any]]] = {
    "gptq 4 sym": (integers(gptq_4, 4, 16, True), gptq_settings(4, sym=True)),
    "gptq 4 asym": (integers(gptq_4, 4, 16, False), gptq_settings(4, sym=False)),
    "gptq 4 asym by channel": (integers(gptq_4, 4, 0, False), gptq_settings(4, sym=False)),
    "gptq 8 sym": (integers(gptq_8, 8, 16, True), gptq_settings(8, sym=True)),
    "gptq 8 asym": (integers(gptq_8, 8, 16, False), gptq_settings(8, sym=False)),
    "gptq v2 asym": (integers(gptq_v2, 4, 16, False), gptq_settings(4, checkpoint_format="gptq_v2")),
    "awq": (integers(awq, 4, 16, False), AWQ_SETTINGS),
    "ct w4 sym": (integers(compressed, 4, 16, True), ct_settings("pack-quantized")),
    "ct w4 asym": (integers(compressed, 4, 16, False), ct_settings("pack-quantized")),
    "ct w4 by channel": (integers(compressed, 4, 0, True), ct_settings("pack-quantized", strategy="channel")),
    "ct w8 by channel": (integers(compressed_8, 8, 0, True), ct_settings("int-quantized", 8, strategy="channel")),
    "ct w8 asym": (integers(compressed_8, 8, 16, False), ct_settings("int-quantized", 8)),
}


def canonical_logits(bundle: Path, ids: Array) -> Array:
    session = ort.InferenceSession(str(bundle / "model.onnx"), providers=["CPUExecutionProvider"])
    logits: Array = session.run(None, {"input_ids": ids})[0]
    return logits


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_logits_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    """Nothing is quantized a second time: with all else in float32, transformers on the unpacked values agrees."""
    convert, settings = INTEGER_FORMATS[name]
    model = make_model(SEED)
    convert_checkpoint(model, tmp_path / "c", convert, settings, skip=("layers.2.self_attn",))
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", weights="fp32")
    ids = np.random.default_rng(SEED).integers(0, 320, (1, 48))
    expected = transformers_logits(model, ids)
    np.testing.assert_allclose(canonical_logits(tmp_path / "b", ids), expected, rtol=0, atol=1e-4)
    experts = bundle.manifest["quantization"]["classes"]["experts"]
    assert experts["dtype"] == ("uint8" if "8" in name else "uint4") and experts["relative_error"] == 0
    notes = bundle.manifest["provenance"]["notes"]
    assert any("keep their integers bit for bit" in note for note in notes)
    with moedge.load(moedge.build(tmp_path / "b", "cpu") and tmp_path / "b") as engine:
        actual = engine.logits(ids[0])
    assert np.median(np.abs(actual - expected[0])) < 0.15 * expected.std()


@pytest.mark.parametrize("name", ["gptq 4 sym", "gptq 4 asym", "ct w4 sym"])
def test_a_quantized_head_stays_at_its_four_bits(name: str, tmp_path: Path) -> None:
    """Whatever is asked of heads that come plain; with all else in float32, transformers agrees."""
    model = make_model(SEED)
    convert_checkpoint(model, tmp_path / "c", *INTEGER_FORMATS[name], takes="lm_head.weight".__eq__)
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", weights="fp32")
    head = bundle.manifest["quantization"]["classes"]["head"]
    assert (head["dtype"], head["zero_points"], head["relative_error"]) == ("uint4", "asym" in name, 0)
    ids = np.random.default_rng(SEED).integers(0, 320, (1, 48))
    expected = transformers_logits(model, ids)
    np.testing.assert_allclose(canonical_logits(tmp_path / "b", ids), expected, rtol=0, atol=1e-4)


def unpack_theirs(name: str, tensors: dict[str, Any], stem: str) -> Array:
    """uint8 [out, in] straight from the definition of each format, apart from both the packer and the reader."""
    if name.startswith("gptq"):
        bits = 8 if "8" in name else 4
        words = tensors[f"{stem}.qweight"].numpy().view(np.uint32)
        return np.array(
            [words[row // (32 // bits)] >> (bits * (row % (32 // bits))) & ((1 << bits) - 1)
             for row in range(words.shape[0] * 32 // bits)]
        ).T.astype(np.uint8)  # fmt: skip
    if name == "awq":
        words = tensors[f"{stem}.qweight"].numpy().view(np.uint32)
        codes = np.zeros((words.shape[0], words.shape[1] * 8), np.uint8)
        for nibble, channel in enumerate(AWQ_ORDER):
            codes[:, channel::8] = words >> (4 * nibble) & 15
        return codes.T
    if name.startswith("ct w4"):
        words = tensors[f"{stem}.weight_packed"].numpy().view(np.uint32)
        return np.stack([words >> (4 * place) & 15 for place in range(8)], axis=-1).reshape(len(words), -1)
    return (tensors[f"{stem}.weight"].numpy().astype(np.int16) + 128).astype(np.uint8)


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_integers_are_kept_bit_for_bit(name: str, tmp_path: Path) -> None:
    convert, settings = INTEGER_FORMATS[name]
    convert_checkpoint(make_model(SEED), tmp_path / "c", convert, settings)
    moedge.export(tmp_path / "c", tmp_path / "b", weights="int4", verify=False)
    checkpoint = Checkpoint.open(tmp_path / "c")
    family = find_family(checkpoint)
    plan = bind_sources(checkpoint, family.plan_weights(family.read_config(checkpoint)))
    layout = plan_layout(plan, "int4", 128, zero_points=False)
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    reader = WeightsReader(tmp_path / "b" / "weights.bin", layout)

    def codes_of(weight: str) -> Array:
        slot = layout[weight].data
        return np.asarray(reader.read_flat(slot, 0, int(np.prod(slot.shape)))).reshape(slot.shape)

    first, experts = "model.layers.0", "model.layers.1.mlp.experts"
    np.testing.assert_array_equal(
        codes_of("layers.0.attn.o.weight"), unpack_theirs(name, tensors, f"{first}.self_attn.o_proj")
    )
    gate_up = codes_of("layers.1.experts.gate_up.weight")
    for expert in (0, 5):
        for offset, part in enumerate(("gate_proj", "up_proj")):
            theirs = unpack_theirs(name, tensors, f"{experts}.{expert}.{part}")
            np.testing.assert_array_equal(gate_up[expert, offset::2], theirs)
    down = codes_of("layers.1.experts.down.weight")
    np.testing.assert_array_equal(down[7], unpack_theirs(name, tensors, f"{experts}.7.down_proj"))
    heads = np.concatenate([codes_of("layers.0.attn.k_up.weight"), codes_of("layers.0.attn.v_up.weight")], axis=1)
    theirs = unpack_theirs(name, tensors, f"{first}.self_attn.kv_b_proj")
    np.testing.assert_array_equal(heads.reshape(theirs.shape), theirs)


@pytest.mark.parametrize(("bits", "symmetric", "group"), [(4, True, 32), (4, False, 32), (4, True, 96), (8, True, 32)])
def test_compressed_tensors_as_its_own_library_packs_them(
    bits: int, symmetric: bool, group: int, tmp_path: Path
) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    import torch

    codes, scales, zeros = make_codes(np.random.default_rng(1).normal(size=(40, 96)), bits, group, symmetric)
    half = 1 << (bits - 1)
    signed = torch.from_numpy((codes.astype(np.int16) - half).astype(np.int8))
    tensors = {
        "a.weight_packed": library.pack_to_int32(signed, bits),
        "a.weight_scale": torch.from_numpy(scales),
        "a.weight_shape": torch.tensor([40, 96]),
    }
    if not symmetric:
        points = torch.from_numpy((zeros.astype(np.int16) - half).astype(np.int8))
        tensors["a.weight_zero_point"] = library.pack_to_int32(points, bits, packed_dim=0)
    piece = read_one(tmp_path / "c", tensors, ct_settings("pack-quantized", bits), "a.weight", (40, 96))
    assert piece.packed is not None
    kept = piece.packed.read_codes(Checkpoint.open(tmp_path / "c"), 3, 21)
    theirs = library.unpack_from_int32(tensors["a.weight_packed"], bits, torch.Size([40, 96]))
    np.testing.assert_array_equal(kept.codes.astype(np.int16) - half, theirs.numpy()[3:21])
    np.testing.assert_array_equal(kept.dequantize(), unpack(codes, scales, zeros)[3:21])
    assert piece.integers is not None and piece.integers.zero_points is not symmetric


@pytest.mark.parametrize("pack", [gptq_4, gptq_8, gptq_v2, awq, compressed, compressed_8])
def test_any_rows_can_be_read_alone(pack: Any, tmp_path: Path) -> None:
    bits = 8 if pack in (gptq_8, compressed_8) else 4
    values = np.random.default_rng(2).normal(size=(40, 64)).astype(np.float32)
    packed, restored = integers(pack, bits, 16, False)("a", values)
    settings = {
        gptq_v2: gptq_settings(4, checkpoint_format="gptq_v2"),
        awq: AWQ_SETTINGS,
        compressed: ct_settings("pack-quantized"),
        compressed_8: ct_settings("int-quantized"),
    }.get(pack, gptq_settings(bits))
    piece = read_one(tmp_path / "c", packed, settings, "a.weight", (40, 64))
    checkpoint = Checkpoint.open(tmp_path / "c")
    for start, stop in ((0, 40), (0, 1), (7, 9), (13, 40)):
        np.testing.assert_array_equal(read_piece(checkpoint, piece, start, stop), restored[start:stop])
    both = tuple(Piece(**{**piece.__dict__, "at": (at,)}) for at in (slice(0, None, 2), slice(1, None, 2)))
    weight = Weight("w", (80, 64), "dense_mlp", "linear", (both,))
    np.testing.assert_array_equal(read_rows(checkpoint, weight, 0, 5, 12), read_unit(checkpoint, weight, 0)[5:12])


def test_a_mixed_checkpoint_keeps_what_is_packed_and_quantizes_the_rest(tmp_path: Path) -> None:
    """One plain expert among packed ones; a layer whose attention is plain; 8 bits for one module."""
    model = make_model(SEED)
    four = integers(gptq_4, 4, 16, True)
    eight = integers(gptq_8, 8, 16, True)

    def convert(stem: str, values: Array) -> Any:
        return (eight if "layers.0.mlp.down_proj" in stem else four)(stem, values)

    skip = ("layers.1.mlp.experts.3.", "layers.2.self_attn")
    convert_checkpoint(model, tmp_path / "c", convert, gptq_settings(4), skip=skip)
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", weights="int4", algorithm="rtn", group_size=16)
    classes = bundle.manifest["quantization"]["classes"]
    assert 0 < classes["experts"]["relative_error"] < 0.05
    # Kept in 4 bits and in 8, and the up-projections of attention in 8: what most values have comes first.
    assert classes["dense_mlp"]["dtype"] == "uint4" and classes["dense_mlp"]["also"] == ["uint8, group 16"]
    assert classes["attention"]["dtype"] == "uint4" and classes["attention"]["also"] == ["uint8, group 16"]
    assert "also" not in classes["experts"]
    ids = np.random.default_rng(SEED).integers(0, 320, (1, 48))
    near = np.abs(canonical_logits(tmp_path / "b", ids) - transformers_logits(model, ids))
    assert np.median(near) < 0.2 * transformers_logits(model, ids).std()


@pytest.mark.parametrize("weights", ["fp32", "int4"])
def test_float8_blocks_are_unpacked_and_quantized_again(weights: str, tmp_path: Path) -> None:
    model = make_model(SEED)

    def convert(stem: str, values: Array) -> Any:
        return float8_blocks(stem, values, 16)

    convert_checkpoint(model, tmp_path / "c", convert, FP8_SETTINGS)
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", weights=weights)
    notes = " ".join(bundle.manifest["provenance"]["notes"])
    if weights == "fp32":
        ids = np.random.default_rng(SEED).integers(0, 320, (1, 48))
        expected = transformers_logits(model, ids)
        np.testing.assert_allclose(canonical_logits(tmp_path / "b", ids), expected, rtol=0, atol=1e-4)
        assert "matrices of float8 (blocks of 16x16) were unpacked to floating point" in notes
    else:
        error = 100 * bundle.manifest["quantization"]["classes"]["experts"]["relative_error"]
        assert "matrices of float8 (blocks of 16x16) were quantized again; weights' relative error by rounding" in notes
        assert f"experts {error:.2f}%" in notes and 2 < error < 15


@pytest.mark.parametrize("shape", [(), (1,), (40,), (40, 1)])
def test_float8_by_tensor_and_by_channel(shape: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    codes = rng.normal(size=(40, 24)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.5, 2, shape).astype(np.float32)
    expected = codes.astype(np.float32) * (scales.reshape(-1, 1) if scales.size > 1 else scales)
    tensors = {"a.weight": codes, "a.weight_scale": np.asarray(scales), "a.input_scale": np.ones(1, np.float32)}
    for settings in (ct_settings("float-quantized", 8, "float"), {"quant_method": "fp8"}):
        piece = read_one(tmp_path / "c", tensors, settings, "a.weight", (40, 24))
        np.testing.assert_array_equal(read_piece(Checkpoint.open(tmp_path / "c"), piece, 2, 9), expected[2:9])
        assert piece.names == ("a.weight", "a.weight_scale", "a.input_scale")


def test_float8_blocks_at_the_edges(tmp_path: Path) -> None:
    values = np.random.default_rng(4).normal(size=(40, 56)).astype(np.float32)
    tensors, expected = float8_blocks("a", values, 16)
    piece = read_one(tmp_path / "c", tensors, FP8_SETTINGS, "a.weight", (40, 56))
    np.testing.assert_array_equal(read_piece(Checkpoint.open(tmp_path / "c"), piece, 15, 40), expected[15:])


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (3, 24, 2, 16)).astype(np.uint8)
    scales = rng.integers(110, 135, (3, 24, 2)).astype(np.uint8)
    expected = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    piece = read_one(tmp_path / "c", tensors, {"quant_method": "mxfp4"}, "experts.down_proj", (3, 64, 24))
    checkpoint = Checkpoint.open(tmp_path / "c")
    np.testing.assert_array_equal(read_piece(checkpoint, piece), expected.numpy())
    one = Piece(**{**piece.__dict__, "entry": 2, "transpose": True})
    np.testing.assert_array_equal(read_piece(checkpoint, one), expected.numpy()[2].T)
    scales[1, 3, 0] = 255
    read_one(tmp_path / "c", tensors, {"quant_method": "mxfp4"}, "experts.down_proj", (3, 64, 24))
    with pytest.raises(moedge.CheckpointError, match=r"tensor 'experts.down_proj_scales' holds NaN in row 1; download"):
        read_piece(Checkpoint.open(tmp_path / "c"), piece)


def test_scales_of_activations_and_of_a_cache_are_no_loss(tmp_path: Path) -> None:
    model = make_model(SEED)
    convert, settings = INTEGER_FORMATS["ct w8 by channel"]

    def with_scales(stem: str, values: Array) -> Any:
        tensors, restored = convert(stem, values)
        more = {f"{stem}.input_scale": np.ones(1, np.float32)}
        if stem.endswith("kv_b_proj"):
            more[f"{stem.rpartition('.')[0]}.k_scale"] = np.ones(1, np.float32)
        return {**tensors, **more}, restored

    convert_checkpoint(model, tmp_path / "c", with_scales, settings)
    moedge.export(tmp_path / "c", tmp_path / "b", verify=False)


def test_every_format_has_its_module() -> None:
    import importlib

    for module in FORMATS.values():
        found = importlib.import_module(f"moedge.export.quantization.{module}")
        assert found.__doc__ and callable(found.check_settings) and callable(found.find_packed)


def test_gpt_oss_with_its_mxfp4_experts(tmp_path: Path) -> None:
    """As the family is published: experts in MXFP4, everything else plain."""
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(9)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
    config = GptOssConfig(vocab_size=320, num_experts_per_tok=2, max_position_embeddings=256, **sizes, **heads)
    model = GptOssForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path / "c")
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    rng = np.random.default_rng(9)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, width, rows = tensors.pop(name).shape
        blocks = torch.from_numpy(rng.integers(0, 256, (experts, rows, width // 32, 16)).astype(np.uint8))
        scales = torch.from_numpy(rng.integers(119, 123, (experts, rows, width // 32)).astype(np.uint8))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        with torch.no_grad():
            plain = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            model.get_parameter(name).copy_(plain)
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    edit_config(tmp_path / "c", quantization_config={"quant_method": "mxfp4"})
    ids = np.random.default_rng(SEED).integers(0, 320, (1, 40))
    expected = transformers_logits(model, ids)
    moedge.export(tmp_path / "c", tmp_path / "fp32", weights="fp32")
    np.testing.assert_allclose(canonical_logits(tmp_path / "fp32", ids), expected, rtol=0, atol=1e-4)
    bundle = moedge.export(tmp_path / "c", tmp_path / "int4", weights="int4", group_size=32)
    notes = " ".join(bundle.manifest["provenance"]["notes"])
    assert "16 matrices of MXFP4 were quantized again; weights' relative error by rounding: experts " in notes


def test_one_stack_of_experts_with_zero_points_and_one_without(tmp_path: Path) -> None:
    """One kernel takes both stacks: zero points that happen to be the middle must not hide the other's."""
    down, rest = integers(gptq_4, 4, 16, False), integers(gptq_4, 4, 16, True)

    def convert(stem: str, values: Array) -> Any:
        return (down if stem.endswith("down_proj") else rest)(stem, values)

    convert_checkpoint(make_model(SEED), tmp_path / "c", convert, gptq_settings(4))
    moedge.export(tmp_path / "c", tmp_path / "b", weights="fp32")
    moedge.build(tmp_path / "b", "cpu")
    ids = np.random.default_rng(SEED).integers(0, 320, (1, 48))
    expected = canonical_logits(tmp_path / "b", ids)
    with moedge.load(tmp_path / "b") as engine:
        actual = engine.logits(ids[0])
    assert np.median(np.abs(actual - expected[0])) < 0.1 * expected.std()
