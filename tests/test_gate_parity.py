"""Every form of the top-k gates over 100,000 random tokens against the routers of transformers' own models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from test_gating import (
    GROUPED,
    block_router,
    by_expert,
    deepseek_v2_router,
    deepseek_v3_router,
    draw_inputs,
    every_way,
    function_model,
    lowered_model,
)

from moedge.export.gating import list_gates
from moedge.export.gating._compare import compare_choices
from moedge.profiles.targets._trt_check import open_plain_session

torch = pytest.importorskip("torch", reason="transformers' routers need torch")
TOKENS = 100_000
# Rounding of an exponential may decide where two scores lie closer than this share of the largest logit.
SLACK = 1e-6
MOST_TIES = 10
# The router, its gate, then experts, top_k, n_group, topk_group, norm_topk_prob, routed_scaling_factor.
CASES = [
    ("mixtral", "SoftmaxTopKGate", (8, 2, 1, 1, 1, 1.0)),
    ("olmoe", "SoftmaxTopKGate", (16, 8, 1, 1, 0, 1.0)),
    ("qwen3_moe", "SoftmaxTopKGate", (13, 4, 1, 1, 1, 1.0)),
    ("qwen3_moe", "SoftmaxTopKGate", (5, 5, 1, 1, 0, 1.0)),
    ("deepseek_v2", "SoftmaxTopKGate", (7, 1, 1, 1, 0, 2.5)),
    ("deepseek_v2", "SoftmaxTopKGate", (24, 6, 8, 3, 0, 16.0)),
    ("deepseek_v3", "SigmoidTopKGate", (16, 4, 8, 4, 1, 2.5)),
    ("deepseek_v3", "SigmoidTopKGate", (11, 11, 1, 1, 1, 1.0)),
    ("deepseek_v3", "SigmoidTopKGate", (9, 1, 3, 1, 0, 1.0)),
]


def route_theirs(family: str, case: tuple[Any, ...], inputs: dict[str, Any]) -> list[Any]:
    if family == "deepseek_v3":
        router = deepseek_v3_router(case, inputs["bias"])
    else:
        router = deepseek_v2_router(case) if family == "deepseek_v2" else block_router(case, family)
    with torch.no_grad():
        return [output.numpy() for output in router(torch.tensor(inputs["logits"]))]


def route_ours(op: str, attributes: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """By form: numpy, the function on onnxruntime and on onnx's evaluator, lowered for onnxruntime and, as TensorRT's
    network is checked, without onnxruntime's own rewriting; torch."""
    from moedge.export import torch_ops

    forms: dict[str, Any] = every_way(op, attributes, inputs)
    forms["evaluator"] = ReferenceEvaluator(function_model(op, attributes)).run(None, inputs)
    forms["network"] = open_plain_session(lowered_model(op, attributes).SerializeToString()).run(None, inputs)
    tensors = [torch.tensor(each) for each in inputs.values()]
    forms["torch"] = [each.numpy() for each in torch_ops._OPS[op](*tensors, *attributes.values())]
    return forms


@pytest.mark.parametrize(("family", "op", "case"), CASES, ids=str)
def test_the_same_experts_and_weights_as_transformers(family: str, op: str, case: tuple[Any, ...]) -> None:
    attributes = dict(zip(GROUPED, case[1:], strict=True))
    inputs = draw_inputs(op, case[0], TOKENS)
    theirs = route_theirs(family, case, inputs)
    forms = {"transformers": theirs, **route_ours(op, attributes, inputs)}
    expected, expected_weights = by_expert(*theirs)
    for name, (experts, weights) in forms.items():
        compared = compare_choices(op, [*inputs.values()], attributes, experts, weights, slack=SLACK, tolerance=1e-6)
        assert compared.fault is None and len(compared.near_ties) <= MOST_TIES, (name, compared)
        chosen, shares = by_expert(experts, weights)
        same = (chosen == expected).all(axis=1)
        assert (~same).sum() <= 2 * MOST_TIES, name
        np.testing.assert_allclose(
            shares[same] / case[5], expected_weights[same] / case[5], rtol=0, atol=1e-6, err_msg=name
        )


def test_exact_ties_go_to_the_lower_index_in_torch_and_without_rewriting_too() -> None:
    """The other forms: test_gating. Three values, so that every row ties; scores and sums of groups are exact."""
    for _, op, case in CASES:
        attributes = dict(zip(GROUPED, case[1:], strict=True))
        inputs = {"logits": np.random.default_rng(2).integers(-1, 2, (500, case[0])).astype(np.float32)}
        if op == "SigmoidTopKGate":
            inputs["bias"] = np.zeros(case[0], np.float32)
        expected = list_gates()[op].reference(*inputs.values(), **attributes)[0]
        for name, (experts, _) in route_ours(op, attributes, inputs).items():
            np.testing.assert_array_equal(experts, expected, err_msg=f"{name} {case}")
