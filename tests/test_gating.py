"""Gates: numpy reference, function body and lowered form against transformers' routers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.errors import UsageError
from moedge.export.gating import list_gates
from moedge.profiles.targets._canonical import Rewriter

Array = np.ndarray[Any, Any]
Choices = tuple[Array, Array]
GROUPED = ("top_k", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")
# Experts, then the attributes in their order. Odd on purpose: counts that divide by nothing, one choice, all choices.
CASES: dict[str, list[tuple[Any, ...]]] = {
    "SigmoidTopKGate": [
        (8, 2, 2, 1, 1, 1.5),
        (256, 8, 8, 4, 1, 2.5),
        (7, 3, 1, 1, 0, 1.0),
        (5, 5, 1, 1, 1, 1.0),
        (12, 1, 4, 2, 1, 1.0),
        (60, 6, 30, 11, 1, 16.0),
    ],
    "SoftmaxTopKGate": [
        (8, 2, 1, 1, 1, 1.0),
        (64, 6, 1, 1, 0, 1.0),
        (7, 3, 1, 1, 0, 2.5),
        (5, 5, 1, 1, 1, 1.0),
        (6, 1, 1, 1, 0, 1.0),
        (160, 6, 8, 3, 0, 16.0),
        (12, 3, 6, 2, 1, 1.0),
        (9, 2, 9, 3, 0, 1.0),
    ],
    "SparseMixerGate": [(16, 2, 0.01), (7, 2, 0.2), (2, 2, 0.01), (5, 2, 0.0)],
}
ALL = [(op, case) for op, cases in CASES.items() for case in cases]


def attributes_of(op: str, case: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(list_gates()[op].ATTRIBUTES, case[1:], strict=True))


def function_model(op: str, attributes: dict[str, Any]) -> onnx.ModelProto:
    function = onnx.parser.parse_function(list_gates()[op].FUNCTION)
    node = helper.make_node(op, function.input, ["experts", "weights"], domain="moedge", **attributes)
    shapes = {"logits": ["T", "E"], "bias": ["E"]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in function.input]
    outputs = [
        helper.make_tensor_value_info("experts", TensorProto.INT64, ["T", "k"]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["T", "k"]),
    ]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    graph = helper.make_graph([node], "gate", inputs, outputs)
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=11)


def lowered_model(op: str, attributes: dict[str, Any]) -> onnx.ModelProto:
    model = ir.serde.deserialize_model(function_model(op, attributes))
    rewriter = Rewriter(model)
    (call,) = [node for node in model.graph if node.domain == "moedge"]
    rewriter.replace(call, list_gates()[op].lower(rewriter, call.inputs, attributes))
    return ir.to_proto(model)


def run(model: onnx.ModelProto, inputs: dict[str, Array]) -> Choices:
    experts, weights = ort.InferenceSession(model.SerializeToString()).run(None, inputs)
    return experts, weights


def every_way(op: str, attributes: dict[str, Any], inputs: dict[str, Array]) -> dict[str, Choices]:
    return {
        "reference": list_gates()[op].reference(*inputs.values(), **attributes),
        "function": run(function_model(op, attributes), inputs),
        "lowered": run(lowered_model(op, attributes), inputs),
    }


def by_expert(experts: Array, weights: Array) -> Choices:
    """Sorted by expert: the order of a token's choices means nothing."""
    order = np.argsort(experts, axis=-1)
    return np.take_along_axis(experts, order, -1), np.take_along_axis(weights, order, -1)


def draw_inputs(op: str, experts: int, tokens: int) -> dict[str, Array]:
    rng = np.random.default_rng(experts)
    inputs = {"logits": rng.standard_normal((tokens, experts)).astype(np.float32)}
    if op == "SigmoidTopKGate":
        # From -0.2: a bias below every score is where experts outside the chosen groups may come in.
        inputs["bias"] = rng.uniform(-0.2, 0.3, experts).astype(np.float32)
    return inputs


def assert_same_choices(ways: dict[str, Choices], theirs: Choices, scale: float = 1.0) -> None:
    theirs = by_expert(*theirs)
    for name, ours in ways.items():
        chosen, weights = by_expert(*ours)
        # Exponentials differ in the last bit between libraries: a choice may differ only where scores are that close.
        same = (chosen == theirs[0]).all(axis=-1)
        assert same.mean() > 0.9995, name
        np.testing.assert_allclose(weights[same], theirs[1][same], rtol=2e-6, atol=1e-6 * scale, err_msg=name)


def deepseek_v3_router(case: tuple[Any, ...], bias: Any) -> Callable[[Any], Any]:
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
    router.weight.data = torch.eye(experts)
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES["SigmoidTopKGate"], ids=str)
def test_sigmoid_gate_equals_deepseek_v3(case: tuple[Any, ...]) -> None:
    import torch

    inputs = draw_inputs("SigmoidTopKGate", case[0], 20_000)
    router = deepseek_v3_router(case, inputs["bias"])
    with torch.no_grad():
        chosen, weights = (output.numpy() for output in router(torch.tensor(inputs["logits"])))
    attributes = attributes_of("SigmoidTopKGate", case)
    assert_same_choices(every_way("SigmoidTopKGate", attributes, inputs), (chosen, weights), case[-1])


