"""Scales in a byte and in half precision, routers in bfloat16: where they are, and that they are read as they are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from checkpoints import make_model as make_tiny
from kernel_cases import Stack, experts_model, linear_model, make_model, make_stack, open_model
from numpy.typing import NDArray
from onnx import TensorProto
from packed_checkpoints import convert_checkpoint, ct_settings, make_codes, pack_quantized, unpack
from safetensors.torch import load_file, save_file
from test_onnxruntime_cuda import lower_and_run
from test_steps import router_model

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.export import writer
from moedge.export.quantization import FLOAT8, find_algorithm, fit_scales, pack_float8, round_scales
from moedge.profiles.advice import narrower_weight_bytes
from moedge.profiles.device import load_profile
from moedge.profiles.fit import check_fit
from moedge.profiles.shape import ModelShape, bytes_per_token
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network
from moedge.runtime import kernels

Array = np.ndarray[Any, Any]


# The kernels


def halved(generator: np.random.Generator, stack: Stack) -> Stack:
    """The stack with scales in half precision, some negative or subnormal."""
    scales = stack.scales.astype(np.float16)
    odd = generator.integers(0, 1 << 16, scales.shape, np.uint16) & np.uint16(0x83FF)
    scales = np.where(generator.random(scales.shape) < 0.1, odd.view(np.float16), scales)
    return dataclasses.replace(stack, scales=scales)


def in_bytes(generator: np.random.Generator, stack: Stack) -> Stack:
    """The stack with scales of a byte: any of the 256."""
    return dataclasses.replace(stack, scales=generator.integers(0, 256, stack.scales.shape, np.uint8))


NARROW = {"fp16": halved, "fp8": in_bytes}


def widened(stack: Stack) -> Stack:
    scales = stack.scales
    return dataclasses.replace(stack, scales=FLOAT8[scales] if scales.dtype == np.uint8 else scales.astype(np.float32))


@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize(("rows", "width", "group"), [(7, 64, 16), (100, 1088, 64), (75, 1536, 128), (640, 2304, 128)])
def test_narrow_scales_give_the_bits_of_the_same_in_float(
    kind: str,
    rows: int,
    width: int,
    group: int,
    bits: int,
    forms: list[tuple[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On every instruction set, for any number of rows; ends that fill no vector of scales."""
    generator = np.random.default_rng(rows + bits)
    matrix = NARROW[kind](generator, make_stack(generator, (1, rows, width), group, bits, zero_points=bits != 6))
    x = generator.standard_normal((70, width), np.float32)
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        half, whole = (open_model(linear_model(each), library, threads=2) for each in (matrix, widened(matrix)))
        for count in (1, 2, 7, 70):
            (found,), (wanted,) = (session.run(None, {"x": x[:count]}) for session in (half, whole))
            assert np.abs(wanted).max() > 0
            np.testing.assert_array_equal(found, wanted)


