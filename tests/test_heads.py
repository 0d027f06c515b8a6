"""The head at 4 and at 6 bits: what is stored, that every target reads it, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import checkpoints
import family_cases
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from lowered_graph import LoweredGraph
from model_manifests import deepseek_v2_lite
from test_onnxruntime_cuda import lower_and_run

import moedge
from moedge import cli
from moedge.bundle import MODEL, Bundle
from moedge.export.checkpoint import Checkpoint
from moedge.export.families import find_family
from moedge.export.heads import untie_head
from moedge.export.layout import plan_layout
from moedge.export.quantization import find_algorithm, split_int6, unpack_int6
from moedge.export.reader import WeightsReader
from moedge.profiles.device import load_profile
from moedge.profiles.estimate import bytes_per_token, estimate
from moedge.profiles.fit import check_fit
from moedge.profiles.shape import ModelShape
from moedge.profiles.targets import onnxruntime as target
from moedge.profiles.targets._canonical import load_canonical
from moedge.profiles.targets._trt_check import NetworkRunner
from moedge.profiles.targets.tensorrt_network import WEIGHTS_FILE, lower_network

Array = np.ndarray[Any, Any]
TEXT = "the quick brown fox jumps over the lazy dog and runs away from it. " * 6
# Untied, tied, and tied with a divisor of the logits or a bias of the head.
CASES = [
    ("qwen3_moe", "normalized_mqa"),
    ("qwen3_moe", "every_expert_window_tied"),
    ("granitemoe", "odd_experts_top_1_biases_tied"),
    ("phimoe", "both_experts_window_tied"),
]


def export(family: str, name: str, folder: Path, **options: Any) -> Bundle:
    """Parity checked; the checkpoint lies beside."""
    family_cases.save_model(family_cases.make_model(family, name), family, folder / "checkpoint")
    return moedge.export(folder / "checkpoint", folder / "bundle", **{"head": "int4", "group_size": 32} | options)


def canonical_logits(bundle: Bundle, ids: Array) -> Array:
    session = ort.InferenceSession(str(bundle.file(MODEL)))
    logits: Array = session.run(None, {"input_ids": ids[None]})[0][0]
    return logits


@pytest.mark.parametrize(("kind", "zero_points"), [("int4", False), ("int4", True), ("int6", True)])
@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize(("family", "name"), CASES[:2])
def test_codes_are_the_algorithms_own(
    family: str, name: str, algorithm: str, kind: str, zero_points: bool, tmp_path: Path
) -> None:
    """Of the head's tensor, or of the embedding's where that is the head; the embedding itself stays at 8 bits."""
    bundle = export(family, name, tmp_path, algorithm=algorithm, zero_points=zero_points, head=kind)
    checkpoint = Checkpoint.open(tmp_path / "checkpoint")
    module = find_family(checkpoint)
    config = module.read_config(checkpoint)
    _, plan = untie_head(config, module.plan_weights(config), kind)
    layout = plan_layout(plan, "int4", 32, zero_points=zero_points, head=kind)
    reader = WeightsReader(bundle.file("weights.bin"), layout)
    head, embedding = layout["head.weight"], layout["embed.weight"]
    source = checkpoint.read("model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight")
    wanted = find_algorithm(algorithm).quantize(
        source.astype(np.float32), int(kind[-1]), head.group_size, zero_points=not head.shared_zero_points
    )
    np.testing.assert_array_equal(reader.read_rows(head, 0, config.vocab_size), wanted.dequantize())
    assert (head.data.dtype, embedding.data.dtype) == (f"u{kind}", "uint8") and embedding.shared_zero_points
    assert head.shared_zero_points is not (zero_points and kind == "int4")


@pytest.mark.parametrize("kind", ["int4", "int6"])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_engine_of_the_cpu_reads_it(
    family: str, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: None
) -> None:
    bundle = export(family, name, tmp_path, zero_points=family == "phimoe", head=kind)
    classes = bundle.manifest["quantization"]["classes"]
    assert (classes["head"]["dtype"], classes["embedding"]["dtype"]) == (f"u{kind}", "uint8")
    assert bundle.manifest["quantization"]["head"] == kind and bundle.manifest["provenance"]["verified"]
    ids = np.random.default_rng(3).integers(0, bundle.config["vocab_size"], 24)
    expected = canonical_logits(bundle, ids)
    model, _ = load_canonical(bundle)
    cache = target.lower(model, accuracy_level=0, fused_experts=target.has_router_weights())
    found = LoweredGraph(model, cache, bundle.path).step(ids)["logits"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))
    moedge.build(bundle.path, "cpu")
    for kernels in ("", "stock"):
        if kernels:
            monkeypatch.setenv("MOEDGE_KERNELS", kernels)
        with moedge.load(bundle.path, "cpu") as engine:
            found = engine.logits(ids)
        assert np.median(np.abs(found - expected)) < 0.1 * expected.std()
    og = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = og.Model(str(bundle.engine_dir("cpu")))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens(ids.astype(np.int32))
    np.testing.assert_allclose(generator.get_output("logits")[0, 0], found[-1], atol=0.02 * np.abs(found).max())


@pytest.mark.parametrize(("kind", "zero_points"), [("int4", False), ("int4", True), ("int6", False)])
@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_targets_of_gpus_read_it(family: str, name: str, kind: str, zero_points: bool, tmp_path: Path) -> None:
    bundle = export(family, name, tmp_path, zero_points=zero_points, head=kind)
    model, config = load_canonical(bundle)
    network = lower_network(model, config, 40, real=ir.DataType.FLOAT)
    network.weights.write(tmp_path / WEIGHTS_FILE)
    network.save(tmp_path, MODEL)
    wanted = {"int4": ir.DataType.INT4, "int6": ir.DataType.INT8}[kind]  # TensorRT has no integers of 6 bits
    assert network.model.graph.initializers["head.weight.lowered"].dtype == wanted
    ids = np.random.default_rng(3).integers(0, config.vocab_size, 24)
    expected = canonical_logits(bundle, ids)
    on_cuda = lower_and_run(bundle, ids, ir.DataType.FLOAT)
    for found in (NetworkRunner(tmp_path / MODEL).step(ids)["logits"], on_cuda):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("kind", "bits"), [("int4", 4), ("int6", 6)])
def test_a_tied_head_becomes_a_copy_that_counts_once(kind: str, bits: int, tmp_path: Path) -> None:
    """What a token reads falls, what lies on the disk grows; the parameters are the checkpoint's."""
    copied = export(*CASES[1], tmp_path, head=kind)
    tied = moedge.export(tmp_path / "checkpoint", tmp_path / "tied", group_size=32, verify=False)
    assert copied.manifest["model"] == tied.manifest["model"]
    told = f"the head is tied to the embedding; in {kind} it is stored beside it"
    assert told in copied.manifest["provenance"]["notes"]
    assert (tied.sizes["embedding"], copied.sizes["embedding"]) == (0, tied.sizes["head"])
    vocab, hidden = tied.config["vocab_size"], tied.config["hidden_size"]
    scale = 1 if kind == "int4" else 2  # bytes
    assert copied.sizes["head"] == vocab * hidden * bits // 8 + scale * vocab * hidden // 32
    saved = bytes_per_token(tied.manifest, 64) - bytes_per_token(copied.manifest, 64)
    assert saved == vocab * hidden * (8 - bits) // 8 + (4 - scale) * vocab * hidden // 32
    assert [ModelShape.from_manifest(bundle.manifest).head_bits for bundle in (tied, copied)] == [8, bits]
    assert tied.manifest["quantization"]["head"] == "int8"


