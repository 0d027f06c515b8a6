"""Gates: numpy reference, function body and lowered form against transformers' router."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.export.gating import list_gates, sigmoid_topk
from moedge.profiles.targets._canonical import Rewriter

# (experts, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor)
CASES = [
    (8, 2, 2, 1, 1, 1.5),
    (256, 8, 8, 4, 1, 2.5),
    (7, 3, 1, 1, 0, 1.0),
    (5, 5, 1, 1, 1, 1.0),
    (12, 1, 4, 2, 1, 1.0),
    (60, 6, 30, 11, 1, 16.0),
]


def attributes_of(case: tuple[int, int, int, int, int, float]) -> dict[str, Any]:
    return dict(zip(sigmoid_topk.ATTRIBUTES, case[1:], strict=True))


def function_model(attributes: dict[str, Any]) -> onnx.ModelProto:
    names = ["logits", "bias"], ["experts", "weights"]
    node = helper.make_node("SigmoidTopKGate", *names, domain="moedge", **attributes)
    return gate_model([node], [onnx.parser.parse_function(sigmoid_topk.FUNCTION)])


def gate_model(nodes: list[Any], functions: list[Any]) -> onnx.ModelProto:
    inputs = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", "E"]),
        helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["E"]),
    ]
    outputs = [
        helper.make_tensor_value_info("experts", TensorProto.INT64, ["T", "k"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", "k"]),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    graph = helper.make_graph(nodes, "gate", inputs, outputs)
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)


def lowered_model(attributes: dict[str, Any]) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(function_model(attributes))
    rewriter = Rewriter(model)
    (call,) = [node for node in model.graph if node.domain == "moedge"]
    rewriter.replace(call, sigmoid_topk.lower(rewriter, call.inputs, attributes))
    return ir.to_proto(model)


def run(model: onnx.ModelProto, logits: Any, bias: Any) -> tuple[Any, Any]:
    experts, weights = ort.InferenceSession(model.SerializeToString()).run(None, {"logits": logits, "bias": bias})
    return experts, weights


def by_expert(experts: Any, weights: Any) -> tuple[Any, Any]:
    """Sorted by expert: the order of a token's choices means nothing."""
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_choices_and_weights_equal_transformers(case: tuple[int, int, int, int, int, float]) -> None:
    import torch
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, top_k, groups, kept, norm, factor = case
    config = DeepseekV3Config(
        hidden_size=experts,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=bool(norm),
        routed_scaling_factor=factor,
    )
    router = DeepseekV3TopkRouter(config)
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((20_000, experts)).astype(np.float32)
    # From -0.2: a bias below every score is where experts outside the chosen groups may come in.
    bias = rng.uniform(-0.2, 0.3, experts).astype(np.float32)
    router.weight.data = torch.eye(experts)
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    with torch.no_grad():
        theirs = by_expert(*(output.numpy() for output in router(torch.tensor(logits))))
    attributes = attributes_of(case)
    ways = {
        "reference": sigmoid_topk.reference(logits, bias, **attributes),
        "function": run(function_model(attributes), logits, bias),
        "lowered": run(lowered_model(attributes), logits, bias),
    }
    for name, ours in ways.items():
        chosen, weights = by_expert(*ours)
        # Sigmoids differ in the last bit between libraries: a choice may differ only where scores are that close.
        same = (chosen == theirs[0]).all(axis=-1)
        assert same.mean() > 0.9995, name
        np.testing.assert_allclose(weights[same], theirs[1][same], rtol=1e-6, atol=1e-6 * factor, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ties_go_to_the_lower_index_everywhere(case: tuple[int, int, int, int, int, float]) -> None:
    attributes = attributes_of(case)
    rng = np.random.default_rng(1)
    logits = rng.integers(-1, 2, (500, case[0])).astype(np.float32)  # three values: ties in every row
    bias = np.zeros(case[0], np.float32)
    expected = sigmoid_topk.reference(logits, bias, **attributes)
    evaluated = ReferenceEvaluator(function_model(attributes)).run(None, {"logits": logits, "bias": bias})
    for experts, weights in (
        run(function_model(attributes), logits, bias),
        run(lowered_model(attributes), logits, bias),
        tuple(evaluated),
    ):
        np.testing.assert_array_equal(experts, expected[0])
        np.testing.assert_allclose(weights, expected[1], rtol=1e-5)


def test_full_checker_takes_the_function() -> None:
    onnx.checker.check_model(function_model(attributes_of(CASES[0])), full_check=True)


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        ((8, 9, 1, 1, 1, 1.0), "num_experts_per_tok 9 exceeds the 8 experts"),
        ((8, 2, 3, 1, 1, 1.0), "n_group 3 does not divide the 8 experts"),
        ((8, 2, 2, 3, 1, 1.0), "topk_group 3 exceeds n_group 2"),
        ((8, 3, 4, 1, 1, 1.0), "1 groups of 2 experts hold fewer than num_experts_per_tok 3"),
    ],
)
def test_contradicting_attributes_are_named_with_both_figures(case: Any, fault: str) -> None:
    assert sigmoid_topk.find_fault(attributes_of(case), case[0]) == fault


def test_gates_are_found_by_their_op() -> None:
    assert list_gates()["SigmoidTopKGate"].OP == "SigmoidTopKGate"
