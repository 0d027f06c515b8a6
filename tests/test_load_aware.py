"""The gate with a penalty and a capacity: nothing over capacity, nothing dropped, the best that can still be had."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from moedge.export.gating import list_gates, load_aware

# (tokens, experts, top_k, capacity_factor)
CASES = [
    (1, 8, 2, 1.0),
    (3, 3, 2, 1.0),
    (7, 5, 3, 1.0),
    (40, 6, 6, 1.0),
    (40, 6, 1, 1.0),
    (11, 7, 4, 1.3),
    (64, 16, 4, 1.1),
    (9, 4, 2, 50.0),
]


def make_attributes(top_k: int, capacity_factor: float = 1.0, **others: float) -> dict[str, Any]:
    given = {"top_k": top_k, "norm_topk_prob": 1, "routed_scaling_factor": 1.5, "penalty": 0.0, "decay": 0.99}
    given |= {"capacity_factor": capacity_factor, **others}
    return {name: given[name] for name in load_aware.ATTRIBUTES}


def make_scores(tokens: int, experts: int, skew: float, seed: int = 0) -> Any:
    """Sigmoids; with `skew` all tokens like the first experts best."""
    logits = np.random.default_rng(seed).standard_normal((tokens, experts)) + skew * np.linspace(1, -1, experts)
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def make_model(attributes: dict[str, Any]) -> onnx.ModelProto:
    def value(name: str, *shape: str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value("scores", "T", "E"), value("choice", "T", "E"), value("load", "E")]
    outputs = [value("experts", "T", "k", kind=TensorProto.INT64), value("weights", "T", "k"), value("new_load", "E")]
    names = [each.name for each in inputs], [each.name for each in outputs]
    node = helper.make_node("LoadAwareGate", *names, domain="moedge", **attributes)
    functions = [onnx.parser.parse_function(load_aware.FUNCTION)]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("moedge", 1)]
    graph = helper.make_graph([node], "gate", inputs, outputs)
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=11)


def run(scores: Any, choice: Any, load: Any, attributes: dict[str, Any]) -> list[Any]:
    session = ort.InferenceSession(make_model(attributes).SerializeToString())
    return list(session.run(None, {"scores": scores, "choice": choice, "load": load}))


def assert_same(ours: Any, expected: Any) -> None:
    np.testing.assert_array_equal(ours[0], expected[0])
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5)
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skew", [0, 0.5, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_capacity_holds_and_every_token_gets_k_experts(case: tuple[int, int, int, float], skew: float) -> None:
    tokens, count, top_k, factor = case
    for seed in range(5):
        scores = make_scores(tokens, count, skew, seed)
        load = np.random.default_rng(seed).random(count).astype(np.float32) * 9
        attributes = make_attributes(top_k, factor, penalty=0.05)
        experts, weights, new_load = run(scores, scores, load, attributes)
        assert np.bincount(experts.ravel(), minlength=count).max() <= np.ceil(factor * tokens * top_k / count + 1e-6)
        assert experts.shape == (tokens, top_k) and ((experts >= 0) & (experts < count)).all()
        assert all(len(set(row)) == top_k for row in experts.tolist())
        np.testing.assert_allclose(weights.sum(axis=1), 1.5, rtol=1e-5)
        assert_same((experts, weights, new_load), load_aware.reference(scores, scores, load, **attributes))


def test_the_reference_evaluator_agrees() -> None:
    scores, load = make_scores(12, 5, 3), np.arange(5, dtype=np.float32)
    attributes = make_attributes(2, 1.0, penalty=0.1)
    evaluated = ReferenceEvaluator(make_model(attributes)).run(None, {"scores": scores, "choice": scores, "load": load})
    assert_same(evaluated, load_aware.reference(scores, scores, load, **attributes))


def choose_by_search(liking: Any, top_k: int, capacity: int) -> list[tuple[int, ...]]:
    """For each token in turn the best set with which all later tokens can still be served, by trying every set."""
    tokens, count = liking.shape
    sets = list(itertools.combinations(range(count), top_k))

    def take(room: tuple[int, ...], chosen: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(left - (expert in chosen) for expert, left in enumerate(room))

    @cache
    def can_serve(room: tuple[int, ...], to_go: int) -> bool:
        options = [chosen for chosen in sets if all(room[expert] for expert in chosen)]
        return not to_go or any(can_serve(take(room, chosen), to_go - 1) for chosen in options)

    room, result = (capacity,) * count, []
    for token in range(tokens):
        ranked = [sorted(chosen, key=lambda expert: (-liking[token, expert], expert)) for chosen in sets]
        ranked.sort(key=lambda chosen: [(-liking[token, expert], expert) for expert in chosen])
        best = next(
            tuple(chosen)
            for chosen in ranked
            if all(room[expert] for expert in chosen) and can_serve(take(room, tuple(chosen)), tokens - token - 1)
        )
        room = take(room, best)
        result.append(best)
    return result


@pytest.mark.parametrize("shape", [(3, 3, 2), (4, 4, 2), (5, 4, 3), (6, 3, 1), (6, 5, 2), (4, 5, 4)], ids=str)
def test_choices_are_the_best_that_leave_room_for_the_rest(shape: tuple[int, int, int]) -> None:
    tokens, count, top_k = shape
    rng = np.random.default_rng(tokens)
    attributes = make_attributes(top_k, 1.0)
    capacity = load_aware.find_capacity(tokens, top_k, count, 1.0)
    session = ort.InferenceSession(make_model(attributes).SerializeToString())
    load = np.zeros(count, np.float32)
    for trial in range(40):
        # Few values: ties everywhere; every second one skewed.
        liking = rng.integers(0, 4, (tokens, count)) + (trial % 2) * 3 * (np.arange(count) < top_k)
        scores = (liking / 8 + 0.1).astype(np.float32)
        expected = choose_by_search(scores, top_k, capacity)
        ours = session.run(None, {"scores": scores, "choice": scores, "load": load})[0]
        np.testing.assert_array_equal(ours, expected)
        np.testing.assert_array_equal(load_aware.reference(scores, scores, load, **attributes)[0], expected)


def test_first_come_first_served_alone_would_strand_the_last_token() -> None:
    """Three tokens, three experts of room 2, two choices: all prefer 0 and 1, so the second must not take both."""
    scores = np.tile(np.array([0.9, 0.8, 0.1], np.float32), (3, 1))
    experts, _, _ = run(scores, scores, np.zeros(3, np.float32), make_attributes(2, 1.0))
    np.testing.assert_array_equal(experts, [[0, 1], [0, 2], [1, 2]])


def test_within_the_capacity_choices_are_plain_top_k() -> None:
    scores = make_scores(50, 8, 2)
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    experts, _, load = run(scores, scores, np.zeros(8, np.float32), make_attributes(3, 8.0, penalty=0.5, decay=1.0))
    np.testing.assert_array_equal(experts, expected)
    np.testing.assert_array_equal(load, np.bincount(expected.ravel(), minlength=8))


def test_overflow_goes_to_the_next_best_expert_with_room() -> None:
    """One choice each, nothing to keep free until the end: first come, first served."""
    scores = make_scores(40, 8, 2)
    experts, _, _ = run(scores, scores, np.zeros(8, np.float32), make_attributes(1, 2.0))
    room = np.full(8, 10)
    for token, (expert,) in enumerate(experts):
        assert expert == np.argmax(np.where(room > 0, scores[token], -1))
        room[expert] -= 1


def test_the_load_is_a_state_that_does_not_depend_on_the_cut() -> None:
    scores = make_scores(30, 8, 1)
    attributes = make_attributes(2, 8.0, decay=0.9)
    whole = run(scores, scores, np.ones(8, np.float32), attributes)
    load, parts = np.ones(8, np.float32), []
    for cut in (slice(0, 1), slice(1, 17), slice(17, 30)):
        experts, _, load = run(scores[cut], scores[cut], load, attributes)
        parts.append(experts)
    np.testing.assert_array_equal(np.concatenate(parts), whole[0])
    np.testing.assert_allclose(load, whole[2], rtol=1e-5)


def test_the_penalty_alone_spreads_single_tokens() -> None:
    """Token by token the capacity never binds; the running load does it."""
    utilization = {}
    for penalty in (0.0, 0.2, 3.0):
        load, counts = np.zeros(8, np.float32), np.zeros(8)
        session = ort.InferenceSession(make_model(make_attributes(2, 1.0, penalty=penalty)).SerializeToString())
        for scores in make_scores(300, 8, 1)[:, None]:
            experts, _, load = session.run(None, {"scores": scores, "choice": scores, "load": load})
            counts[experts[0]] += 1
        utilization[penalty] = counts.mean() / counts.max()
    assert utilization[0.0] < 0.5 < utilization[0.2] < 0.9 < utilization[3.0], utilization


@pytest.mark.parametrize("where", ["scores", "choice"])
def test_nan_gives_no_weight_but_nan(where: str) -> None:
    scores = make_scores(6, 4, 3)
    bad = scores.copy()
    bad[2, 3] = np.nan
    inputs = (bad, scores) if where == "scores" else (scores, bad)
    attributes = make_attributes(2, 1.0)
    ours = run(*inputs, np.zeros(4, np.float32), attributes)
    assert np.isnan(ours[1][2]).all() and np.isfinite(np.delete(ours[1], 2, axis=0)).all()
    assert all(len(set(row)) == 2 for row in ours[0].tolist())
    assert_same(ours, load_aware.reference(*inputs, np.zeros(4, np.float32), **attributes))


def test_minus_infinity_is_the_last_resort_and_not_nowhere() -> None:
    scores = make_scores(4, 4, 0)
    choice = np.where(np.arange(4) < 2, scores, -np.inf).astype(np.float32)  # one group of two
    experts, weights, _ = run(scores, choice, np.zeros(4, np.float32), make_attributes(2, 1.0))
    assert np.bincount(experts.ravel()).tolist() == [2, 2, 2, 2] and np.isfinite(weights).all()


@pytest.mark.parametrize(
    ("attributes", "fault"),
    [
        (make_attributes(9), "num_experts_per_tok 9 exceeds the 8 experts"),
        (
            make_attributes(2, -1.0),
            "capacity_factor -1 is below 1: 8 experts would have room for -2 of the 2 choices of each token",
        ),
        (
            make_attributes(4, 0.5),
            "capacity_factor 0.5 is below 1: 8 experts would have room for 2 of the 4 choices of each token",
        ),
        (make_attributes(2, penalty=-0.1), "penalty -0.1 is below 0 and would draw tokens to busy experts"),
        (make_attributes(2, decay=1.5), "decay 1.5 is not between 0 and 1"),
        (make_attributes(2, decay=float("nan")), "decay nan is not between 0 and 1"),
        (make_attributes(2), None),
    ],
)
def test_contradicting_attributes_are_named_with_both_figures(attributes: dict[str, Any], fault: str | None) -> None:
    assert load_aware.find_fault(attributes, 8) == fault


def test_full_checker_takes_the_function() -> None:
    onnx.checker.check_model(make_model(make_attributes(2)), full_check=True)
    assert list_gates()["LoadAwareGate"].OP == "LoadAwareGate"