def test_the_scales_of_a_byte() -> None:
    """An exponent and a mantissa of four bits each: every one of them in order, packed and unpacked."""
    bits = np.arange(256)
    np.testing.assert_array_equal(FLOAT8, (1 + bits % 16 / 16) * 2.0 ** (bits // 16 - 15))
    np.testing.assert_array_equal(pack_float8(FLOAT8), bits)
    generator = np.random.default_rng(11)
    scales = np.exp(generator.uniform(-14, 3, 20000)).astype(np.float32)
    rounded = round_scales(scales, 4)
    there = (scales > FLOAT8[0] * (1 - 1 / 64)) & (scales < FLOAT8[-1] * (1 + 1 / 64))
    assert fit_scales(rounded[there], "float8") and not fit_scales(rounded, "float8")
    nearest = FLOAT8[np.abs(scales[there, None] - FLOAT8).argmin(-1)]
    np.testing.assert_array_equal(rounded[there], nearest)
    beyond = rounded[~there & (scales < 60000) & (scales > 1e-4)]
    assert len(beyond) > 1000 and fit_scales(beyond, "float16")
    for odd in (0.0, -1.0, np.inf, np.nan, 1e-40):
        kept = round_scales(np.array([odd], np.float32), 4)
        np.testing.assert_array_equal(kept, np.array([odd], np.float32))
        assert not fit_scales(kept, "float8")


@pytest.mark.parametrize("narrow", [halved, in_bytes])
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_experts_take_either_kind_of_scales_for_either_matrix(
    which: tuple[bool, bool], narrow: Any, library: Path
) -> None:
    generator = np.random.default_rng(3)
    shapes = (5, 128, 96), (5, 96, 64)
    both = [narrow(generator, make_stack(generator, shape, 32, 4, zero_points=True)) for shape in shapes]
    given = {
        "x": generator.standard_normal((9, 96), np.float32),
        "experts": generator.integers(0, 5, (9, 1)),
        "weights": np.ones((9, 1), np.float32),
    }
    some = [each if half else widened(each) for each, half in zip(both, which, strict=True)]
    (wanted,) = open_model(experts_model(*map(widened, both)), library).run(None, given)
    (found,) = open_model(experts_model(*some), library).run(None, given)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("width", [40, 128, 2048])
def test_routers_in_bfloat16_give_the_bits_of_the_same_in_float(
    width: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Widths of whole and of broken blocks of columns; as many tokens as share a read, and more."""
    generator = np.random.default_rng(width)
    matrix = generator.standard_normal((24, width), np.float32).astype(ml_dtypes.bfloat16)
    feed = {name: generator.standard_normal((70, width), np.float32) for name in ("x", "residual")}
    gate = {"top_k": 3, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1}
    models = [
        router_model("SoftmaxTopKGate", 24, width, gate, 1.0, matrix=each, norm=np.ones(width, np.float32))
        for each in (matrix, matrix.astype(np.float32))
    ]
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        half, whole = (open_model(model, library, threads=2) for model in models)
        for count in (1, 6, 70):
            some = {name: rows[:count] for name, rows in feed.items()}
            for found, wanted in zip(half.run(None, some), whole.run(None, some), strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert np.abs(wanted).max() > 0
    session = open_model(router_model("SoftmaxTopKGate", 24, width, gate, 1.0, matrix=matrix.view(np.uint16)), library)
    with pytest.raises(Exception, match="shapes do not fit each other"):
        session.run(None, feed)


def test_scales_of_another_type_are_refused(library: Path) -> None:
    constants: dict[str, Array | None] = {"codes": np.zeros((4, 32), np.uint8), "scales": np.ones((4, 2), np.float64)}
    session = open_model(make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=4), library)
    with pytest.raises(Exception, match="shapes do not fit each other"):
        session.run(None, {"x": np.ones((1, 64), np.float32)})


# Bundles


def stored_scales(bundle: Path) -> dict[str, int]:
    """The type of each tensor of scales in the canonical graph."""
    graph = onnx.load(bundle / MODEL, load_external_data=False).graph
    return {each.name: each.data_type for each in graph.initializer if each.name.endswith(".scales")}


@pytest.fixture(scope="module")
def both(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One export with narrow scales, and the same with those values in fp32, as if nothing else could hold them."""
    narrow, wide = (tmp_path_factory.mktemp("scales") / name for name in ("narrow", "wide"))
    with pytest.MonkeyPatch.context() as patch:
        for folder in (narrow, wide):
            moedge.export(tiny_checkpoint, folder, group_size=32)
            moedge.build(folder, "cpu")
            patch.setattr(writer, "fit_scales", lambda scales, dtype: False)
    return narrow, wide


def test_which_scales_are_narrow(both: tuple[Path, Path]) -> None:
    """Those of matrices of 4 bits are bytes, of 6 bits and by head halves; what is in 8 bits keeps fp32."""
    narrow, wide = (stored_scales(folder) for folder in both)
    eight = {name for name in narrow if name.startswith("embed.") or name.endswith(".attn.v_up.weight.scales")}
    assert len(eight) > 2 and {name for name, kind in narrow.items() if kind == TensorProto.FLOAT} == eight
    halves = {name for name, kind in narrow.items() if kind == TensorProto.FLOAT16}
    assert halves == {name for name in narrow if name.endswith((".attn.k_up.weight.scales", "head.weight.scales"))}
    assert set(narrow) == set(wide) and set(wide.values()) == {TensorProto.FLOAT}
    bundles = [Bundle.open(folder) for folder in both]
    classes = [bundle.manifest["quantization"]["classes"] for bundle in bundles]
    for name, count in bundles[0].sizes.items():
        entry = classes[0].get(name, {})
        assert bundles[1].sizes[name] - count == 3 * entry.get("float8_scales", 0) + entry.get("float16_scales", 0)
    assert not any(key.endswith("_scales") for entry in classes[1].values() for key in entry)
    assert classes[0]["experts"]["relative_error"] == classes[1]["experts"]["relative_error"]


@pytest.mark.parametrize("which", ["own", "stock", "canonical"])
@pytest.mark.usefixtures("compiled")
def test_engines_give_the_same_bits_over_either(
    which: str, both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(5).integers(0, 320, 33)
    found = []
    for folder in both:
        if which == "canonical":
            session = ort.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
            found.append(session.run(["logits"], {"input_ids": ids[None]})[0])
            continue
        found.append(run_engine(folder, ids, which, monkeypatch))
    assert np.abs(found[0]).max() > 0
    np.testing.assert_array_equal(found[0], found[1])


def run_engine(
    folder: Path, ids: NDArray[np.int64], which: str, monkeypatch: pytest.MonkeyPatch
) -> NDArray[np.float32]:
    """Logits of a CPU engine, by our own kernels or the stock ones."""
    if which == "stock":
        monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)
    with moedge.load(folder, "cpu", threads=1) as engine:
        return engine.logits(ids.tolist())


@pytest.mark.usefixtures("compiled")
def test_kernels_that_take_no_narrow_scales_count_wide_ones(
    both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32 for onnxruntime's own, fp16 where a device computes in it."""
    narrow, wide = (Bundle.open(folder).manifest for folder in both)
    device = load_profile("x86-laptop")
    saved = bytes_per_token(wide, 64) - bytes_per_token(narrow, 64)
    assert 0.03 < saved / bytes_per_token(wide, 64) < 0.3  # groups of 32
    assert check_fit(narrow, device).weight_bytes == sum(narrow["sizes"].values())
    there = ModelShape.from_manifest(narrow).on("tensorrt").sizes
    for name, entry in narrow["quantization"]["classes"].items():
        if name != "head":
            assert there[name] == narrow["sizes"][name] + entry.get("float8_scales", 0)
    monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)
    assert bytes_per_token(narrow, 64) == bytes_per_token(wide, 64)
    assert check_fit(narrow, device).weight_bytes == check_fit(wide, device).weight_bytes


@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize("bits", [4, 6])
@pytest.mark.parametrize("zero_points", [False, True])
def test_codes_are_those_of_the_rounded_scale(algorithm: str, bits: int, zero_points: bool) -> None:
    values = np.random.default_rng(bits).standard_normal((40, 256)).astype(np.float32)
    values[3, :64] *= 1e-6  # whose scale is no normal number there
    made = find_algorithm(algorithm).quantize(values, bits, 64, zero_points=zero_points)
    kept = FLOAT8[pack_float8(made.scales)] if bits == 4 else made.scales.astype(np.float16)
    exact = made.scales == kept
    assert not exact[3, 0] and exact.sum() == exact.size - 1
    zeros = np.float32(1 << (bits - 1)) if made.zero_points is None else made.zero_points[..., None].astype(np.float32)
    grouped = values.reshape(40, -1, 64) / made.scales[..., None]
    nearest = np.clip(np.rint(grouped) + zeros, 0, (1 << bits) - 1)
    off = np.abs(made.codes.reshape(nearest.shape) - nearest)
    assert off.max() <= 1 and (off > 0).mean() < 1e-3  # halves between two codes, where hqq divides in two steps


def test_a_scale_that_is_too_small_keeps_its_stack_in_float32(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Also what was written of the stack before it; the parity check sees every one of them."""
    model = tiny_checkpoint / "model.safetensors"
    tensors = load_file(model)
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[name][2] *= 1e-5
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in tiny_checkpoint.iterdir():
        if path != model:
            (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    bundle = moedge.export(folder, tmp_path / "bundle", group_size=32)
    kinds = stored_scales(bundle.path)
    wide = [name for name, kind in kinds.items() if kind == TensorProto.FLOAT and ".experts." in name]
    assert wide == ["layers.2.experts.down.weight.scales"]
    moedge.build(bundle.path, "cpu")
    ids = list(range(5, 45))
    session = ort.InferenceSession(bundle.file(MODEL), providers=["CPUExecutionProvider"])
    (expected,) = session.run(["logits"], {"input_ids": np.array([ids])})
    with moedge.load(bundle.path, "cpu") as engine:
        # The median: where a rounding flips an expert, a random model goes its own way.
        assert np.median(np.abs(engine.logits(ids) - expected[0])) < 0.05 * expected.std()


@pytest.mark.parametrize(("dtype", "kind"), [("float32", TensorProto.FLOAT), ("float16", TensorProto.FLOAT16)])
def test_scales_that_came_are_never_rounded(dtype: str, kind: int, tmp_path: Path) -> None:
    def convert(stem: str, values: Array) -> Any:
        codes, scales, zeros = make_codes(values, 4, 16, True)
        scales = scales.astype(dtype) * np.array(1 + 2**-12, dtype)  # 1 in half precision
        packed = pack_quantized(stem, codes, scales, None, 4) | {f"{stem}.weight_scale": scales}
        return packed, unpack(codes, scales, zeros)

    convert_checkpoint(make_tiny(seed=7), tmp_path / "c", convert, ct_settings("pack-quantized"))
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", group_size=32)  # its parity check is to the bit
    kinds = stored_scales(bundle.path)
    assert {kinds[name] for name in kinds if ".experts." in name} == {kind}


# Routers


@pytest.fixture(scope="module")
def routers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a checkpoint whose routers are in bfloat16, and of the same values in float32."""
    import torch

    folder = tmp_path_factory.mktemp("routers")
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        shutil.copytree(tiny_checkpoint, folder / name / "checkpoint")
        tensors = load_file(tiny_checkpoint / "model.safetensors")
        tensors |= {
            key: value.to(torch.bfloat16).to(dtype) for key, value in tensors.items() if key.endswith("mlp.gate.weight")
        }
        save_file(tensors, folder / name / "checkpoint" / "model.safetensors")
        moedge.export(folder / name / "checkpoint", folder / name / "bundle", group_size=32)
        moedge.build(folder / name / "bundle", "cpu")
    return folder / "half" / "bundle", folder / "whole" / "bundle"


def test_routers_stay_as_the_checkpoint_has_them(
    routers: tuple[Path, Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    half, whole = (Bundle.open(folder) for folder in routers)
    for bundle, kind in ((half, TensorProto.BFLOAT16), (whole, TensorProto.FLOAT)):
        graph = onnx.load(bundle.file(MODEL), load_external_data=False).graph
        kinds = [each.data_type for each in graph.initializer if each.name.endswith(".router.weight")]
        assert kinds == [kind] * 2
    entry = half.manifest["quantization"]["classes"]["router"]
    assert entry["bfloat16_values"] == whole.sizes["router"] - half.sizes["router"] > 0
    fp32 = moedge.export(routers[0].parent / "checkpoint", tmp_path / "fp32", weights="fp32")
    assert fp32.sizes["router"] == half.sizes["router"]
    wide = moedge.export(routers[1].parent / "checkpoint", tmp_path / "wide", weights="fp32")
    ids = np.random.default_rng(6).integers(0, 320, (1, 20))
    found = [
        ort.InferenceSession(bundle.file(MODEL), providers=["CPUExecutionProvider"]).run(["logits"], {"input_ids": ids})
        for bundle in (fp32, wide)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("which", ["own", "stock", "cuda", "tensorrt"])
@pytest.mark.usefixtures("compiled")
def test_engines_give_the_same_bits_over_either_router(
    which: str, routers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ids = np.random.default_rng(5).integers(0, 320, 33)
    found = []
    for folder in routers:
        if which == "cuda":
            found.append(lower_and_run(Bundle.open(folder), ids, ir.DataType.FLOAT))
        elif which == "tensorrt":
            model, config = load_canonical(Bundle.open(folder))
            network = lower_network(model, config, 40, real=ir.DataType.FLOAT)
            network.weights.write(tmp_path / WEIGHTS_FILE)
            network.save(tmp_path, MODEL)
            found.append(NetworkRunner(tmp_path / MODEL).step(ids)["logits"])
        else:
            found.append(run_engine(folder, ids, which, monkeypatch))
    assert np.abs(found[0]).max() > 0
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.usefixtures("compiled")
def test_targets_that_read_no_bfloat16_count_float32(
    routers: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = (Bundle.open(folder).manifest for folder in routers)
    saved = whole["sizes"]["router"] - half["sizes"]["router"]
    assert bytes_per_token(whole, 64) - bytes_per_token(half, 64) == saved
    assert bytes_per_token(whole, 64, target="tensorrt") == bytes_per_token(half, 64, target="tensorrt")
    for option in ("int4 --head int4", "int8"):
        less, more = (narrower_weight_bytes(each, option) for each in (half, whole))
        assert less is not None and more is not None and more - less == saved, option
    monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)
    assert bytes_per_token(half, 64) == bytes_per_token(whole, 64)
