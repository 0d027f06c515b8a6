"""Checkpoints whose groups take channels that do not lie side by side (desc_act, actorder): the same integers, in
another order, and inputs gathered to match; on onnxruntime and in the TensorRT network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from checkpoints import make_model, transformers_logits
from onnx.reference import ReferenceEvaluator
from packed_checkpoints import (
    convert_checkpoint,
    ct_settings,
    gptq,
    gptq_settings,
    make_codes,
    pack_quantized,
    read_one,
)
from test_quantized_checkpoints import canonical_logits, unpack_theirs

import moedge
from moedge.bundle import MODEL, Bundle
from moedge.export import pipeline
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.layout import Layout, plan_layout
from moedge.export.ordering import order_columns
from moedge.export.quantization.sources import bind_sources
from moedge.export.reader import WeightsReader
from moedge.export.weights import read_piece
from moedge.profiles.targets import onnxruntime as target
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network
from moedge.runtime import kernels

Array = np.ndarray[Any, Any]
SEED = 31
GROUP = 16
EXPERTS = "model.layers.1.mlp.experts"


def name_of_order(kind: str, stem: str) -> str:
    """Matrices of one name share an order."""
    parent, _, part = stem.rpartition(".")
    if part in ("gate_proj", "up_proj") and kind != "each":
        # As GPTQ leaves them: gate and up of an expert see the same inputs; `layer`: all experts calibrated together.
        return f"{parent.partition('.experts.')[0] if kind == 'layer' else parent} in"
    return stem


def ordered(kind: str, bits: int = 4, symmetric: bool = False) -> Callable[[str, Array], Any]:
    """A conversion to GPTQ with g_idx in random order; `unequal`: groups of any sizes, a few of them empty."""

    def convert(stem: str, values: Array) -> Any:
        width = values.shape[1]
        rng = np.random.default_rng([SEED, *name_of_order("each" if kind == "unequal" else kind, stem).encode()])
        groups = np.arange(width) // GROUP
        order = rng.choice(groups, width) if kind == "unequal" else rng.permutation(groups)
        codes, scales, zeros = make_codes(values, bits, GROUP, symmetric)
        offset = codes.astype(np.float32) - zeros[:, order].astype(np.float32)
        tensors = {**gptq(stem, codes, scales, zeros, bits), f"{stem}.g_idx": order.astype(np.int32)}
        return tensors, offset * scales[:, order].astype(np.float32)

    return convert


def export(
    kind: str, folder: Path, bits: int = 4, symmetric: bool = False, skip: tuple[str, ...] = ()
) -> tuple[Any, Bundle]:
    model = make_model(SEED)
    convert_checkpoint(model, folder / "c", ordered(kind, bits, symmetric), gptq_settings(bits, desc_act=True), skip)
    return model, moedge.export(folder / "c", folder / "b", weights="fp32")


def draw_ids() -> Array:
    return np.random.default_rng(SEED).integers(0, 320, (1, 40))


@pytest.mark.parametrize(
    ("kind", "bits", "symmetric"),
    [("layer", 4, True), ("expert", 4, False), ("expert", 8, False), ("each", 4, True), ("unequal", 4, False)],
)
def test_logits_are_those_of_the_dequantized_model(
    kind: str, bits: int, symmetric: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The canonical graph on onnxruntime and onnx's evaluator, the cpu engine, and TensorRT's network."""
    model, bundle = export(kind, tmp_path, bits, symmetric)
    onnx.checker.check_model(str(bundle.path / "model.onnx"), full_check=True)
    ids = draw_ids()
    expected = transformers_logits(model, ids)[0]
    np.testing.assert_allclose(canonical_logits(bundle.path, ids)[0], expected, rtol=0, atol=1e-4)
    (few,) = ReferenceEvaluator(onnx.load(bundle.path / "model.onnx")).run(None, {"input_ids": ids[:, :2]})
    np.testing.assert_allclose(few[0], expected[:2], rtol=0, atol=1e-4)
    monkeypatch.setattr(target, "ACCURACY_LEVEL", 0)
    monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)  # ours round activations whatever the level
    folder = moedge.build(bundle.path, "cpu")
    with moedge.load(bundle.path, "cpu", threads=1) as engine:
        off = np.abs(engine.logits(ids[0]) - expected)
        assert off.max() < 1e-4 if bits == 4 else np.median(off) < 0.05 * expected.std()
    lowered = [node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node]
    assert ("QMoE" in lowered) == (target.has_router_weights() and kind in ("layer", "expert"))
    graph, config = load_canonical(bundle)
    network = lower_network(graph, config, 64, real=ir.DataType.FLOAT)
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    for cuts in ([], [9, 10, 11]):
        runner = NetworkRunner(tmp_path / MODEL)
        found = np.concatenate([runner.step(part)["logits"] for part in np.split(ids[0], cuts)])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