def deepseek_v2_router(case: tuple[Any, ...]) -> Callable[[Any], Any]:
    """transformers' gate, which never normalizes."""
    import torch
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MoEGate

    experts, top_k, groups, kept, _, factor = case
    config = DeepseekV2Config(
        hidden_size=experts,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=groups,
        topk_group=kept,
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        routed_scaling_factor=factor,
    )
    gate = DeepseekV2MoEGate(config)
    gate.weight.data = torch.eye(experts)
    return lambda logits: gate(logits[None])


def block_router(case: tuple[Any, ...], model_type: str) -> Callable[[Any], Any]:
    """The routing inside a sparse block of transformers, read off its output: each expert gives its unit vector."""
    import torch
    import transformers

    names = {
        "mixtral": ("Mixtral", "num_local_experts"),
        "olmoe": ("Olmoe", "num_experts"),
        "qwen3_moe": ("Qwen3Moe", "num_experts"),
    }
    prefix, count = names[model_type]
    module = __import__(f"transformers.models.{model_type}.modeling_{model_type}", fromlist=[""])
    experts, top_k, _, _, norm, _ = case
    settings = {"hidden_size": experts, "num_experts_per_tok": top_k, count: experts}
    if model_type != "mixtral":
        settings["norm_topk_prob"] = bool(norm)
    block = getattr(module, f"{prefix}SparseMoeBlock")(getattr(transformers, f"{prefix}Config")(**settings))
    block.gate.weight.data = torch.eye(experts)

    class Unit(torch.nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.row = torch.eye(experts)[place]

        def forward(self, x: Any) -> Any:
            return self.row.expand(len(x), -1)

    block.experts = torch.nn.ModuleList(Unit(place) for place in range(experts))

    def route(logits: Any) -> Any:
        weights, chosen = torch.topk(block(logits[None])[0].reshape(-1, experts), top_k, dim=-1)
        return chosen, weights

    return route


@pytest.mark.parametrize("case", CASES["SoftmaxTopKGate"], ids=str)
def test_softmax_gate_equals_transformers(case: tuple[Any, ...]) -> None:
    import torch

    experts, _, groups, _, norm, factor = case
    routers: list[Callable[[Any], Any]] = []
    if not norm:
        routers.append(deepseek_v2_router(case))
    if groups == 1 and factor == 1:
        routers.append(block_router(case, "qwen3_moe"))
        if norm:
            routers.append(block_router(case, "mixtral"))
    inputs = draw_inputs("SoftmaxTopKGate", experts, 4_000)
    ways = every_way("SoftmaxTopKGate", attributes_of("SoftmaxTopKGate", case), inputs)
    with torch.no_grad():
        results = [[output.numpy() for output in router(torch.tensor(inputs["logits"]))] for router in routers]
    assert results or (norm and groups > 1)  # groups and normalization together: no class of transformers has both
    for chosen, weights in results:
        assert_same_choices(ways, (chosen, weights), factor)
    assert_same_choices(ways, ways["reference"], factor)


@pytest.mark.parametrize("case", CASES["SparseMixerGate"], ids=str)
def test_sparse_mixer_equals_transformers(case: tuple[Any, ...]) -> None:
    import torch
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    experts, _, jitter = case
    # Wide and narrow: near ties are where neighbours share the weight.
    for scale in (0.05, 1.0, 60.0):
        inputs = {"logits": draw_inputs("SparseMixerGate", experts, 4_000)["logits"] * np.float32(scale)}
        weights, chosen = (output.numpy() for output in sparsemixer(torch.tensor(inputs["logits"]), jitter, False))
        ways = every_way("SparseMixerGate", attributes_of("SparseMixerGate", case), inputs)
        for name, (ours, our_weights) in ways.items():
            # Whether a logit is near is a comparison, which rounding may turn over.
            same = (ours == chosen).all(axis=-1) & np.isclose(our_weights, weights, rtol=1e-5).all(axis=-1)
            assert same.mean() > 0.999, (name, scale)


@pytest.mark.parametrize(("op", "case"), ALL, ids=str)
def test_ties_go_to_the_lower_index_everywhere(op: str, case: tuple[Any, ...]) -> None:
    attributes = attributes_of(op, case)
    rng = np.random.default_rng(1)
    inputs = {"logits": rng.integers(-1, 2, (500, case[0])).astype(np.float32)}  # three values: ties in every row
    if op == "SigmoidTopKGate":
        inputs["bias"] = np.zeros(case[0], np.float32)
    expected = list_gates()[op].reference(*inputs.values(), **attributes)
    ways = every_way(op, attributes, inputs)
    ways["evaluator"] = tuple(ReferenceEvaluator(function_model(op, attributes)).run(None, inputs))
    for name, (experts, weights) in ways.items():
        np.testing.assert_array_equal(experts, expected[0], err_msg=name)
        np.testing.assert_allclose(weights, expected[1], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("op", CASES)
def test_full_checker_takes_the_function(op: str) -> None:
    onnx.checker.check_model(function_model(op, attributes_of(op, CASES[op][0])), full_check=True)


FAULTS = [
    ((8, 9, 1, 1, 1, 1.0), "num_experts_per_tok 9 exceeds the 8 experts"),
    ((8, 0, 1, 1, 1, 1.0), "num_experts_per_tok 0 is not between 1 and the 8 experts"),
    ((8, 2, 3, 1, 1, 1.0), "n_group 3 does not divide the 8 experts"),
    ((8, 2, 0, 1, 1, 1.0), "n_group 0 is not between 1 and the 8 experts"),
    ((8, 2, 2, 3, 1, 1.0), "topk_group 3 exceeds n_group 2"),
    ((8, 2, 2, -1, 1, 1.0), "topk_group -1 is not between 1 and n_group 2"),
    ((8, 3, 4, 1, 1, 1.0), "1 groups of 2 experts hold fewer than num_experts_per_tok 3"),
]


@pytest.mark.parametrize("op", ["SigmoidTopKGate", "SoftmaxTopKGate"])
@pytest.mark.parametrize(("case", "fault"), FAULTS)
def test_contradicting_attributes_are_named_with_both_figures(op: str, case: Any, fault: str) -> None:
    attributes = dict(zip(GROUPED, case[1:], strict=True))
    assert list_gates()[op].find_fault(attributes, case[0]) == fault
    inputs = draw_inputs(op, 8, 3)
    with pytest.raises(UsageError) as caught:
        list_gates()[op].reference(*inputs.values(), **attributes)
    assert str(caught.value) == f"moedge.{op}: {fault}"


@pytest.mark.parametrize("op", ["SigmoidTopKGate", "SoftmaxTopKGate"])
@pytest.mark.parametrize(("case", "fault"), FAULTS)
def test_torch_refuses_them_where_it_runs_and_where_it_traces(op: str, case: Any, fault: str) -> None:
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    from moedge.export import torch_ops

    with FakeTensorMode() as fake:
        traced = [fake.from_tensor(torch.tensor(each)) for each in draw_inputs(op, 8, 3).values()]
        with pytest.raises(UsageError, match=re.escape(f"moedge.{op}: {fault}")):
            torch_ops._OPS[op](*traced, *case[1:])
    with pytest.raises(UsageError, match=re.escape(f"moedge.{op}: {fault}")):
        torch_ops._OPS[op](*(torch.tensor(each) for each in draw_inputs(op, 8, 3).values()), *case[1:])


def test_other_gates_refuse_them_too() -> None:
    gates, logits = list_gates(), np.zeros((3, 8), np.float32)
    load = np.zeros(8, np.float32)
    aware = {"top_k": 2, "norm_topk_prob": 1, "routed_scaling_factor": 1.0, "penalty": 0.0, "decay": 1.0}
    binary = {"norm_topk_prob": 1, "routed_scaling_factor": 1.0}
    cases: list[tuple[str, list[Array], dict[str, Any], str]] = [
        (
            "LoadAwareGate",
            [logits, logits, load],
            {**aware, "capacity_factor": -1.5},
            "capacity_factor -1.5 is below 1: 8 experts would have room for -3 of the 2 choices of each token",
        ),
        (
            "LoadAwareGate",
            [logits, logits, load],
            {**aware, "top_k": 9, "capacity_factor": 1.0},
            "num_experts_per_tok 9 exceeds the 8 experts",
        ),
        ("BinaryCodeGate", [logits], {**binary, "top_k": 257, "bits": 8}, "num_experts_per_tok 257 exceeds the 256"),
        ("BinaryCodeGate", [logits], {**binary, "top_k": 2, "bits": 5}, "8 experts are not the 32 that codes of 5"),
        ("SparseMixerGate", [logits], {"top_k": 3, "jitter_eps": 0.01}, "num_experts_per_tok is 3, this gate choos"),
    ]
    for op, inputs, attributes, fault in cases:
        with pytest.raises(UsageError, match=re.escape(f"moedge.{op}: {fault}")):
            gates[op].reference(*inputs, **attributes)


def test_sparse_mixer_chooses_two() -> None:
    find_fault = list_gates()["SparseMixerGate"].find_fault
    assert find_fault({"top_k": 3, "jitter_eps": 0.01}, 16) == "num_experts_per_tok is 3, this gate chooses 2"
    assert find_fault({"top_k": 2, "jitter_eps": 0.01}, 1) == "num_experts_per_tok 2 exceeds the 1 experts"


def test_gates_are_found_by_their_op() -> None:
    assert set(CASES) <= set(list_gates())
    assert all(gate.OP == op for op, gate in list_gates().items())
