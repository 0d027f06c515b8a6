"""`Moe`, a layer's mixture of experts as one op: the bits of `Router`, `Experts` and `Mlp` one behind the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kernel_cases import Stack, make_stack, open_model
from onnx import helper, numpy_helper
from test_steps import EPSILON, FLOAT, INT64, Array, operands, run_everywhere

from moedge.runtime import kernels

Constants = dict[str, Array | None]  # by name; None is left out

TOKENS = 70
ROUTES = {"logits": FLOAT, "experts": INT64, "weights": FLOAT, "sum": FLOAT, "normed": FLOAT}
SOFTMAX = {"sigmoid": 0, "n_group": 1, "topk_group": 1, "norm_topk_prob": 1, "routed_scaling_factor": 1.0}
SIGMOID = {"sigmoid": 1, "n_group": 4, "topk_group": 2, "norm_topk_prob": 1, "routed_scaling_factor": 2.5}
# Gate, experts, top_k, hidden, inner, group, bits; bits of what is shared (0: nothing is) and its inner width; options.
# Odd on purpose: widths of no whole tile, one choice, all of them, other codes in what is shared than in the experts.
CASES = [
    (SOFTMAX, 6, 2, 256, 640, 128, 4, 4, 384, {"norm", "residual"}),
    (SIGMOID, 8, 3, 48, 80, 16, 4, 8, 48, {"norm", "residual", "zeros", "correction"}),
    (SOFTMAX, 5, 5, 128, 96, 32, 8, 4, 160, {"norm", "share", "logits_bias"}),
    (SOFTMAX, 70, 1, 128, 64, 64, 4, 4, 192, {"norm", "residual", "share"}),
    (SOFTMAX, 9, 4, 1056, 32, 32, 4, 0, 0, {"norm", "residual", "biases"}),
    (SIGMOID, 4, 2, 64, 64, 64, 8, 0, 0, set()),
]


def stacks(generator: np.random.Generator, case: Any) -> tuple[list[Stack], list[Stack]]:
    _, experts, _, hidden, inner, group, bits, shared_bits, shared_inner, options = case
    given = {"zero_points": "zeros" in options, "bias": "biases" in options}
    routed = [
        make_stack(generator, shape, group, bits, **given)
        for shape in ((experts, 2 * inner, hidden), (experts, hidden, inner))
    ]
    shapes = ((1, 2 * shared_inner, hidden), (1, hidden, shared_inner))
    shared = [make_stack(generator, shape, group, shared_bits) for shape in shapes] if shared_bits else []
    return routed, shared


def constants_of(case: Any, seed: int) -> tuple[Constants, Constants, Constants]:
    """What the router reads after x and residual, the experts, and what is shared."""
    experts, hidden, options = case[1], case[3], case[9]
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((experts, hidden), np.float32) / np.float32(np.sqrt(hidden))
    vectors = {"norm": hidden, "logits_bias": experts, "correction": experts}
    found = {name: generator.random(count, np.float32) for name, count in vectors.items()}
    norm, bias, correction = (found[name] if name in options else None for name in vectors)
    router = {"norm": norm, "matrix": matrix, "logits_bias": bias, "correction": correction}
    (up, down), shared = stacks(generator, case)
    routed: Constants = {}
    for name, stack in (("up", up), ("down", down)):
        routed |= {name: stack.packed(stack.codes), f"{name}.scales": stack.scales}
    for name, stack in (("up", up), ("down", down)):
        routed[f"{name}.zeros"] = None if stack.zero_points is None else stack.packed(stack.zero_points)
    routed |= {f"{name}.bias": stack.bias for name, stack in (("up", up), ("down", down))}
    own: Constants = {}
    for name, stack in zip(("shared.up", "shared.down"), shared, strict=False):
        own |= operands(stack, name, bias=False)
    if own:
        own["share"] = generator.standard_normal((1, hidden), np.float32) if "share" in options else None
    return router, routed, own


def model_of(nodes: list[Any], outputs: dict[str, int], constants: Constants, residual: bool) -> bytes:
    inputs = [helper.make_tensor_value_info(name, FLOAT, None) for name in ["x", "residual"][: 1 + residual]]
    given = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    held = [numpy_helper.from_array(np.ascontiguousarray(v), name) for name, v in constants.items() if v is not None]
    graph = helper.make_graph(nodes, "layer", inputs, given, held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(kernels.DOMAIN, 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


def names(constants: Constants) -> list[str]:
    return [name if held is not None else "" for name, held in constants.items()]


def attributes_of(case: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    gate, _, top_k, *_, bits, shared_bits, _, options = case
    form = {"alpha": 1.702, "limit": 7.0, "offset": 1.0} if "biases" in options else {}
    return {**gate, "top_k": top_k, "epsilon": EPSILON}, {"bits": bits, **form}


def separate_model(case: Any, seed: int) -> bytes:
    router, routed, own = constants_of(case, seed)
    gate, form = attributes_of(case)
    residual = "residual" in case[9]
    routes = [*list(ROUTES)[:3], "sum" if residual else "", "normed" if "norm" in case[9] else ""]
    first = ["x", "residual" if residual else "", *names(router)]
    x = "normed" if "norm" in case[9] else "sum" if residual else "x"
    second = [x, "experts", "weights", *names(routed)]
    nodes = [
        helper.make_node("Router", first, routes, domain=kernels.DOMAIN, **gate),
        helper.make_node("Experts", second, ["mixed" if own else "y"], domain=kernels.DOMAIN, **form),
    ]
    if own:
        matrices = names(own)
        inputs = [x, "", "", *matrices[:-1], "mixed", matrices[-1]]
        nodes.append(helper.make_node("Mlp", inputs, ["y"], domain=kernels.DOMAIN, bits=case[7]))
    outputs = {name: kind for name, kind in ROUTES.items() if name in routes} | {"y": FLOAT}
    return model_of(nodes, outputs, router | routed | own, residual)


def moe_model(case: Any, seed: int, left_out: tuple[str, ...] = (), **changes: Array) -> bytes:
    router, routed, own = constants_of(case, seed)
    gate, form = attributes_of(case)
    residual = "residual" in case[9]
    missing = {*left_out, *(name for name, needs in (("sum", "residual"), ("normed", "norm")) if needs not in case[9])}
    kept = {name: kind for name, kind in ROUTES.items() if name not in missing}
    outputs = [name if name in kept else "" for name in ROUTES]
    inputs = ["x", "residual" if residual else "", *names(router), *names(routed), *names(own)]
    node = helper.make_node(
        "Moe", inputs, [*outputs, "y"], domain=kernels.DOMAIN, shared_bits=case[7] or case[6], **gate, **form
    )
    return model_of([node], kept | {"y": FLOAT}, router | routed | own | changes, residual)


@pytest.mark.parametrize("case", CASES)
def test_it_has_the_bits_of_its_parts(
    case: Any, forms: list[tuple[str, Path]], library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(case[3])
    feed = {"x": generator.standard_normal((TOKENS, case[3]), np.float32)}
    if "residual" in case[9]:
        feed["residual"] = generator.standard_normal((TOKENS, case[3]), np.float32)
    expected = open_model(separate_model(case, 5), library).run(None, feed)
    (y,) = open_model(moe_model(case, 5, tuple(ROUTES)), library).run(None, feed)  # what nobody reads is left out
    found = run_everywhere(moe_model(case, 5), forms, feed, monkeypatch)
    assert np.abs(y).max() > 0
    for wanted, given in zip([*expected, expected[-1]], [*found, y], strict=True):
        np.testing.assert_array_equal(given, wanted)


def test_a_token_that_is_no_number_spoils_no_other(library: Path) -> None:
    case = CASES[0]
    generator = np.random.default_rng(3)
    feed = {name: generator.standard_normal((9, case[3]), np.float32) for name in ("x", "residual")}
    session = open_model(moe_model(case, 1), library)
    clean = session.run(None, feed)
    feed["x"][4, 1] = np.nan
    *_, y = spoiled = session.run(None, feed)
    assert np.isnan(y[4]).all() and np.isnan(spoiled[2][4]).all()
    for before, after in zip(clean, spoiled, strict=True):
        np.testing.assert_array_equal(np.delete(after, 4, axis=0), np.delete(before, 4, axis=0))


@pytest.mark.parametrize(
    "change",
    [
        {"matrix": np.zeros((5, 256), np.float32)},
        {"norm": np.zeros(255, np.float32)},
        {"up": np.zeros((6, 1280, 127), np.uint8)},
        {"down": np.zeros((5, 256, 320), np.uint8)},
        {"down.scales": np.zeros((6, 256, 4), np.float32)},
        {"shared.up": np.zeros((767, 128), np.uint8)},
        {"shared.down": np.zeros((255, 192), np.uint8)},
        {"shared.down.scales": np.zeros((256, 2), np.float32)},
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Array], library: Path) -> None:
    x = np.zeros((2, 256), np.float32)
    session = open_model(moe_model(CASES[0], 1, **change), library)
    with pytest.raises(Exception, match=r"moedge.cpu.Moe: the inputs' shapes do not fit each other"):
        session.run(None, {"x": x, "residual": x})
