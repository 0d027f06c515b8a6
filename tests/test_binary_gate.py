"""The gate over sign bits against scoring every code by brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.export.gating import binary_code, list_gates
from moedge.export.gating._flips import count_preceding, list_flips
from moedge.profiles.targets._canonical import Rewriter

# (bits, top_k)
CASES = [(10, 4), (10, 8), (10, 1), (8, 20), (6, 64), (5, 3), (3, 8), (2, 4), (1, 2), (1, 1)]


def make_attributes(bits: int, top_k: int, norm: int = 1, factor: float = 1.5) -> dict[str, Any]:
    return dict(zip(binary_code.ATTRIBUTES, (top_k, bits, norm, factor), strict=True))


def function_model(attributes: dict[str, Any]) -> onnx.ModelProto:
    node = helper.make_node("BinaryCodeGate", ["logits"], ["experts", "weights"], domain="moedge", **attributes)
    inputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", attributes["bits"]])]
    outputs = [
        helper.make_tensor_value_info("experts", TensorProto.INT64, ["T", "k"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", "k"]),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    functions = [onnx.parser.parse_function(binary_code.FUNCTION)]
    graph = helper.make_graph([node], "gate", inputs, outputs)
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)


def lowered_model(attributes: dict[str, Any]) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(function_model(attributes))
    rewriter = Rewriter(model)
    (call,) = [node for node in model.graph if node.domain == "moedge"]
    rewriter.replace(call, binary_code.lower(rewriter, call.inputs, attributes))
    return ir.to_proto(model)


def run(model: onnx.ModelProto, logits: Any) -> tuple[Any, Any]:
    experts, weights = ort.InferenceSession(model.SerializeToString()).run(None, {"logits": logits})
    return experts, weights


def run_all_ways(logits: Any, attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    evaluated = ReferenceEvaluator(function_model(attributes)).run(None, {"logits": logits[:50]})
    again = binary_code.reference(logits[:50], **attributes)
    np.testing.assert_array_equal(evaluated[0], again[0])
    np.testing.assert_allclose(evaluated[1], again[1], rtol=1e-5)
    return {
        "reference": binary_code.reference(logits, **attributes),
        "function": run(function_model(attributes), logits),
        "lowered": run(lowered_model(attributes), logits),
    }


def score_all_codes(logits: Any, bits: int) -> Any:
    """log of the product of every code's probabilities, float64 [T, 2^bits]."""
    codes = (np.arange(1 << bits)[:, None] >> np.arange(bits)) & 1
    wide = logits.astype(np.float64)
    return -np.logaddexp(0, -wide) @ codes.T - np.logaddexp(0, wide) @ (1 - codes).T


@pytest.mark.parametrize("norm", [0, 1])
@pytest.mark.parametrize(("bits", "top_k"), CASES)
def test_choices_and_weights_equal_scoring_every_code(bits: int, top_k: int, norm: int) -> None:
    logits = np.random.default_rng(bits).standard_normal((2_000, bits)).astype(np.float32)
    scores = score_all_codes(logits, bits)
    expected = np.argsort(-scores, axis=-1, kind="stable")[:, :top_k]
    shares = np.exp(np.take_along_axis(scores, expected, 1))
    shares = 1.5 * (shares / shares.sum(axis=1, keepdims=True) if norm else shares)
    for way, (experts, weights) in run_all_ways(logits, make_attributes(bits, top_k, norm)).items():
        np.testing.assert_array_equal(experts, expected, err_msg=way)
        np.testing.assert_allclose(weights, shares, rtol=1e-5, err_msg=way)
        assert experts.dtype == np.int64 and weights.dtype == np.float32


def test_a_hundred_thousand_tokens_choose_exactly_the_four_best_of_1024() -> None:
    attributes = make_attributes(10, 4)
    rng = np.random.default_rng(3)
    function = ort.InferenceSession(function_model(attributes).SerializeToString())
    lowered = ort.InferenceSession(lowered_model(attributes).SerializeToString())
    for _ in range(25):
        logits = (rng.standard_normal((4_000, 10)) * 4).astype(np.float32)
        scores = score_all_codes(logits, 10)
        best = np.argpartition(-scores, 4, axis=1)[:, :4]
        order = np.argsort(-np.take_along_axis(scores, best, 1), axis=1, kind="stable")
        expected = np.take_along_axis(best, order, 1)
        np.testing.assert_array_equal(binary_code.reference(logits, **attributes)[0], expected)
        np.testing.assert_array_equal(function.run(["experts"], {"logits": logits})[0], expected)
        np.testing.assert_array_equal(lowered.run(["experts"], {"logits": logits})[0], expected)