@pytest.mark.parametrize("kind", ["int4", "int6"])
def test_gptq_fits_the_head_to_what_it_is_multiplied_with(kind: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Another one than hqq's, and parity checked, in an export as in each of its parts."""
    (tmp_path / "text.txt").write_text(TEXT)
    options: dict[str, Any] = {"head": kind, "group_size": 32}
    fitted = moedge.export(
        tiny_checkpoint, tmp_path / "gptq", algorithm="gptq", calibration=tmp_path / "text.txt", **options
    )
    plain = moedge.export(tiny_checkpoint, tmp_path / "hqq", algorithm="hqq", **options)
    errors = [bundle.manifest["quantization"]["classes"]["head"]["relative_error"] for bundle in (fitted, plain)]
    assert errors[0] > 1.02 * errors[1] and fitted.manifest["provenance"]["verified"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"head": "fp16"}, "head 'fp16' is not known; known: int8, int6, int4"),
        (
            {"weights": "int8", "head": "int4"},
            "head 'int4' is for weights int4, and these are int8; leave --head out, or use --weights int4",
        ),
    ],
)
def test_what_is_refused(options: dict[str, str], told: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(moedge.CheckpointError) as raised:
        moedge.export(tiny_checkpoint, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert str(raised.value) == told and not (tmp_path / "out").exists()


def test_what_a_head_is_where_nobody_asks(tmp_path: Path) -> None:
    """int6; int8 where it is the embedding's table or 64 does not divide its width, for which int6 is refused."""
    found = {}
    for name, changes in {"plain": {}, "tied": {"tie_word_embeddings": True}, "narrow": {"hidden_size": 48}}.items():
        checkpoints.save_model(checkpoints.make_model(**changes), tmp_path / name)
        bundle = moedge.export(tmp_path / name, tmp_path / f"{name}.bundle", group_size=16)
        classes = bundle.manifest["quantization"]["classes"]
        role = "embedding" if name == "tied" else "head"
        found[name] = (bundle.manifest["quantization"]["head"], classes[role]["dtype"], len(bundle.manifest["sizes"]))
    assert found == {"plain": ("int6", "uint6", 8), "tied": ("int8", "uint8", 8), "narrow": ("int8", "uint8", 8)}
    with pytest.raises(moedge.CheckpointError) as raised:
        moedge.export(tmp_path / "narrow", tmp_path / "out", head="int6")
    told = "head 'int6' takes a hidden size that 64 divides, and this one is 48; use --head int8 or int4"
    assert str(raised.value) == told and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("compiled")
def test_targets_without_such_kernels_count_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what a step reads and in what must fit; an int8 head's figures are the same."""
    six, eight = deepseek_v2_lite(head="int6"), deepseek_v2_lite(head="int8")
    codes = 102400 * 2048
    wide = bytes_per_token(eight, 64) - round(codes * (2 + 24 / 128) / 8) + codes // 4
    assert bytes_per_token(six, 64, target="tensorrt_rtx") == wide
    unread = wide - bytes_per_token(six, 64) - codes // 4
    assert 0.97 * codes // 4 < unread < 0.98 * codes // 4
    fits = [check_fit(six, load_profile(name)).weight_bytes for name in ("cpu", "rtx4090")]
    assert fits[1] - fits[0] == codes // 4
    shown = [estimate(six, load_profile(name))["bytes_per_token"] for name in ("raspberry-pi-5", "rtx4090")]
    monkeypatch.setenv("MOEDGE_KERNELS", "stock")
    assert estimate(six, load_profile("rtx4090"))["bytes_per_token"] == shown[1]
    assert estimate(six, load_profile("raspberry-pi-5"))["bytes_per_token"] > shown[0]


@pytest.mark.parametrize("vocabulary", [102_400, 50_304, 33_000, 32_000])
@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_of_the_head_that_are_read_whole(vocabulary: int, tokens: int) -> None:
    """As many as are counted among random logits; all rows of a small vocabulary."""
    generator = np.random.default_rng(vocabulary)
    shape = dataclasses.replace(ModelShape.from_manifest(deepseek_v2_lite(head="int6")), vocab_size=vocabulary)
    found = []
    for _ in range(12):
        read = np.zeros(vocabulary, bool)
        for _ in range(tokens):
            logits = generator.standard_normal(vocabulary)
            maxima = np.sort([logits[at : at + 16].max() for at in range(0, vocabulary, 16)])
            read |= logits >= (maxima[-2048] if len(maxima) > 2048 else -np.inf)
        found.append(read.sum())
    assert abs(np.mean(found) / shape.distinct_refined_rows(tokens) - 1) < 0.05


@pytest.mark.usefixtures("compiled")
def test_a_large_vocabulary_is_ranked_as_by_all_six_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside onnxruntime's kernels, which take six bits of each row: the likeliest are the same, the others near."""
    checkpoints.save_model(checkpoints.make_model(vocab_size=33_500, hidden_size=64), tmp_path / "checkpoint")
    moedge.export(tmp_path / "checkpoint", tmp_path / "bundle", group_size=32, verify=False)
    moedge.build(tmp_path / "bundle", "cpu")
    ids, found = np.random.default_rng(2).integers(0, 33_500, 9), []
    for kernels in ("", "stock"):
        if kernels:
            monkeypatch.setenv("MOEDGE_KERNELS", kernels)
        with moedge.load(tmp_path / "bundle", "cpu") as engine:
            found.append(engine.logits(ids))
    own, stock = found
    noise = np.abs(own - stock)
    best = stock >= np.sort(stock, axis=1)[:, -500, None]
    assert np.median(noise[best]) < 0.7 * np.median(noise[~best]) < 0.1 * stock.std()
    np.testing.assert_array_equal(own.argmax(1), stock.argmax(1))


BLOCKS = """
<domain: "moedge", opset_import: ["" : 23]>
SixBitCodes (packed) => (codes)
{
    block_shape = Constant <value_ints = [0, -1, 48]> ()
    row_shape = Constant <value_ints = [0, -1]> ()
    sizes = Constant <value_ints = [32, 16]> ()
    two = Constant <value = uint8 {2}> ()
    four = Constant <value = uint8 {4}> ()
    low_bits = Constant <value = uint8 {15}> ()
    high_bits = Constant <value = uint8 {48}> ()
    shift = Constant <value = uint8 {96}> ()
    blocks = Reshape (packed, block_shape)
    pairs, fours = Split <axis = 2> (blocks, sizes)
    first_half = BitwiseAnd (pairs, low_bits)
    second_half = BitShift <direction = "RIGHT"> (pairs, four)
    lower = Concat <axis = 2> (first_half, second_half)
    by_four = BitShift <direction = "LEFT"> (fours, four)
    by_two = BitShift <direction = "LEFT"> (fours, two)
    back = BitShift <direction = "RIGHT"> (fours, two)
    moved = Concat <axis = 2> (by_four, by_two, fours, back)
    upper = BitwiseAnd (moved, high_bits)
    six = BitwiseOr (lower, upper)
    centred = Add (six, shift)
    codes = Reshape (centred, row_shape)
}
"""


@pytest.mark.usefixtures("compiled")
def test_a_bundle_with_codes_in_blocks(tmp_path: Path) -> None:
    """As earlier versions wrote them: the CPU takes them still, TensorRT says what to do."""
    bundle = export(*CASES[0], tmp_path, head="int6", verify=False)
    moedge.build(bundle.path, "cpu")
    with moedge.load(bundle.path, "cpu") as engine:
        wanted = engine.logits([1, 5, 9, 2])
    model = onnx.load(bundle.file(MODEL), load_external_data=False)
    (node,) = [node for node in model.graph.node if node.op_type == "SixBitPlanes"]
    (tensor,) = [each for each in model.graph.initializer if each.name == node.input[0]]
    offset = int(next(each.value for each in tensor.external_data if each.key == "offset"))
    _, rows, quarter = tensor.dims
    planes = np.memmap(bundle.file("weights.bin"), np.uint8, "r+", offset, (3, rows, quarter))
    codes = unpack_int6(*split_int6(planes)).reshape(rows, -1, 64)
    blocks, high = np.empty((rows, codes.shape[1], 48), np.uint8), codes >> 4
    blocks[..., :32] = codes[..., :32] & 15 | codes[..., 32:] << 4
    blocks[..., 32:] = high[..., :16] | high[..., 16:32] << 2 | high[..., 32:48] << 4 | high[..., 48:] << 6
    planes[:] = blocks.reshape(planes.shape)
    planes.flush()
    node.op_type, tensor.dims[:] = "SixBitCodes", [rows, 3 * quarter]
    for value in [each for each in (*model.graph.value_info, *model.graph.input) if each.name == tensor.name]:
        value.CopyFrom(onnx.helper.make_tensor_value_info(tensor.name, onnx.TensorProto.UINT8, tensor.dims))
    kept = [each for each in model.functions if each.name != "SixBitPlanes"]
    del model.functions[:]
    model.functions.extend([*kept, onnx.parser.parse_function(BLOCKS)])
    bundle.file(MODEL).write_bytes(model.SerializeToString())
    canonical, _ = load_canonical(bundle)
    cache = target.lower(canonical, accuracy_level=0, fused_experts=target.has_router_weights())
    found = LoweredGraph(canonical, cache, bundle.path).step(np.array([1, 5, 9, 2]))["logits"]
    assert np.abs(found - wanted).max() < 0.1 * wanted.std()
    canonical, config = load_canonical(bundle)
    with pytest.raises(moedge.BuildError) as raised:
        lower_network(canonical, config, 40, real=ir.DataType.FLOAT16).weights.write(tmp_path / WEIGHTS_FILE)
    told = (
        "the head's 6-bit codes lie as an earlier version of moedge wrote them, and only --profile cpu still takes "
        "them; export the bundle again"
    )
    assert str(raised.value) == told


def test_the_command_and_a_bundle_of_before(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    command = ["export", str(tiny_checkpoint), "-o", str(tmp_path / "b"), "--head", "int4", "--group-size", "32"]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0 and "\n  head: uint4, group 32; weights' relative error by rounding: " in result.stdout
    shutil.copytree(tiny_bundle, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "moedge.json").read_text())
    del manifest["quantization"]["head"], manifest["seal"]
    (tmp_path / "old" / "moedge.json").write_text(json.dumps(manifest))
    with moedge.load(tmp_path / "old", "cpu") as old, moedge.load(tiny_bundle, "cpu") as new:
        np.testing.assert_array_equal(old.logits([1, 5, 9]), new.logits([1, 5, 9]))
    device = load_profile("rtx4090")
    first, second = (estimate(Bundle.open(path).manifest, device) for path in (tmp_path / "old", tiny_bundle))
    assert first["itl_ms"] == second["itl_ms"]
