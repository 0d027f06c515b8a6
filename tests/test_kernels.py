"""The custom ops of `moedge.cpu`: their arithmetic against numpy and `QMoE`, their promises, and where they are not."""

from __future__ import annotations

import ctypes
import json
import platform
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from kernel_cases import (
    Stack,
    experts_model,
    linear_model,
    make_stack,
    multiply,
    open_model,
    run_reference,
)
from onnx import TensorProto, helper, numpy_helper

import moedge
from moedge.bundle import MODEL
from moedge.profiles.targets import onnxruntime as target
from moedge.runtime import kernels
from moedge.runtime.kernels import compiling

PLAIN = {"alpha": 1.0, "limit": float("inf"), "offset": 0.0}
CLAMPED = {"alpha": 1.702, "limit": 0.7, "offset": 1.0}


def feed(generator: np.random.Generator, tokens: int, experts: int, top_k: int, hidden: int) -> dict[str, Any]:
    return {
        "x": generator.standard_normal((tokens, hidden), np.float32),
        "experts": np.argsort(generator.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int64),
        "weights": generator.random((tokens, top_k), np.float32),
    }


# (E, H, I, group), bits, what is in it: fewer rows than a tile; ends that fill no vector, tile or panel; whole ones
CASES = [
    ((5, 48, 48, 16), 4, "both"),
    ((5, 48, 48, 16), 8, "plain"),
    ((3, 96, 32, 32), 4, "zero_points"),
    ((4, 1088, 64, 64), 4, "plain"),
    ((4, 1088, 64, 64), 8, "both"),
    ((5, 256, 640, 128), 4, "plain"),
    ((5, 256, 640, 128), 8, "bias"),
]