@pytest.mark.parametrize(("bits", "top_k"), CASES)
def test_ties_go_to_the_lower_index_everywhere(bits: int, top_k: int) -> None:
    """Whole numbers, zeros among them: costs are exact, most sets of flips tie."""
    logits = np.random.default_rng(top_k).integers(-2, 3, (1_000, bits)).astype(np.float32)
    logits[0] = 0
    logits[1] = -0.0
    codes = (np.arange(1 << bits)[:, None] >> np.arange(bits)) & 1
    costs = (np.abs(logits)[:, None] * (codes != (logits > 0)[:, None])).sum(axis=-1)
    expected = np.argsort(costs, axis=-1, kind="stable")[:, :top_k]
    for way, (experts, _) in run_all_ways(logits, make_attributes(bits, top_k)).items():
        np.testing.assert_array_equal(experts, expected, err_msg=way)
        np.testing.assert_array_equal(experts[:2], [np.arange(top_k)] * 2, err_msg=way)


def test_preceding_sets_are_counted_as_by_enumeration() -> None:
    ranks = range(7, 0, -1)
    every = [flips for size in range(8) for flips in itertools.combinations(ranks, size)]
    for flips in every:
        preceding = [other for other in every if len(other) <= len(flips) and not _exceeds(other, flips)]
        assert count_preceding(flips) == len(preceding), flips


def _exceeds(other: tuple[int, ...], flips: tuple[int, ...]) -> bool:
    return any(a > b for a, b in zip(other, flips, strict=False))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 8, 16, 31])
def test_no_cheapest_set_is_missing_from_the_candidates(top_k: int) -> None:
    """All 2^9 sets of flips under costs of many shapes: the k cheapest are candidates."""
    every = [flips for size in range(10) for flips in itertools.combinations(range(9, 0, -1), size)]
    member = np.array([[rank in flips for rank in range(1, 10)] for flips in every], np.float64)
    candidates = set(list_flips(top_k, 9))
    rng = np.random.default_rng(top_k)
    for power in (0.1, 0.5, 1, 2, 6):
        costs = np.sort(rng.random((200, 9)) ** power, axis=1)
        for row in np.argpartition(costs @ member.T, top_k, axis=1)[:, :top_k]:
            assert {every[place] for place in row} <= candidates
    assert list_flips(4, 10) == ((), (1,), (2,), (2, 1), (3,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_gives_no_weight_but_nan(bad: float) -> None:
    logits = np.ones((3, 10), np.float32)
    logits[1, 7] = bad
    attributes = make_attributes(10, 4)
    ways = [binary_code.reference(logits, **attributes), run(function_model(attributes), logits)]
    for experts, weights in [*ways, run(lowered_model(attributes), logits)]:
        assert np.isnan(weights[1]).all() and np.isfinite(weights[[0, 2]]).all()
        assert ((experts >= 0) & (experts < 1024)).all()


def test_full_checker_takes_the_function_and_its_lowered_form() -> None:
    onnx.checker.check_model(function_model(make_attributes(10, 4)), full_check=True)
    onnx.checker.check_model(lowered_model(make_attributes(10, 4)), full_check=True)


@pytest.mark.parametrize(
    ("bits", "top_k", "experts", "fault"),
    [
        (6, 2, 60, "60 experts are not the 64 that codes of 6 bits name"),
        (3, 9, 8, "num_experts_per_tok 9 exceeds the 8 experts"),
        (10, 65, 1024, "num_experts_per_tok 65 is not between 1 and 64"),
        (3, 0, 8, "num_experts_per_tok 0 is not between 1 and 64"),
        (25, 2, 1 << 25, "bits 25 is not between 1 and 24"),
        (0, 1, 1, "bits 0 is not between 1 and 24"),
        (10, 4, 1024, None),
    ],
)
def test_contradicting_attributes_are_named_with_both_figures(
    bits: int, top_k: int, experts: int, fault: str | None
) -> None:
    assert binary_code.find_fault(make_attributes(bits, top_k), experts) == fault


def test_the_gate_is_found_by_its_op() -> None:
    assert list_gates()["BinaryCodeGate"].OP == "BinaryCodeGate"
    assert [binary_code.count_bits(experts) for experts in (2, 60, 64, 65, 1024)] == [1, 6, 6, 7, 10]
