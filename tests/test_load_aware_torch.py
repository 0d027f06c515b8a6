"""`torch.ops.moedge.load_aware_gate`: the reference's choices, gradients, and a graph that calls the function."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from test_load_aware import CASES, assert_same, make_attributes, make_scores
from torch import Tensor, nn

from moedge.errors import UsageError
from moedge.export import torch_ops
from moedge.export.gating import load_aware


def run(scores: Any, load: Any, attributes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.moedge.load_aware_gate(scores, scores, load, **attributes)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_and_numpy_choose_the_same(case: tuple[int, int, int, float]) -> None:
    tokens, count, top_k, factor = case
    attributes = make_attributes(top_k, factor, penalty=0.2, decay=0.97)
    for seed in range(6):
        scores = make_scores(tokens, count, (0, 0.5, 4)[seed % 3], seed)
        scores = np.round(scores * 4) / 4 if seed >= 3 else scores  # ties
        load = np.random.default_rng(seed).random(count).astype(np.float32) * 9
        found = run(torch.from_numpy(scores), torch.from_numpy(load), attributes)
        assert_same([each.numpy() for each in found], load_aware.reference(scores, scores, load, **attributes))


def test_gradients_reach_the_scores_and_torch_finds_no_fault() -> None:
    attributes = make_attributes(2, 1.0, penalty=0.1)
    scores = torch.from_numpy(make_scores(6, 5, 1)).double().requires_grad_()
    load = torch.ones(5)
    assert torch.autograd.gradcheck(lambda x: run(x, load, attributes)[1], scores)
    for dtype in (torch.float16, torch.bfloat16):
        assert [each.dtype for each in run(scores.to(dtype), load, attributes)[1:]] == [torch.float32] * 2
    arguments = (scores.detach().float(), scores.detach().float(), load)
    checks: Any = torch.library.opcheck(torch.ops.moedge.load_aware_gate.default, arguments, attributes)
    assert set(checks.values()) == {"SUCCESS"}
    bad = arguments[0].clone()
    bad[3, 1] = torch.nan
    assert run(bad, load, attributes)[1].isnan().any(dim=1).tolist() == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"top_k": 6}, "num_experts_per_tok 6 exceeds the 5 experts"),
        ({"capacity_factor": -1.0}, "capacity_factor -1 is below 1: 5 experts would have room for -2 of the 2 choices"),
        ({"penalty": -1.0}, "penalty -1 is below 0"),
        ({"decay": 1.5}, "decay 1.5 is not between 0 and 1"),
    ],
)
def test_what_contradicts_is_refused_where_it_runs_and_where_it_traces(changes: dict[str, Any], text: str) -> None:
    scores, load = torch.rand(3, 5), torch.ones(5)
    attributes = make_attributes(2, 1.0) | changes
    for place in ("cpu", "meta"):
        with pytest.raises(UsageError, match=re.escape(f"moedge.LoadAwareGate: {text}")):
            run(scores.to(place), load.to(place), attributes)
    with pytest.raises(UsageError, match=r"LoadAwareGate: \[4\] is not a number for each of 5 experts"):
        run(scores, load[:4], make_attributes(2, 1.0))
    with pytest.raises(UsageError, match=r"scores \[3, 5\] and choice \[2, 5\] differ"):
        torch.ops.moedge.load_aware_gate(scores, scores[:2], load, **make_attributes(2, 1.0))


def test_the_exported_graph_calls_the_function_it_carries() -> None:
    attributes = make_attributes(2, 1.0, penalty=0.3)

    class Routed(nn.Module):
        def forward(self, logits: Tensor, load: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return run(logits.sigmoid(), load, attributes)

    arguments = (torch.randn(9, 5), torch.arange(5.0))
    table = torch_ops.translation_table()
    program = torch.onnx.export(Routed(), arguments, dynamo=True, custom_translation_table=table, verbose=False)
    assert program is not None
    model = program.model_proto
    assert [node.op_type for node in model.graph.node if node.domain == "moedge"] == ["LoadAwareGate"]
    session = ort.InferenceSession(model.SerializeToString())
    names = [value.name for value in session.get_inputs()]
    found = session.run(None, dict(zip(names, (each.numpy() for each in arguments), strict=True)))
    assert_same(found, [each.numpy() for each in Routed()(*arguments)])
