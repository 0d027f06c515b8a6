"""The ops of `moedge.cpu` that take several nodes' place: norm, router, gate, linears of one input, the dense MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import Stack, make_stack, multiply, open_model
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moedge.export.gating import list_gates
from moedge.export.gating._compare import compare_choices
from moedge.runtime import kernels

Array = NDArray[Any]
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
EPSILON = 1e-5
# The gates of models: OLMoE, Mixtral, DeepSeek-V2, DeepSeek-V3; a group of one; every expert chosen
GATES = [
    ("SoftmaxTopKGate", 64, {"top_k": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": 0}, 1.0),
    ("SoftmaxTopKGate", 8, {"top_k": 2, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1}, 1.0),
    ("SoftmaxTopKGate", 160, {"top_k": 6, "n_group": 8, "topk_group": 3, "norm_topk_prob": 0}, 16.0),
    ("SigmoidTopKGate", 256, {"top_k": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": 1}, 2.5),
    ("SigmoidTopKGate", 6, {"top_k": 2, "n_group": 6, "topk_group": 3, "norm_topk_prob": 1}, 1.0),
    ("SigmoidTopKGate", 5, {"top_k": 5, "n_group": 1, "topk_group": 1, "norm_topk_prob": 0}, 1.0),
]


def step_model(
    op: str,
    constants: dict[str, Array | None],
    outputs: dict[str, int],
    *,
    residual: bool = True,
    addend: bool = False,
    **attributes: Any,
) -> bytes:
    """A graph of one node: inputs x and residual, then `constants` (None: left out); an output named "" is left out.

    addend: among the constants "addend" stands for a further input of the graph.
    """
    names = ["x", "residual" if residual else ""]
    names += [name if held is not None or (addend and name == "addend") else "" for name, held in constants.items()]
    node = helper.make_node(op, names, list(outputs), domain=kernels.DOMAIN, epsilon=EPSILON, **attributes)
    inputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in [*names[:2], "addend" * addend] if name]
    given = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items() if name]
    held = [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items() if v is not None]
    graph = helper.make_graph([node], "one", inputs, given, held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(kernels.DOMAIN, 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


def operands(stack: Stack, name: str, *, bias: bool = True) -> dict[str, Array | None]:
    """Of a stack of one matrix, as the ops take them."""
    zeros = None if stack.zero_points is None else stack.packed(stack.zero_points)[0]
    codes: dict[str, Array | None] = {name: stack.packed(stack.codes)[0], f"{name}.scales": stack.scales[0]}
    codes[f"{name}.zeros"] = zeros
    return codes | ({f"{name}.bias": None if stack.bias is None else stack.bias[0]} if bias else {})


def normalize(x: Array, weight: Array | None) -> Array:
    if weight is None:
        return x
    mean = np.square(x.astype(np.float64)).mean(axis=1, keepdims=True)
    return np.asarray(x / np.sqrt(mean + EPSILON) * weight, np.float32)


def run_everywhere(
    model: bytes, forms: list[tuple[str, Path]], feed: dict[str, Array], monkeypatch: pytest.MonkeyPatch
) -> list[Array]:
    """The outputs: the same to the bit by every instruction set, on one thread and on three, for a row alone."""
    found: list[list[Array]] = []
    for name, library in forms:
        monkeypatch.setenv(kernels.VARIABLE, name)
        for threads in (1, 3):
            session = open_model(model, library, threads)
            found.append(session.run(None, feed))
            for i in range(0, len(feed["x"]), 7):
                alone = session.run(None, {key: value[i : i + 1] for key, value in feed.items()})
                for one, all_rows in zip(alone, found[-1], strict=True):
                    np.testing.assert_array_equal(one, all_rows[i : i + 1])
    for other in found[1:]:
        for expected, actual in zip(found[0], other, strict=True):
            np.testing.assert_array_equal(actual, expected)
    return found[0]


def assert_near(actual: Array, wanted: Array) -> None:
    """Where a value lies halfway between two integers of the quantization, its token may be a step off."""
    off = np.abs(actual - wanted).max(axis=1) / np.abs(wanted).max()
    assert (off > 1e-5).mean() <= 0.05 and off.max() < 5e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "group", "rows"), [(48, 16, (7, 40, 9)), (640, 128, (70, 33)), (1056, 32, (65,))])
@pytest.mark.parametrize("normed", [True, False])
def test_projections_equal_the_reference_on_every_path(
    bits: int,
    width: int,
    group: int,
    rows: tuple[int, ...],
    normed: bool,
    forms: list[tuple[str, Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = np.random.default_rng(width + bits)
    options = {"zero_points": group == 16, "bias": normed}
    stacks = [make_stack(generator, (1, count, width), group, bits, **options) for count in rows]
    weight = generator.random(width, np.float32) + np.float32(0.5) if normed else None
    constants: dict[str, Array | None] = {"norm": weight}
    for place, stack in enumerate(stacks):
        constants |= operands(stack, f"m{place}")
    outputs = dict.fromkeys(["y0", "sum", "y1", "y2"][: len(rows) + 1], FLOAT)
    feed = {name: generator.standard_normal((140, width), np.float32) for name in ("x", "residual")}
    y, total, *others = run_everywhere(
        step_model("Projections", constants, outputs, bits=bits), forms, feed, monkeypatch
    )
    np.testing.assert_array_equal(total, feed["x"] + feed["residual"])
    for stack, found in zip(stacks, [y, *others], strict=True):
        assert_near(found, multiply(normalize(total, weight), stack, 0))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("hidden", "inner", "group"), [(48, 80, 16), (256, 640, 128)])
def test_the_mlp_equals_the_reference_on_every_path(
    bits: int, hidden: int, inner: int, group: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(inner + bits)
    gate_up = make_stack(generator, (1, 2 * inner, hidden), group, bits, zero_points=group == 16)
    down = make_stack(generator, (1, hidden, inner), group, bits, zero_points=group == 16)
    weight = generator.random(hidden, np.float32) + np.float32(0.5)
    constants = {"norm": weight, **operands(gate_up, "up", bias=False), **operands(down, "down", bias=False)}
    feed = {"x": generator.standard_normal((70, hidden), np.float32)}
    model = step_model("Mlp", constants, {"y": FLOAT}, residual=False, bits=bits)
    (y,) = run_everywhere(model, forms, feed, monkeypatch)
    x = normalize(feed["x"], weight)
    gate, up = np.split(multiply(x, gate_up, 0).astype(np.float64), 2, axis=1)
    assert_near(y, multiply((gate / (1 + np.exp(-gate)) * up).astype(np.float32), down, 0))
    # A shared expert's: what is added has the bits of a node behind; its own gate is near numpy's.
    feed["addend"] = generator.standard_normal((70, hidden), np.float32)
    share = generator.standard_normal((1, hidden), np.float32) if bits == 4 else None
    model = step_model(
        "Mlp", constants | {"addend": None, "share": share}, {"y": FLOAT}, residual=False, addend=True, bits=bits
    )
    (summed,) = run_everywhere(model, forms, feed, monkeypatch)
    if share is None:
        np.testing.assert_array_equal(summed, y + feed["addend"])
    else:
        weighed = y / (1 + np.exp(-x.astype(np.float64) @ share[0])[:, None])
        np.testing.assert_allclose(summed, weighed + feed["addend"], rtol=0, atol=1e-6 * np.abs(weighed).max())


def router_model(gate: str, experts: int, width: int, attributes: dict[str, int], factor: float, **given: Any) -> bytes:
    """x and residual go through a norm where there is one; the matrix is an identity where none is `given`."""
    constants = {"norm": given.get("norm"), "matrix": given.get("matrix", np.eye(experts, width, dtype=np.float32))}
    constants |= {"bias": given.get("bias"), "correction": given.get("correction")}
    outputs = {"logits": FLOAT, "experts": INT64, "weights": FLOAT, "sum": FLOAT, "normed": FLOAT}
    kept = {name: kind for name, kind in outputs.items() if name in given.get("outputs", outputs)}
    kind = {"sigmoid": int(gate == "SigmoidTopKGate"), **attributes, "routed_scaling_factor": factor}
    return step_model("Router", constants, kept, residual="sum" in kept, **kind)


@pytest.mark.parametrize(("gate", "experts", "attributes", "factor"), GATES)
def test_gates_choose_what_their_references_choose(
    gate: str, experts: int, attributes: dict[str, int], factor: float, library: Path
) -> None:
    """100,000 tokens in all, of wide and of narrow logits, and of few values, so that many are equal."""
    generator = np.random.default_rng(experts)
    tokens = 100_000 // len(GATES) // 3 + 1
    correction = generator.standard_normal(experts).astype(np.float32) * np.float32(0.1)
    correction = correction if gate == "SigmoidTopKGate" else None
    options = {"correction": correction, "outputs": ("logits", "experts", "weights")}
    session = open_model(router_model(gate, experts, experts, attributes, factor, **options), library)
    further = () if correction is None else (correction,)
    for scale, step in ((1.0, 0.0), (60.0, 0.0), (2.0, 0.5)):
        x = generator.standard_normal((tokens, experts)).astype(np.float32) * np.float32(scale)
        x = np.round(x / step).astype(np.float32) * np.float32(step) if step else x
        logits, chosen, weights = session.run(None, {"x": x})
        np.testing.assert_array_equal(logits, x)
        every = {**attributes, "routed_scaling_factor": factor}
        result = compare_choices(gate, (x, *further), every, chosen, weights, slack=2e-6, tolerance=1e-6 * factor)
        assert result.fault is None
        assert len(result.near_ties) <= tokens * 1e-3
        if step and correction is None:  # equal logits are no near ties but ties: the lower index, in its order
            expected, _ = list_gates()[gate].reference(x, **every)
            np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize(("gate", "experts", "attributes", "factor"), GATES)
def test_a_logit_that_is_no_number_makes_every_weight_nan(
    gate: str, experts: int, attributes: dict[str, int], factor: float, library: Path
) -> None:
    generator = np.random.default_rng(1)
    correction = np.zeros(experts, np.float32) if gate == "SigmoidTopKGate" else None
    options = {"correction": correction, "outputs": ("logits", "experts", "weights")}
    session = open_model(router_model(gate, experts, experts, attributes, factor, **options), library)
    x = generator.standard_normal((9, experts)).astype(np.float32)
    clean = session.run(None, {"x": x})
    spoiled = x.copy()
    spoiled[2, 1] = np.nan
    _, chosen, weights = session.run(None, {"x": spoiled})
    assert np.isnan(weights[2]).all()
    assert ((chosen >= 0) & (chosen < experts)).all()
    for before, after in zip(clean[1:], (chosen, weights), strict=True):
        np.testing.assert_array_equal(np.delete(after, 2, axis=0), np.delete(before, 2, axis=0))


@pytest.mark.parametrize(("experts", "width"), [(8, 48), (70, 640), (160, 100)])
def test_routers_equal_the_reference_on_every_path(
    experts: int, width: int, forms: list[tuple[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(width)
    matrix = generator.standard_normal((experts, width)).astype(np.float32) / np.float32(np.sqrt(width))
    bias, weight = (generator.standard_normal(count).astype(np.float32) for count in (experts, width))
    attributes = {"top_k": 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1}
    given = {"matrix": matrix, "bias": bias, "norm": weight}
    model = router_model("SoftmaxTopKGate", experts, width, attributes, 1.0, **given)
    feed = {name: generator.standard_normal((140, width), np.float32) for name in ("x", "residual")}
    logits, chosen, weights, total, normed = run_everywhere(model, forms, feed, monkeypatch)
    np.testing.assert_array_equal(total, feed["x"] + feed["residual"])
    np.testing.assert_allclose(normed, normalize(total, weight), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(logits, normed.astype(np.float64) @ matrix.T + bias, rtol=0, atol=1e-5)
    every = {**attributes, "routed_scaling_factor": 1.0}
    result = compare_choices("SoftmaxTopKGate", (logits,), every, chosen, weights)
    assert result.fault is None


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("Projections", {"norm": np.ones(31, np.float32)}),
        ("Projections", {"m0": np.zeros((4, 15), np.uint8)}),
        ("Projections", {"m0.scales": np.zeros((4, 3), np.float32)}),
        ("Projections", {"m0.bias": np.zeros(5, np.float32)}),
        ("Mlp", {"up": np.zeros((6, 16), np.uint8)}),
        ("Mlp", {"down.scales": np.zeros((32, 3), np.float32)}),
        ("Mlp", {"addend": np.zeros((2, 31), np.float32)}),
        ("Mlp", {"share": np.zeros((2, 32), np.float32)}),
        ("Router", {"matrix": np.zeros((8, 31), np.float32)}),
        ("Router", {"correction": np.zeros(7, np.float32)}),
        ("Router", {"matrix": np.zeros((3, 32), np.float32)}),
    ],
)
def test_inputs_that_do_not_fit_are_refused(op: str, change: dict[str, Array], library: Path) -> None:
    generator = np.random.default_rng(0)
    constants: dict[str, Array | None] = {"norm": np.ones(32, np.float32)}
    attributes: dict[str, Any] = {"bits": 4}
    if op == "Projections":
        constants |= operands(make_stack(generator, (1, 4, 32), 16, 4, bias=True), "m0")
    elif op == "Mlp":
        constants |= operands(make_stack(generator, (1, 64, 32), 16, 4), "up", bias=False)
        constants |= operands(make_stack(generator, (1, 32, 32), 16, 4), "down", bias=False)
        constants |= {"addend": None, "share": None}
    else:
        constants |= {"matrix": np.zeros((8, 32), np.float32), "bias": None, "correction": None}
        attributes = {"sigmoid": 0, "top_k": 4, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1}
    outputs = {"logits": FLOAT, "experts": INT64, "weights": FLOAT} if op == "Router" else {"y": FLOAT}
    x = np.zeros((2, 32), np.float32)

    def run(held: dict[str, Array | None]) -> None:
        open_model(step_model(op, held, outputs, **attributes), library).run(None, {"x": x, "residual": x})

    run(constants)
    with pytest.raises(Exception, match=f"moedge.cpu.{op}: the inputs' shapes do not fit each other"):
        run(constants | change)


def test_gates_that_contradict_themselves_are_refused(library: Path) -> None:
    for name, value in (("top_k", 0), ("n_group", 0), ("topk_group", 3)):
        attributes = {"top_k": 2, "n_group": 2, "topk_group": 1, "norm_topk_prob": 1, name: value}
        with pytest.raises(Exception, match="moedge.cpu.Router: top_k, n_group and topk_group contradict each other"):
            open_model(router_model("SoftmaxTopKGate", 8, 8, attributes, 1.0), library)