@pytest.mark.parametrize(("shape", "bits", "extra"), CASES)
def test_experts_equal_the_reference_on_every_path(
    shape: tuple[int, int, int, int],
    bits: int,
    extra: str,
    forms: list[tuple[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To 1e-5 of the reference; between instruction sets, threads and numbers of tokens to the bit."""
    count, hidden, inner, group = shape
    generator = np.random.default_rng(hidden + bits)
    options: dict[str, Any] = {"zero_points": extra in ("zero_points", "both"), "bias": extra in ("bias", "both")}
    gate_up = make_stack(generator, (count, 2 * inner, hidden), group, bits, **options)
    down = make_stack(generator, (count, hidden, inner), group, bits, **options)
    activation = CLAMPED if options["bias"] else PLAIN
    feeds = [feed(generator, tokens, count, k, hidden) for tokens, k in [(0, 2), (1, 1), (2, count), (7, 2), (64, 3)]]
    feeds.append(feed(generator, 130, count, 1, hidden))
    feeds[-1]["experts"][:] = count - 1  # one expert for everybody
    model = experts_model(gate_up, down, **{name: value for name, value in activation.items() if value != np.inf})
    results: list[list[Any]] = []
    for (name, library), threads in [(forms[0], 1), *((form, 3) for form in forms)]:
        monkeypatch.setenv(kernels.VARIABLE, name)
        session = open_model(model, library, threads)
        results.append([session.run(None, given)[0] for given in feeds])
        for given, y in zip(feeds, results[-1], strict=True):
            for i in range(0, len(y), 3):
                alone = {key: rows[i : i + 1] for key, rows in given.items()}
                np.testing.assert_array_equal(session.run(None, alone)[0], y[i : i + 1])
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(actual, expected)
    for given, actual in zip(feeds[1:], results[0][1:], strict=True):
        wanted = run_reference(given["x"], given["experts"], given["weights"], gate_up, down, **activation)
        off = np.abs(actual - wanted).max(axis=1) / np.abs(wanted).max()
        # Where a value between the two products lies halfway between two integers, its token may be a step off.
        assert (off > 1e-5).mean() <= 0.02 and off.max() < 5e-3
    assert results[0][0].shape == (0, hidden)


def test_experts_of_many_tokens_have_the_bits_of_few(library: Path) -> None:
    """Few tokens' last products are taken expert by expert, many tokens' row by row."""
    generator = np.random.default_rng(31)
    count, hidden, inner, tokens, top_k = 4, 1088, 64, 400, 3
    assert tokens * top_k * hidden > 2**19 > tokens // 4 * top_k * hidden  # kMostApart in moe.h
    gate_up = make_stack(generator, (count, 2 * inner, hidden), 64, 4, bias=True)
    down = make_stack(generator, (count, hidden, inner), 64, 4, bias=True)
    session = open_model(experts_model(gate_up, down, **CLAMPED), library, 2)
    given = feed(generator, tokens, count, top_k, hidden)
    pieces = [{key: rows[at : at + 100] for key, rows in given.items()} for at in range(0, tokens, 100)]
    expected = np.concatenate([session.run(None, piece)[0] for piece in pieces])
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(session.run(None, given)[0], expected)


@pytest.mark.parametrize(
    ("shape", "group"),
    [((1, 7, 48), 16), ((1, 100, 1088), 64), ((1, 640, 512), 128), ((1, 75, 1536), 128), ((1, 75, 1536), 512)],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_linear_equals_the_reference_on_every_path(
    shape: tuple[int, int, int], group: int, bits: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(bits)
    matrix = make_stack(generator, shape, group, bits, zero_points=group == 64, bias=group == 128)
    x = generator.standard_normal((2, 70, shape[2]), np.float32)
    wanted = multiply(x.reshape(140, -1), matrix, 0).reshape(2, 70, -1)
    results = []
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        session = open_model(linear_model(matrix), library, threads=2)
        results.append(session.run(None, {"x": x})[0])
        np.testing.assert_array_equal(session.run(None, {"x": x[1, 5]})[0], results[-1][1, 5])
        np.testing.assert_array_equal(results[-1], results[0])
    np.testing.assert_allclose(results[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def qmoe_model(gate_up: Stack, down: Stack, top_k: int) -> bytes:
    """The stock op on the same bytes, routed as the lowering routes it."""
    names = ["x", "routing", "gate_up", "gate_up_scales", "", "down", "down_scales", *[""] * 7, "routing"]
    attributes = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
    attributes |= {"use_sparse_mixer": 0, "normalize_routing_weights": 0, "accuracy_level": target.ACCURACY_LEVEL}
    shape = {"k": top_k, "expert_weight_bits": gate_up.bits, "block_size": gate_up.group}
    node = helper.make_node("QMoE", names, ["y"], domain="com.microsoft", **attributes, **shape)
    held = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for stack, name in ((gate_up, "gate_up"), (down, "down"))
        for value, name in ((stack.packed(stack.codes), name), (stack.scales, f"{name}_scales"))
    ]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", None]) for name in ("x", "routing")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", None])]
    graph = helper.make_graph([node], "one", inputs, outputs, held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 64)])
def test_experts_are_near_onnxruntimes(tokens: int, bits: int, group: int, library: Path) -> None:
    if not target.has_router_weights():
        pytest.skip("this onnxruntime's QMoE takes no routing weights")
    generator = np.random.default_rng(3)
    gate_up = make_stack(generator, (4, 512, 256), group, bits)
    down = make_stack(generator, (4, 256, 256), group, bits)
    given = feed(generator, tokens, 4, 2, 256)
    routing = np.zeros((tokens, 4), np.float32)
    np.put_along_axis(routing, given["experts"], given["weights"], axis=1)
    (ours,) = open_model(experts_model(gate_up, down), library).run(None, given)
    stock = open_model(qmoe_model(gate_up, down, 2), library)
    (theirs,) = stock.run(None, {"x": given["x"], "routing": routing})
    # Both round activations to 8 bits, at places of their own.
    assert np.abs(ours - theirs).max() < 0.03 * np.abs(theirs).max()
    assert np.abs(ours - theirs).mean() < 0.01 * np.abs(theirs).mean()


@pytest.fixture
def small(library: Path) -> tuple[ort.InferenceSession, dict[str, Any]]:
    generator = np.random.default_rng(4)
    gate_up, down = make_stack(generator, (4, 64, 32), 16, 4), make_stack(generator, (4, 32, 32), 16, 4)
    return open_model(experts_model(gate_up, down), library), feed(generator, 6, 4, 2, 32)


def test_what_is_no_number_stays_in_its_token(small: tuple[ort.InferenceSession, dict[str, Any]]) -> None:
    session, given = small
    (clean,) = session.run(None, given)
    for value in (np.nan, np.inf, -np.inf):
        spoiled = given["x"].copy()
        spoiled[2, 7] = value
        (y,) = session.run(None, given | {"x": spoiled})
        assert np.isnan(y[2]).all()
        np.testing.assert_array_equal(np.delete(y, 2, axis=0), np.delete(clean, 2, axis=0))
    tiny = np.full_like(given["x"], 1e-40)
    np.testing.assert_array_equal(session.run(None, given | {"x": tiny})[0], np.zeros_like(clean))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: f["experts"].__setitem__((3, 1), 4), "expert 4 of 4 was chosen"),
        (lambda f: f["experts"].__setitem__((0, 0), -1), "expert -1 of 4 was chosen"),
        (lambda f: f.update(weights=f["weights"][:, :1]), "shapes do not fit each other"),
        (lambda f: f.update(experts=f["experts"][:2]), "shapes do not fit each other"),
        (lambda f: f.update(x=np.tile(f["x"], 2)), "shapes do not fit each other"),
        (lambda f: f.update(x=f["x"][:, :16]), "shapes do not fit each other"),
        (lambda f: f.update(x=f["x"][0]), "shapes do not fit each other"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    change: Any, text: str, small: tuple[ort.InferenceSession, dict[str, Any]]
) -> None:
    session, given = small
    change(given)
    with pytest.raises(Exception, match=text):
        session.run(None, given)


def test_other_bits_are_refused(library: Path) -> None:
    gate_up = make_stack(np.random.default_rng(0), (2, 32, 16), 16, 8)
    wrong = Stack(gate_up.codes, gate_up.scales, 5)
    with pytest.raises(Exception, match="bits must be 4 or 8, of Linear and Projections also 6"):
        open_model(experts_model(wrong, wrong), library)


def test_an_onnxruntime_that_is_too_old_is_told_apart(library: Path) -> None:
    """GetApi gives null for an API version that the runtime does not know; its first version makes the error."""
    create_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    told: list[bytes] = []

    def create_status(code: int, text: bytes) -> int:
        told.append(text)
        return 1

    create = create_type(create_status)
    table = (ctypes.c_void_p * 300)(ctypes.cast(create, ctypes.c_void_p))
    get = get_type(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p))
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 1
    assert b"too old, 1.18 or later" in told[0]


# In an engine


@pytest.mark.usefixtures("compiled")
def test_an_engine_runs_the_ops_where_they_are_and_the_stock_ones_elsewhere(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = list(range(5, 45))
    with moedge.load(tiny_bundle) as engine:
        own = engine.logits(ids)
        assert kernels.describe(engine.info.session) == f"moedge.cpu ({kernels.instruction_set()})"
    monkeypatch.setenv(kernels.VARIABLE, kernels.STOCK)
    assert kernels.why_not() == "MOEDGE_KERNELS is 'stock'; unset it"
    with moedge.load(tiny_bundle) as engine:
        stock = engine.logits(ids)
        assert kernels.describe(engine.info.session) == "onnxruntime"
    # The median: where a rounding flips an expert, a random model goes its own way.
    assert 0 < np.median(np.abs(own - stock)) < 0.05 * stock.std()
    monkeypatch.delenv(kernels.VARIABLE)
    monkeypatch.setattr(kernels, "FOLDER", tiny_bundle)
    assert kernels.why_not() == "the kernels are not compiled; with a C++ compiler: python -m moedge.runtime.kernels"
    with moedge.load(tiny_bundle) as engine:
        np.testing.assert_array_equal(engine.logits(ids), stock)


def test_a_library_for_another_machine_or_processor_runs_the_stock_ops(
    library: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "FOLDER", tiny_bundle)
    ids = list(range(5, 45))
    with moedge.load(tiny_bundle) as engine:
        stock = engine.logits(ids)
    monkeypatch.setattr(kernels, "_library_name", lambda: "weights.bin")  # which is there, and no library
    text = "the kernels' library does not load on this machine; with a C++ compiler: python -m moedge.runtime.kernels"
    assert kernels.why_not() == text
    with moedge.load(tiny_bundle) as engine:
        np.testing.assert_array_equal(engine.logits(ids), stock)
    monkeypatch.setattr(kernels, "_instruction_sets", lambda path: [])
    there = ", ".join(compiling.instruction_sets())
    assert kernels.why_not() == f"there are kernels for {there}, and this processor has none of them"
    assert kernels.library() is None and kernels.instruction_set() is None


@pytest.mark.usefixtures("compiled")
def test_an_instruction_set_that_is_not_here_is_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "altivec")
    text = "MOEDGE_KERNELS is 'altivec'; on this machine it can be .+, stock"
    with pytest.raises(moedge.EngineError, match=text):
        moedge.load(tiny_bundle)


@pytest.mark.usefixtures("compiled")
def test_an_onnxruntime_that_refuses_the_library_runs_the_stock_ops() -> None:
    class Refusing:
        def register_custom_ops_library(self, path: str) -> None:
            raise RuntimeError("moedge.cpu: this onnxruntime is too old")

    session = {"own_kernels": True}
    assert kernels.register(Refusing(), session, MODEL) == MODEL
    assert kernels.register(ort.SessionOptions(), session, MODEL) == "model.moedge_cpu.onnx"
    assert kernels.register(ort.SessionOptions(), {"own_kernels": False}, MODEL) == MODEL


@pytest.mark.usefixtures("compiled")
def test_floating_point_bundles_have_the_ops_for_attention_and_routers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    moedge.export(tiny_checkpoint, tmp_path / "b", weights="fp16", verify=False)
    engine = moedge.build(tmp_path / "b", "cpu")
    graph = onnx.load(engine / kernels.own_name(MODEL), load_external_data=False).graph
    assert {node.op_type for node in graph.node if node.domain == kernels.DOMAIN} == {"LatentAttention", "Router"}
    session = json.loads((engine / "engine.json").read_text())["session"]
    assert kernels.describe(session) == f"moedge.cpu ({kernels.instruction_set()})"


# Compiling


def test_a_compiler_that_is_missing_or_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / compiling.library_name()).write_bytes(b"earlier")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(compiling.CompileError, match="false failed"):
        compiling.compile_library(tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compiling.CompileError, match="no-such-compiler does not run"):
        compiling.compile_library(tmp_path)
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(compiling.CompileError, match="no C\\+\\+ compiler was found"):
        compiling.compile_library(tmp_path)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(compiling.CompileError, match="^no kernels are written for riscv64; onnxruntime's own ops run"):
        compiling.compile_library(tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"earlier"]
