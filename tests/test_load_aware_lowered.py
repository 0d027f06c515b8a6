"""The load-aware gate as the targets have it, in rounds over all tokens, against the reference, a token at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from test_load_aware import CASES, assert_same, make_attributes, make_model, make_scores

from moedge.export.gating import load_aware
from moedge.profiles.targets._canonical import Rewriter, attributes_of, find_calls, finish_model


def lower(attributes: dict[str, Any], experts: int) -> ort.InferenceSession:
    proto = make_model(attributes)
    proto.graph.input[2].type.tensor_type.shape.dim[0].dim_value = experts
    model = ir.from_proto(proto)
    rewriter = Rewriter(model)
    (call,) = find_calls(model, "LoadAwareGate")
    outputs = load_aware.lower(rewriter, call.inputs, attributes_of(call))
    rewriter.replace(call, outputs)
    finish_model(model, {})
    assert not model.functions
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("case", [*CASES, (33, 7, 7, 1.0), (50, 9, 1, 1.05), (64, 61, 5, 1.0)], ids=str)
def test_rounds_lead_to_the_choices_of_one_token_after_the_other(
    case: tuple[int, int, int, float], penalty: float
) -> None:
    tokens, count, top_k, factor = case
    attributes = make_attributes(top_k, factor, penalty=penalty, decay=0.97)
    session = lower(attributes, count)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        scores = make_scores(tokens, count, (0, 0.5, 4)[seed % 3], seed)
        if seed >= 3:
            scores = np.round(scores * 4) / 4  # ties everywhere
        load = rng.random(count).astype(np.float32) * 9
        found = session.run(None, {"scores": scores, "choice": scores, "load": load})
        assert_same(found, load_aware.reference(scores, scores, load, **attributes))


def test_no_load_yet_and_what_is_no_number() -> None:
    attributes = make_attributes(2, 1.0, penalty=0.5)
    session, load = lower(attributes, 5), np.zeros(5, np.float32)
    scores = make_scores(9, 5, 3)
    scores[2, 3], choice = np.nan, np.where(np.arange(5) < 2, scores, -np.inf).astype(np.float32)
    for bad in ((scores, scores), (scores, choice)):
        found = session.run(None, dict(zip(("scores", "choice", "load"), (*bad, load), strict=True)))
        assert np.isnan(found[1][2]).all() and np.isfinite(np.delete(found[1], 2, axis=0)).all()
        assert_same(found, load_aware.reference(*bad, load, **attributes))


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.25, 1.3, 4 / 3, 2.7])
def test_the_capacity_is_the_same_in_whole_numbers(factor: float) -> None:
    """Where one expert is everybody's first choice it is filled to the last place, and no further."""
    for tokens, count, top_k in ((60, 7, 2), (64, 8, 2), (37, 10, 3)):
        capacity = load_aware.find_capacity(tokens, top_k, count, factor)
        scores = make_scores(tokens, count, 0)
        scores[:, 4] = 2
        attributes = make_attributes(top_k, factor)
        found = lower(attributes, count).run(None, {"scores": scores, "choice": scores, "load": np.zeros(count, "f")})
        assert np.bincount(found[0].ravel())[4] == min(capacity, tokens)
