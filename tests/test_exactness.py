"""On real int4 graphs, with both kinds of cache: what was computed before, or runs beside, changes no bit of a text."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import moedge
from moedge.runtime.requests import make_request
from moedge.runtime.scheduler import Scheduler

CHUNK = 32
NEW = 16


@pytest.fixture(scope="module")
def grouped_bundle(tmp_path_factory):
    """Grouped attention: a cache by heads, updated in place."""
    from fake_engine import write_tokenizer
    from family_cases import FAMILIES, make_model, save_model

    checkpoint = tmp_path_factory.mktemp("grouped") / "checkpoint"
    save_model(make_model("mixtral", next(iter(FAMILIES["mixtral"].configurations))), "mixtral", checkpoint)
    write_tokenizer(checkpoint)
    bundle = moedge.export(checkpoint, checkpoint.parent / "bundle", weights="int4", group_size=32, verify=False)
    moedge.build(bundle.path, "cpu")
    return bundle.path


@pytest.fixture(params=["latent", "grouped"])
def bundle(request):
    return request.getfixturevalue("tiny_bundle" if request.param == "latent" else "grouped_bundle")


def prompts(engine):
    random = np.random.default_rng(0)
    vocab, most = engine.info.vocab_size, engine.session.capacity - NEW
    base = random.integers(0, vocab, 200).tolist()
    found = [[*base[:size], *random.integers(0, vocab, 5).tolist()] for size in (3, 32, 33, 64, 100, 150)]
    return [prompt[:most] for prompt in [*found, base[:1], base[:96], base[:97], base]]


def told(generation):
    """Everything a text says of the numbers behind it."""
    list(generation)
    return generation.tokens, generation.logprobs


@pytest.mark.parametrize(("lanes", "chunk"), [(1, CHUNK), (3, CHUNK), (1, None), (3, None)])
def test_every_bit_is_as_alone(bundle, lanes, chunk):
    """With chunk None several go at once where nobody waits: of one text alone, and not in the scheduler."""
    options = {"max_new_tokens": NEW, "temperature": 0, "logprobs": 3}
    with moedge.load(bundle, prefill_chunk=chunk, reuse="off", threads=1, lanes=lanes) as engine:
        asked = prompts(engine)
        alone = [told(engine.generate(prompt, **options)) for prompt in asked]
    with moedge.load(bundle, prefill_chunk=chunk, threads=1, lanes=lanes) as engine:
        reused = 0
        for _ in range(2):
            for prompt, want in zip(asked, alone, strict=True):
                generation = engine.generate(prompt, **options)
                assert told(generation) == want
                reused += generation.reused_tokens
        if chunk == CHUNK:
            assert reused > sum(map(len, asked)), "the second round has the beginnings of all of them"
        assert reused
        done = threading.Semaphore(0)
        with Scheduler(engine, slots=3, queue=100) as scheduler:
            requests = [make_request(engine, prompt, **options) for prompt in asked]
            jobs = [scheduler.submit([one, one], lambda _, update: update.done and done.release()) for one in requests]
            for _ in range(2 * len(jobs)):
                assert done.acquire(timeout=60)
        for both, want in zip(jobs, alone, strict=True):
            assert [(job.writer.tokens, job.writer.logprobs) for job in both] == [want] * 2


def test_a_snapshot_gives_every_bit_back(bundle, tmp_path):
    options = {"max_new_tokens": NEW, "temperature": 0, "logprobs": 3}
    with moedge.load(bundle, prefill_chunk=CHUNK, threads=1) as engine:
        prompt = prompts(engine)[-1]
        want = told(engine.generate(prompt, **options))
        longer = told(engine.generate([*prompt[:100], 1, 2], **options))
        told(engine.generate(prompt, **options))
        engine.save_snapshot(tmp_path / "context")
    with moedge.load(bundle, prefill_chunk=CHUNK, threads=1, prefix_bytes=0) as engine:
        assert engine.load_snapshot(tmp_path / "context") == len(prompt)
        assert told(engine.generate(prompt, **options)) == want
        again = engine.generate([*prompt[:100], 1, 2], **options)
        assert told(again) == longer and again.reused_tokens == 96