class Stored:
    """What a bundle holds of a checkpoint, tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder / "c")
        family = find_family(checkpoint)
        self.plan = order_columns(bind_sources(checkpoint, family.plan_weights(family.read_config(checkpoint))))
        self.layout: Layout = plan_layout(self.plan, "fp32", 128, zero_points=False)
        self.reader = WeightsReader(folder / "b" / "weights.bin", self.layout)

    def read(self, name: str, part: str = "data") -> Array:
        slot = getattr(self.layout[name], part)
        values: Array = self.reader.read_flat(slot, 0, int(np.prod(slot.shape))).reshape(slot.shape)
        return values


def check_integers(theirs: tuple[Array, Array, Array, Array], ours: tuple[Array, Array, Array], order: Array) -> None:
    """theirs: codes [out, in], scales and zero points [out, groups], g_idx [in]; ours: codes, scales, zero points;
    `order`: the channel of each of our columns. Every channel must be there once; other columns must be zeros."""
    codes, scales, zeros, groups = theirs
    if (ours[2] == 128).all() and codes.max() < 16:  # an odd number of groups: nibbles in bytes, their zero at 128
        codes, zeros = codes - zeros[:, groups] + np.uint8(128), np.full_like(zeros, 128)
    block = ours[0].shape[1] // ours[1].shape[1]
    first, where = np.unique(order, return_index=True)
    assert first.tolist() == list(range(codes.shape[1]))
    # Channel 0 stands in for the columns of zeros too: its own is the one whose codes are the checkpoint's.
    own = [column for column in np.flatnonzero(order == 0) if (ours[0][:, column] == codes[:, 0]).all()]
    where[0] = own[0]
    np.testing.assert_array_equal(ours[0][:, where], codes)
    np.testing.assert_array_equal(ours[1][:, where // block], scales[:, groups].astype(np.float32))
    np.testing.assert_array_equal(ours[2][:, where // block], zeros[:, groups])
    rest = np.setdiff1d(np.arange(len(order)), where)
    np.testing.assert_array_equal(ours[0][:, rest], ours[2][:, rest // block])


def unpack_all(bits: int, tensors: dict[str, Any], stem: str) -> tuple[Array, Array, Array, Array]:
    codes = unpack_theirs(f"gptq {bits}", tensors, stem)
    scales = tensors[f"{stem}.scales"].numpy().T
    words = tensors[f"{stem}.qzeros"].numpy().view(np.uint32)
    zeros = [
        (words[:, row * bits // 32] >> (row * bits % 32)) + 1 & ((1 << bits) - 1) for row in range(codes.shape[0])
    ]
    return codes, scales, np.array(zeros), tensors[f"{stem}.g_idx"].numpy()


@pytest.mark.parametrize(("kind", "bits"), [("layer", 4), ("expert", 4), ("expert", 8), ("each", 4), ("unequal", 4)])
def test_integers_are_kept_bit_for_bit(kind: str, bits: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export(kind, tmp_path, bits, skip=("experts.3.gate",))  # a plain matrix takes the order of those around it
    stored = Stored(tmp_path)
    again = plan_layout(stored.plan, "int4", 128, zero_points=False)["layers.0.attn.k_up.weight"]
    assert again.bits == 8  # 4 bits would be a second loss
    tensors = load_file(tmp_path / "c" / "model.safetensors")
    parts = ("data", "scales", "zero_points")
    for name, stem in (("layers.0.attn.o", "self_attn.o_proj"), ("layers.0.mlp.down", "mlp.down_proj")):
        codes, scales, zeros, order = (stored.read(f"{name}.weight", part) for part in (*parts, "order"))
        check_integers(unpack_all(bits, tensors, f"model.layers.0.{stem}"), (codes, scales, zeros), order)
    down = [stored.read("layers.1.experts.down.weight", part) for part in parts]
    gate_up = [stored.read("layers.1.experts.gate_up.weight", part) for part in parts]
    orders = stored.read("layers.1.experts.gate_up.weight", "order")
    assert orders.ndim == (1 if kind == "layer" else 2)
    for expert in (0, 5, 7):
        theirs = unpack_all(bits, tensors, f"{EXPERTS}.{expert}.down_proj")
        # What goes into down comes as the rows of gate and up do.
        inner = stored.layout["layers.1.experts.gate_up.weight"].weight.units[expert][0].rows
        assert inner is not None
        check_integers(theirs, (down[0][expert], down[1][expert], down[2][expert]), np.maximum(inner, 0))
        real = np.flatnonzero(inner >= 0)
        for offset, part in enumerate(("gate_proj", "up_proj")):
            whole = unpack_all(bits, tensors, f"{EXPERTS}.{expert}.{part}")
            matrix = (*(values[inner[real]] for values in whole[:3]), whole[3])
            ours = [values[expert, offset::2][real] for values in gate_up]
            order = np.atleast_2d(orders)[expert if orders.ndim == 2 else 0]
            if kind in ("each", "unequal"):  # side by side: each has zeros where the other's channels lie
                columns = stored.layout["layers.1.experts.gate_up.weight"].weight.units[expert][offset].columns
                assert columns is not None and (order[columns >= 0] == columns[columns >= 0]).all()
                order = np.maximum(columns, 0)
            check_integers(matrix, (ours[0], ours[1], ours[2]), order)


def test_a_single_matrix_is_unpacked_right(tmp_path: Path) -> None:
    """Channel i has the scale of group g_idx[i]; in compressed-tensors, weight_g_idx[i]."""
    rng = np.random.default_rng(6)
    codes, scales, zeros = make_codes(rng.normal(size=(16, 64)), 4, 16, False)
    order = rng.permutation(np.arange(64) // 16).astype(np.int32)
    expected = (codes - zeros[:, order].astype(np.float32)) * scales[:, order].astype(np.float32)
    packed = pack_quantized("a", codes, scales, zeros, 4)
    packed["a.weight_scale"] = scales
    sources = [
        ({**gptq("a", codes, scales, zeros, 4), "a.g_idx": order}, gptq_settings(4, desc_act=True)),
        ({**packed, "a.weight_g_idx": order}, ct_settings("pack-quantized")),
    ]
    for tensors, settings in sources:
        piece = read_one(tmp_path / "c", tensors, settings, "a.weight", (16, 64))
        checkpoint = Checkpoint.open(tmp_path / "c")
        np.testing.assert_array_equal(read_piece(checkpoint, piece), expected)
        assert piece.packed is not None and piece.packed.columns is not None
        found = piece.packed.read_codes(checkpoint, 3, 9)
        np.testing.assert_array_equal(found.codes, codes[3:9, piece.packed.columns])
        np.testing.assert_array_equal(found.dequantize(), expected[3:9, piece.packed.columns])


@pytest.mark.parametrize("name", ["layers.1.experts.gate_up.weight", "layers.0.attn.o.weight"])
def test_another_order_in_the_file_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pipeline.write_weights

    def damaged(checkpoint: Any, layout: Layout, path: Path, *rest: Any) -> Any:
        errors = real(checkpoint, layout, path, *rest)
        order = layout[name].order
        assert order is not None
        with path.open("r+b") as stream:
            stream.seek(order.offset)
            pair = stream.read(16)
            stream.seek(order.offset)
            stream.write(pair[8:] + pair[:8])
        return errors

    monkeypatch.setattr(pipeline, "write_weights", damaged)
    source = {"layers.0.attn.o.weight": "model.layers.0.self_attn.o_proj"}.get(name, f"{EXPERTS}.0.gate_proj")
    with pytest.raises(moedge.ParityError) as caught:
        export("expert", tmp_path)
    assert f"first: {source}.qweight (as {name}): the order of its input channels differs" in str(caught.value)


def test_a_checkpoint_in_plain_order_keeps_its_graph(tmp_path: Path) -> None:
    """g_idx in the order of the channels costs no node."""
    settings = gptq_settings(4, desc_act=True)

    def convert(stem: str, values: Array) -> Any:
        codes, scales, zeros = make_codes(values, 4, GROUP, True)
        grouped = (codes.astype(np.float32) - 8).reshape(*scales.shape, GROUP) * scales[..., None].astype(np.float32)
        return gptq(stem, codes, scales, zeros, 4), grouped.reshape(values.shape)

    convert_checkpoint(make_model(SEED), tmp_path / "c", convert, settings)
    bundle = moedge.export(tmp_path / "c", tmp_path / "b", verify=False)
    graph = onnx.load(bundle.path / "model.onnx", load_external_data=False).graph
    assert not [node.op_type for node in graph.node if node.op_type == "GatherND"]
    assert not [tensor.name for tensor in graph.initializer if tensor.name.endswith(".order")]
