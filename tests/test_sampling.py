"""Choosing tokens: the same sets and probabilities as transformers, seeds that repeat, numbers out of range."""

from __future__ import annotations

import numpy as np
import pytest

from moedge.errors import EngineError, MoedgeError, UsageError
from moedge.runtime.sampling import Sampler, Sampling, _pick, distribution


def warped(logits, sampling):
    """What transformers makes of the logits: probabilities over the whole vocabulary."""
    import torch
    from transformers.generation import logits_process as warpers

    chain = [warpers.TemperatureLogitsWarper(sampling.temperature)]
    if sampling.top_k:
        chain.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(warpers.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        chain.append(warpers.MinPLogitsWarper(sampling.min_p))
    scores = torch.from_numpy(logits[None].astype(np.float64))
    for warper in chain:
        scores = warper(None, scores)
    return torch.softmax(scores, dim=-1)[0].numpy()


@pytest.mark.parametrize("vocab", [7, 300, 5000])
@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 5.0, "top_p": 0.99},  # flat: far more tokens than the first look takes
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 0.9, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.0, "top_k": 100000, "min_p": 1.0},
    ],
)
def test_distribution_is_that_of_transformers(vocab, given):
    sampling = Sampling(**given)
    for seed in range(5):
        logits = (3 * np.random.default_rng(seed).standard_normal(vocab)).astype(np.float32)
        wanted = warped(logits, sampling)
        tokens, probabilities = distribution(logits, sampling)
        assert tokens.tolist() == np.flatnonzero(wanted).tolist()
        np.testing.assert_allclose(probabilities, wanted[tokens], rtol=1e-9)


def test_ties_with_the_kth_token_stay_as_in_transformers():
    logits = np.array([1, 3, 2, 2, 2], np.float32)
    tokens, _ = distribution(logits, Sampling(temperature=1.0, top_k=2))
    assert tokens.tolist() == [1, 2, 3, 4]
    assert np.flatnonzero(warped(logits, Sampling(temperature=1.0, top_k=2))).tolist() == [1, 2, 3, 4]


def test_top_p_prefers_the_lower_token_among_equals():
    tokens, _ = distribution(np.zeros(1000, np.float32), Sampling(temperature=1, top_p=0.25))
    assert tokens.tolist() == list(range(250))


def test_greedy_takes_the_first_of_the_largest():
    assert Sampler(Sampling()).choose(np.array([0, 5, 5], np.float32)) == 1


def test_drawn_tokens_follow_the_probabilities():
    logits = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    sampler = Sampler(Sampling(temperature=1, seed=1))
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=3)
    np.testing.assert_allclose(counts / 20_000, [0.5, 0.3, 0.2], atol=0.015)


@pytest.mark.parametrize("given", [{}, {"top_p": 0.97}, {"top_k": 2000}])
def test_draws_of_a_large_vocabulary_are_where_the_cumulative_probability_passes_them(given):
    logits = (2 * np.random.default_rng(5).standard_normal(5000)).astype(np.float32)
    logits[::7] = -np.inf
    sampling = Sampling(temperature=1.5, seed=3, **given)
    tokens, probabilities = distribution(logits, sampling)
    draws = np.random.Generator(np.random.PCG64(3)).random(500)
    wanted = tokens[np.searchsorted(np.cumsum(probabilities), draws, side="right")]
    sampler = Sampler(sampling)
    assert [sampler.choose(logits) for _ in draws] == wanted.tolist()
    assert len(set(wanted // 512)) > 5  # blocks that tokens are summed in


@pytest.mark.parametrize("size", [3, 512, 513, 1700])
def test_the_ends_of_the_range_fall_on_tokens_that_can_be_drawn(size):
    for seed in range(50):
        weights = np.random.default_rng(seed).random(size)
        weights[0] = weights[-1] = 0
        assert _pick(weights, 0.0) == 1
        assert _pick(weights, float(np.nextafter(1, 0))) == size - 2
        assert _pick(np.concatenate([weights, np.zeros(1100)]), 1.0) == size - 2  # as after rounding up


def test_a_seed_repeats_exactly_and_none_differs():
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)

    def draw(seed):
        sampler = Sampler(Sampling(temperature=1, seed=seed))
        return [sampler.choose(logits) for _ in range(50)]

    assert draw(11) == draw(11)
    assert draw(11) != draw(12)
    assert draw(None) != draw(None)


def test_tokens_without_probability_are_never_drawn():
    logits = np.array([-np.inf, 0, -np.inf], np.float32)
    sampler = Sampler(Sampling(temperature=1e-300, seed=0))
    assert {sampler.choose(logits) for _ in range(100)} == {1}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unusable_logits(bad):
    with pytest.raises(EngineError, match=r"no usable logits \(the largest is (nan|inf)\).*moedge verify"):
        Sampler(Sampling()).choose(np.array([0, bad, 1], np.float32))
    with pytest.raises(EngineError, match="largest is -inf"):
        Sampler(Sampling()).choose(np.full(3, -np.inf, np.float32))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("temperature", -1, "temperature is -1; it must be 0 (greedy) or more"),
        ("temperature", float("nan"), "temperature is nan; it must be 0 (greedy) or more"),
        ("temperature", float("inf"), "temperature is inf; it must be 0 (greedy) or more"),
        ("temperature", "hot", "temperature is 'hot'; it must be 0 (greedy) or more"),
        ("top_k", -3, "top_k is -3; it must be a whole number, 0 (off) or more"),
        ("top_k", 1.5, "top_k is 1.5; it must be a whole number, 0 (off) or more"),
        ("top_p", 0, "top_p is 0; it must be above 0 and at most 1 (off)"),
        ("top_p", 1.01, "top_p is 1.01; it must be above 0 and at most 1 (off)"),
        ("min_p", -0.1, "min_p is -0.1; it must be from 0 (off) to 1"),
        ("seed", -1, "seed is -1; it must be a whole number, 0 or more"),
        ("seed", float("inf"), "seed is inf; it must be a whole number, 0 or more"),
    ],
)
def test_numbers_out_of_range(name, value, text):
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == text
    assert isinstance(caught.value, MoedgeError)


def test_defaults():
    samples = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None}
    assert Sampling.from_defaults({}) == Sampling()
    assert Sampling.from_defaults({"temperature": 0.6}) == Sampling()  # the model does not say that it samples
    assert Sampling.from_defaults(samples) == Sampling(temperature=0.6, top_p=0.95)
    assert Sampling.from_defaults(samples, temperature=0) == Sampling(temperature=0, top_p=0.95)
    assert Sampling.from_defaults(samples, top_p=0.5, seed=3) == Sampling(temperature=0.6, top_p=0.5, seed=3)
    assert Sampling.from_defaults({}, top_k=5) == Sampling(temperature=1.0, top_k=5)
    assert Sampling.from_defaults({}, temperature=0, top_k=5) == Sampling(temperature=0, top_k=5)
    assert Sampling.from_defaults({"do_sample": True}) == Sampling(temperature=1.0)
