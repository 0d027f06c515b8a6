"""Penalties, bias and log-probabilities: transformers' own numbers where it has them, OpenAI's definition elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from moedge.errors import UsageError
from moedge.runtime.sampling import Sampler, Sampling, log_probabilities


def adjusted(logits, sampling, prompt, generated):
    """The logits that a sampler which has generated so far would choose from."""
    sampler = Sampler(sampling, prompt)
    assert sampler._adjuster is not None
    for token in generated:
        sampler._adjuster.count(token)
    return sampler._adjuster.adjust(logits)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("penalty", "bias"), [(1.3, {}), (0.7, {}), (1.0, {3: 5.0, 7: -100.0}), (1.2, {0: 1.5, 5: -2.5, 49: 0.25})]
)
def test_repetition_penalty_and_bias_are_those_of_transformers(seed, penalty, bias):
    import torch
    from transformers.generation import logits_process as processors

    random = np.random.default_rng(seed)
    logits = (4 * random.standard_normal(50)).astype(np.float32)
    prompt, generated = random.integers(0, 50, 12).tolist(), random.integers(0, 50, 6).tolist()
    ids, scores = torch.tensor([prompt + generated]), torch.from_numpy(logits[None].copy())
    if bias:  # transformers' own order: bias, then repetition
        by_sequence = {(token,): value for token, value in bias.items()}
        scores = processors.SequenceBiasLogitsProcessor(by_sequence)(ids, scores)
    if penalty != 1:
        scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(ids, scores)
    ours = adjusted(logits, Sampling(repetition_penalty=penalty, logit_bias=bias), prompt, generated)
    np.testing.assert_array_equal(ours, scores[0].numpy())


def test_presence_and_frequency_penalties_count_generated_tokens_only():
    logits = np.zeros(6, np.float32)
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    ours = adjusted(logits, sampling, prompt=[0, 1, 1], generated=[1, 2, 2, 2])
    np.testing.assert_allclose(ours, [0, -0.75, -1.25, 0, 0, 0])
    assert not logits.any(), "the model's logits stay what they are"


def test_penalties_act_while_decoding_greedily():
    logits = np.array([0, 3, 2.5, 2.2], np.float32)
    sampler = Sampler(Sampling(presence_penalty=1.0))
    assert [sampler.choose(logits) for _ in range(4)] == [1, 2, 3, 1]
    assert Sampler(Sampling(logit_bias={0: 100.0})).choose(logits) == 0
    assert Sampler(Sampling(repetition_penalty=2.0), prompt=[1]).choose(logits) == 2


def test_a_sampler_without_them_does_not_copy():
    assert Sampler(Sampling(temperature=1.0, top_k=5))._adjuster is None


def test_log_probabilities():
    logits = np.array([1000, 999, -np.inf], np.float32)
    np.testing.assert_allclose(np.exp(log_probabilities(logits)), [1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0])


def test_the_models_own_repetition_penalty():
    assert Sampling.from_defaults({"repetition_penalty": 1.1}) == Sampling(repetition_penalty=1.1)
    assert Sampling.from_defaults({"repetition_penalty": 1.1}, repetition_penalty=1.0) == Sampling()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("repetition_penalty", 0, "repetition_penalty is 0; it must be from 0.000001 to 1000000 (1 is off)"),
        ("repetition_penalty", np.inf, "repetition_penalty is inf; it must be from 0.000001 to 1000000 (1 is off)"),
        ("presence_penalty", float("nan"), "presence_penalty is nan; it must be from -1000000 to 1000000 (0 is off)"),
        ("frequency_penalty", "much", "frequency_penalty is 'much'; it must be from -1000000 to 1000000 (0 is off)"),
        ("logit_bias", {-1: 1}, "a token of logit_bias is -1; it must be a whole number, 0 or more"),
        ("logit_bias", {1: float("inf")}, "logit_bias of token 1 is inf; it must be from -1000000 to 1000000"),
    ],
)
def test_numbers_out_of_range(name, value, text):
    with pytest.raises(UsageError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == text
