"""What a text may be asked with beyond sampling, and what a second text need not pay for again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading

import fake_engine
import numpy as np
import pytest

from moedge.errors import BundleError, EngineError, UsageError
from moedge.runtime.context import PrefixStore
from moedge.runtime.engine import load
from moedge.runtime.sampling import log_probabilities

PROMPT = np.random.default_rng(5).integers(0, 256, 21).tolist()
CHUNK = 8


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory):
    return fake_engine.write_bundle(tmp_path_factory.mktemp("generation") / "bundle")


@pytest.fixture
def engine(fake_bundle):
    with load(fake_bundle, prefill_chunk=CHUNK) as engine:
        yield engine


def answer(engine, prompt=PROMPT, **options):
    generation = engine.generate(prompt, **{"max_new_tokens": 12, **options})
    text = "".join(generation)
    return text, generation.tokens


def counted(engine):
    """Lengths of the steps that the engine's session makes from here on."""
    session, steps = engine.session, []
    step = session.step

    def count(input_ids, rows, out=None):
        steps.append(len(input_ids))
        return step(input_ids, rows, out)

    session.step = count
    return steps


# Options


def test_logprobs_are_the_models_own(engine):
    generation = engine.generate(PROMPT, max_new_tokens=5, logprobs=3, repetition_penalty=1.5)
    list(generation)
    logits = engine.logits([*PROMPT, *generation.tokens])
    for place, found in enumerate(generation.logprobs):
        wanted = log_probabilities(logits[len(PROMPT) - 1 + place])
        assert found.token == generation.tokens[place]
        assert found.logprob == pytest.approx(wanted[found.token], abs=1e-4)
        assert [token for token, _ in found.top] == np.argsort(-wanted, kind="stable")[:3].tolist()
    plain = engine.generate(PROMPT, max_new_tokens=3, logprobs=0)
    list(plain)
    assert [found.top for found in plain.logprobs] == [()] * 3
    assert engine.generate(PROMPT).logprobs == []


def test_bias_and_penalties_reach_the_text(engine):
    assert answer(engine, logit_bias={65: 1e4})[0] == "A" * 12
    assert len(set(answer(engine, presence_penalty=1e4)[1])) == 12
    assert "A" not in answer(engine, logit_bias={65: 1e4}, prompt=[65], repetition_penalty=1e5)[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20"),
        ({"logprobs": True}, "logprobs is True; it must be a whole number from 0 to 20"),
        ({"logit_bias": {300: 1}}, "logit_bias has token 300, which is out of range: this model's tokens are 0 to 299"),
        ({"context_end": "stop"}, "context_end is 'stop'; it must be one of error, slide"),
        ({"stop": "x"}, "stop must be a list of texts, not the text 'x'"),
        ({"stop": None}, "stop must be a list of texts, not None"),
        ({"top_k": 2.0}, "top_k is 2.0; it must be a whole number, 0 (off) or more"),
        ({"logit_bias": [5]}, "logit_bias is [5]; it must be {token: number}"),
    ],
)
def test_wrong_options(engine, options, text):
    with pytest.raises(UsageError) as caught:
        engine.generate("a", **options)
    assert str(caught.value) == text


def test_what_is_no_prompt_is_refused_where_the_window_slides_too(engine):
    for prompt in (None, 5, iter([1])):
        with pytest.raises(EngineError, match="token ids must be a list of whole numbers, not "):
            engine.generate(prompt, context_end="slide")


def test_wrong_options_of_load(fake_bundle):
    with pytest.raises(UsageError, match="threads is 1000000000; it must be at most 1024"):
        load(fake_bundle, threads=10**9)
    with pytest.raises(UsageError, match="reuse is 'some'; it must be one of exact, all, off"):
        load(fake_bundle, reuse="some")
    with pytest.raises(UsageError, match="prefix_bytes is -1; it must be a whole number, 0 .off. or more"):
        load(fake_bundle, prefix_bytes=-1)


def test_a_bundle_without_a_tokenizer_gives_tokens(engine, fake_bundle, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(fake_bundle, bare, ignore=shutil.ignore_patterns("tokenizer.json"))
    files = json.loads((bare / "moedge.json").read_text())["files"]
    del files["tokenizer.json"]
    fake_engine.edit_json(bare / "moedge.json", files=files)
    with load(bare, prefill_chunk=CHUNK) as other:
        assert answer(other) == ("", answer(engine)[1])
        for ask in (lambda: other.generate("text"), lambda: other.generate(PROMPT, stop=["x"])):
            with pytest.raises(EngineError, match="has no tokenizer.json: give token ids instead of text"):
                ask()


# The context's end


def test_a_sliding_window_goes_on_from_the_newer_half(engine):
    capacity = fake_engine.MAX_SEQ_LEN
    text, tokens = answer(engine, context_end="slide", max_new_tokens=150, logit_bias={fake_engine.EOS: -1e4})
    assert len(tokens) == 150
    whole = [*PROMPT, *tokens]
    assert tokens[: capacity - len(PROMPT)] == answer(engine, max_new_tokens=capacity - len(PROMPT))[1]
    window = whole[capacity + 1 - capacity // 2 : capacity + 1]  # what was there and the token without room
    after = answer(engine, window, max_new_tokens=30, logit_bias={fake_engine.EOS: -1e4})[1]
    assert after == whole[capacity + 1 : capacity + 31]


def test_of_a_prompt_too_long_the_newest_tokens_are_taken(engine):
    long = np.random.default_rng(9).integers(0, 256, 200).tolist()
    want = answer(engine, long[-32:])
    assert answer(engine, long, context_end="slide") == want
    with pytest.raises(EngineError, match="the prompt has 200 tokens and there is room for 64"):
        engine.generate(long)


# Reuse


def test_a_second_prompt_pays_for_what_differs_and_answers_the_same(engine, fake_bundle):
    other = [*PROMPT[:18], 7, 8, 9]
    with load(fake_bundle, prefill_chunk=CHUNK, reuse="off") as plain:
        alone = [answer(plain, prompt) for prompt in (PROMPT, other, PROMPT[:10], PROMPT)]
    steps = counted(engine)
    assert answer(engine) == alone[0] and steps[:3] == [8, 8, 5]
    steps.clear()
    assert answer(engine, other) == alone[1] and steps[0] == 5 and set(steps[1:]) == {1}
    engine.logits([1, 2, 3])  # takes the context
    steps.clear()
    assert answer(engine, PROMPT[:10]) == alone[2] and steps[0] == 2
    steps.clear()
    again = engine.generate(PROMPT, max_new_tokens=12)
    assert ("".join(again), again.tokens) == alone[3] and steps[0] == 5 and again.reused_tokens == 16


def test_the_same_prompt_again_costs_nothing(engine):
    first = answer(engine)
    steps = counted(engine)
    assert answer(engine) == first and set(steps) == {1} and len(steps) == 11


def test_reuse_all_takes_generated_tokens_too(fake_bundle):
    with load(fake_bundle, prefill_chunk=CHUNK, reuse="all") as engine:
        _, tokens = answer(engine)
        steps = counted(engine)
        generation = engine.generate([*PROMPT, *tokens, 1, 2], max_new_tokens=1)
        list(generation)
        assert generation.reused_tokens == len(PROMPT) + 11 and sum(steps) == 3
    with load(fake_bundle, prefill_chunk=CHUNK, reuse="off") as engine:
        answer(engine)
        steps = counted(engine)
        answer(engine)
        assert steps[:3] == [8, 8, 5] and len(engine.prefixes) == 0


def test_stored_beginnings_are_bounded_and_the_least_recently_used_goes():
    store, rows = PrefixStore(100), [np.zeros(10, np.float32)]
    for name in (b"a", b"b"):
        store.put([name], rows)
    assert len(store.find([b"a"])) == 1
    store.put([b"c"], rows)
    assert (b"a" in store, b"b" in store, b"c" in store, store.bytes) == (True, False, True, 80)
    store.put([b"large"], [np.zeros(1000, np.float32)])
    assert len(store) == 2
    assert len(store.find([b"c", b"b", b"a"])) == 1, "a chunk is of use behind its predecessors only"
    store.put([b"c", b"d"], rows)
    assert b"a" not in store and len(store.find([b"c", b"d"])) == 2, "what one chunk needs is as new as it"
    store.put([b"c", b"d", b"e"], rows)
    assert len(store.find([b"c", b"d", b"e"])) == 2, "a prompt's later chunks do not take its first one's room"
    store.put([b"f"], rows)
    assert len(store.find([b"c", b"d"])) == 1, "the last chunk goes first"
    store.put([b"c", b"d", b"e"], rows)
    assert b"e" not in store, "nobody would find it behind one that is gone"
    store.clear()
    assert (len(store), store.bytes) == (0, 0)


def test_of_a_prompt_longer_than_the_store_the_beginning_is_kept(fake_bundle):
    row = 4 * fake_engine.LAYERS * (fake_engine.LATENT + fake_engine.ROPE)
    prompt = list(range(1, 6 * CHUNK))
    with load(fake_bundle, prefill_chunk=CHUNK, prefix_bytes=3 * CHUNK * row) as engine:
        want = answer(engine, prompt)
        answer(engine, [9] * 3)
        again = engine.generate(prompt, max_new_tokens=12)
        list(again)
        assert again.reused_tokens == 3 * CHUNK and again.tokens == want[1]


def test_an_engine_keeps_no_more_than_it_may(fake_bundle):
    row = 4 * fake_engine.LAYERS * (fake_engine.LATENT + fake_engine.ROPE)
    with load(fake_bundle, prefill_chunk=CHUNK, prefix_bytes=3 * CHUNK * row) as engine:
        for seed in range(5):
            answer(engine, np.random.default_rng(seed).integers(0, 256, 30).tolist(), max_new_tokens=1)
            assert engine.prefixes.bytes <= 3 * CHUNK * row
        assert len(engine.prefixes) == 3


def test_steps_of_somebody_else_make_a_context_unknown(engine):
    want = answer(engine)
    engine.session.truncate(3)
    engine.session.step(np.array([1]), np.array([0]))
    assert answer(engine) == want


# The command


def test_the_command_has_the_same_options(fake_bundle):
    from click.testing import CliRunner

    from moedge.runtime.commands import generate_command

    given = ["--repetition-penalty", "1.5", "--presence-penalty", "1", "--frequency-penalty", "0.5", "--logprobs", "2"]
    command = [str(fake_bundle), "-p", "abc", "-n", "70", "--slide", "--json", "--seed", "3", *given]
    result = CliRunner().invoke(generate_command, command, catch_exceptions=False)
    document = json.loads(result.stdout)
    with load(fake_bundle) as engine:
        options = {"repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 0.5, "context_end": "slide"}
        assert document["tokens"] == answer(engine, "abc", max_new_tokens=70, **options)[1]
    assert [len(found["top"]) for found in document["logprobs"]] == [2] * len(document["tokens"])
    assert document["reused_prompt_tokens"] == 0


# Several texts from one prompt


def test_samples_pay_for_the_prompt_once(fake_bundle):
    for reuse in ("exact", "off"):
        with load(fake_bundle, prefill_chunk=CHUNK, reuse=reuse) as engine:
            steps = counted(engine)
            texts = ["".join(one) for one in engine.samples(PROMPT, 3, seed=4, temperature=1.0, max_new_tokens=6)]
            assert [size for size in steps if size > 1] == [8, 8, 5]
            alone = [answer(engine, seed=seed, temperature=1.0, max_new_tokens=6)[0] for seed in (4, 5, 6)]
            assert texts == alone and len(set(texts)) > 1
    with load(fake_bundle) as engine:
        with pytest.raises(UsageError, match="n is 0; it must be a whole number, 1 or more"):
            engine.samples("a", 0)


# Cancelling


def test_a_long_prompt_is_cancelled_between_chunks(engine):
    generation = engine.generate(PROMPT, max_new_tokens=5)
    session, steps = engine.session, []
    step = session.step

    def cancelling(input_ids, rows, out=None):
        steps.append(len(input_ids))
        generation.cancel()
        return step(input_ids, rows, out)

    session.step = cancelling
    assert list(generation) == [] and generation.finish_reason == "cancelled" and steps == [8]


def test_a_text_is_cancelled_between_tokens(engine):
    generation = engine.generate(PROMPT, max_new_tokens=30)
    next(generation)
    generation.cancel()
    assert "".join(generation) in ("", "\ufffd") and generation.finish_reason == "cancelled"
    assert len(generation.tokens) < 30


# Threads


def test_threads_take_turns_and_none_gets_anothers_numbers(engine):
    rows = [np.random.default_rng(seed).integers(0, 256, 20) for seed in range(4)]
    want = [engine.logits(ids) for ids in rows]
    wrong = []

    def work(index):
        for _ in range(15):
            if not np.array_equal(engine.logits(rows[index]), want[index]):
                wrong.append(index)
            try:
                text = answer(engine, rows[index].tolist(), max_new_tokens=3)[1]
                if text[0] != int(want[index][-1].argmax()):
                    wrong.append(("text", index))
            except EngineError as error:
                assert "another call has taken this engine's context" in str(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_engines_of_other_options_in_one_process_do_not_touch_each_other(engine, fake_bundle, tmp_path):
    """There is no state outside an engine: texts in turns, a token at a time, are those of each engine alone."""
    others = {
        "small": {"max_seq_len": 40, "prefill_chunk": 4, "threads": 1, "reuse": "all"},
        "plain": {"reuse": "off", "prefix_bytes": 0, "threads": 2},
    }
    elsewhere = fake_engine.write_bundle(tmp_path / "elsewhere", chain={1: 2, 2: 3, 3: 1})
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 4, "logprobs": 1}
    engines = [engine, *(load(fake_bundle, **given) for given in others.values()), load(elsewhere)]
    want = []
    for one in engines:
        text = one.generate(PROMPT, **options)
        want.append(("".join(text), text.tokens, text.logprobs))
    assert len({str(each) for each in want}) >= 2
    texts = [one.generate(PROMPT, **options) for one in engines]
    pieces = [""] * len(texts)
    for _ in range(13):
        for place, text in enumerate(texts):
            pieces[place] += next(text, "")
    assert [(piece, text.tokens, text.logprobs) for piece, text in zip(pieces, texts, strict=True)] == want
    assert [one.session.capacity for one in engines] == [64, 40, 64, 64]
    engines[1].close()
    assert answer(engine) == answer(engines[2]), "closing one leaves the others"
    for one in engines[2:]:
        one.close()


# Snapshots


def test_a_snapshot_goes_on_where_the_context_was(engine, fake_bundle, tmp_path):
    want = answer(engine)
    assert engine.save_snapshot(tmp_path / "context") == len(PROMPT)
    with load(fake_bundle, prefill_chunk=CHUNK) as other:
        assert other.load_snapshot(tmp_path / "context") == len(PROMPT)
        steps = counted(other)
        assert answer(other) == want and set(steps) == {1}
        other.load_snapshot(tmp_path / "context")
        generation = other.generate([*PROMPT, 1, 2, 3], max_new_tokens=4)
        list(generation)
        assert generation.reused_tokens == 16
        assert generation.tokens == answer(engine, [*PROMPT, 1, 2, 3], max_new_tokens=4)[1]


def test_snapshots_that_are_refused(engine, fake_bundle, tmp_path):
    path = tmp_path / "context"
    with pytest.raises(EngineError, match="there is no prompt in the context to save; generate from one first"):
        engine.save_snapshot(path)
    assert not path.exists()
    with pytest.raises(EngineError, match="there is no snapshot at .*context; write one: engine.save_snapshot"):
        engine.load_snapshot(path)
    answer(engine)
    engine.save_snapshot(path)
    content = path.read_bytes()
    for place in (20, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(EngineError, match=r"context is damaged \(its checksum is wrong\); write it again"):
            engine.load_snapshot(path)
    for short in (content[:10], content[:-1]):
        path.write_bytes(short)
        with pytest.raises(EngineError, match="context is damaged"):
            engine.load_snapshot(path)
    path.write_bytes(b"something else")
    with pytest.raises(EngineError, match="context is no snapshot of this version of moedge"):
        engine.load_snapshot(path)
    with path.open("wb") as stream:
        stream.truncate(1 << 40)  # not read whole
    with pytest.raises(EngineError, match="context is no snapshot of this version of moedge"):
        engine.load_snapshot(path)
    with pytest.raises(EngineError, match=r"mem cannot be read \(Input/output error\); write another"):
        engine.load_snapshot("/proc/self/mem")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="pipe is no plain file; name another output file"):
        engine.save_snapshot(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo(), "not replaced"
    path.write_bytes(content)
    with load(fake_bundle, max_seq_len=len(PROMPT) - 1) as small:
        with pytest.raises(EngineError, match="has 21 tokens and the context has room for 20; .* a larger max_seq_len"):
            small.load_snapshot(path)
    other = fake_engine.write_bundle(tmp_path / "other", chain={1: 2})
    with load(other) as engine:
        with pytest.raises(EngineError, match="was saved with another bundle or engine .fake, engine 'cpu'.; save one"):
            engine.load_snapshot(path)


def forged(content, **changes):
    """A snapshot with another header, its checksum made anew: whole, and not what an engine wrote."""
    length = int.from_bytes(content[8:16], "little")
    header = json.dumps({**json.loads(content[16 : 16 + length]), **changes}).encode()
    made = content[:8] + len(header).to_bytes(8, "little") + header + content[16 + length : -32]
    return made + hashlib.sha256(made).digest()


def test_tampered_snapshots_are_refused_whatever_their_checksum_says(engine, tmp_path):
    path = tmp_path / "context"
    answer(engine)
    engine.save_snapshot(path)
    content = path.read_bytes()
    arrays = json.loads(content[16 : 16 + int.from_bytes(content[8:16], "little")])["arrays"]
    wider = [{**arrays[0], "shape": [len(PROMPT), 4]}, *arrays[1:]]
    huge = [{**arrays[0], "shape": [2**40, 2**20]}, *arrays[1:]]
    negative = [{**arrays[0], "shape": [-1, -1]}, *arrays[1:]]
    objects = [{**arrays[0], "dtype": "O"}, *arrays[1:]]
    for changes, text in (
        ({"tokens": [*PROMPT[:-1], fake_engine.VOCAB]}, "tokens out of range"),
        ({"tokens": ["a"] * len(PROMPT)}, "tokens out of range"),
        ({"tokens": 5}, "is no snapshot"),
        ({"tokens": []}, "tokens out of range"),
        ({"tokens": PROMPT[:-1]}, "holds another cache than this engine's"),
        ({"exact": len(PROMPT) + 1}, "tokens out of range"),
        ({"exact": -1}, "tokens out of range"),
        ({"arrays": wider}, "holds another cache than this engine's"),
        ({"arrays": huge}, "an array is larger than the file"),
        ({"arrays": negative}, "an array is larger than the file"),
        ({"arrays": objects}, "an array is larger than the file"),
        ({"arrays": arrays[1:]}, "holds another cache than this engine's"),
        ({"arrays": None}, "is no snapshot"),
        ({"arrays": [{}]}, "is no snapshot"),
        ({"made_by": None}, "was saved with another bundle or engine"),
        ({"made_by": [5]}, "was saved with another bundle or engine"),
    ):
        path.write_bytes(forged(content, **changes))
        with pytest.raises(EngineError, match=text):
            engine.load_snapshot(path)
    made = content[:8] + (3).to_bytes(8, "little") + b"[1]" + b"\0" * 40
    path.write_bytes(made + hashlib.sha256(made).digest())
    with pytest.raises(EngineError, match="is no snapshot .it has no header."):
        engine.load_snapshot(path)
    path.write_bytes(content)
    assert engine.load_snapshot(path) == len(PROMPT)


def test_snapshots_of_caches_by_heads(tmp_path):
    """A cache updated in place is laid out by heads; its rows go to disk and back all the same."""
    from moedge.runtime.preflight import CacheEntry
    from moedge.runtime.sessions.onnxruntime_cpu import OnnxruntimeCpuSession, aligned_empty

    session = OnnxruntimeCpuSession.__new__(OnnxruntimeCpuSession)
    entry = CacheEntry("key.0", 6, "float32", 2)
    session._cache = {entry.name: aligned_empty((1, 2, 10, 3), np.dtype(np.float32))}
    session._entries = (entry,)
    session._capacity, session._length, session.load = 10, 4, None
    values = np.arange(24, dtype=np.float32).reshape(1, 2, 4, 3)
    session._cache["key.0"][:, :, :4] = values
    rows = session.read_rows(1, 4)
    session.truncate(0)
    session.append_rows(rows)
    assert session.length == 3 and np.array_equal(session.read_rows(0, 3)[0], values[:, :, 1:])
    with pytest.raises(ValueError, match="these rows are of another cache"):
        session.append_rows([rows[0].astype(np.float64)])
    with pytest.raises(ValueError, match="no room for 3 tokens: 9 of 10 are taken"):
        session._length = 9
        session.append_rows(rows)
