"""Loading and running an engine: one result however the tokens come, a cache that stays in place, clear errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner

import moedge
from moedge.errors import EngineError, UsageError
from moedge.runtime.commands import generate_command, inspect_command
from moedge.runtime.engine import load

TOKENS = np.random.default_rng(3).integers(0, 256, 40)


@pytest.fixture(scope="session")
def fake_bundle(tmp_path_factory):
    return fake_engine.write_bundle(tmp_path_factory.mktemp("engine") / "bundle")


@pytest.fixture
def engine(fake_bundle):
    with load(fake_bundle) as engine:
        yield engine


def chained(folder, text, then=fake_engine.EOS):
    """A bundle whose model surely writes `text` after a NUL byte, then the token `then` for ever."""
    data = [0, *text.encode(), then]
    assert len(set(data)) == len(data), "each byte can have one successor"
    return fake_engine.write_bundle(folder / "chained", chain={**dict(zip(data, data[1:], strict=False)), then: then})


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 256])
def test_logits_and_routing_are_the_same_in_any_chunks(engine, fake_bundle, chunk):
    with load(fake_bundle, prefill_chunk=chunk) as other:
        np.testing.assert_allclose(other.logits(TOKENS), engine.logits(TOKENS), atol=1e-4)
        ours, theirs = other.routing(TOKENS), engine.routing(TOKENS)
    assert ours.experts.tolist() == theirs.experts.tolist()
    np.testing.assert_allclose(ours.weights, theirs.weights, atol=1e-4)


def test_a_rewound_cache_gives_the_same_logits(engine):
    session = engine.session
    want = engine.logits(TOKENS)
    session.truncate(17)
    rest = session.step(TOKENS[17:], np.arange(len(TOKENS) - 17))
    np.testing.assert_allclose(rest, want[17:], atol=1e-4)
    with pytest.raises(ValueError, match="cannot truncate 40 tokens to 41"):
        session.truncate(41)


def test_shapes_and_types(engine):
    logits = engine.logits(TOKENS.tolist())
    assert logits.shape == (40, fake_engine.VOCAB) and logits.dtype == np.float32
    experts, weights = engine.routing(TOKENS)
    shape = (len(fake_engine.MOE_LAYERS), 40, fake_engine.TOP_K)
    assert experts.shape == weights.shape == shape
    assert experts.dtype == np.int64 and weights.dtype == np.float32
    assert 0 <= experts.min() and experts.max() < fake_engine.EXPERTS
    assert engine.profile == "cpu" and engine.config["vocab_size"] == fake_engine.VOCAB
    assert engine.tokenize("hi") == [104, 105] and engine.detokenize(np.array([104, 105])) == "hi"
    assert engine.detokenize([]) == ""
    with pytest.raises(EngineError, match="token -1 at place 1 is out of range"):
        engine.detokenize([104, -1])


def test_the_cache_stays_where_it_is_and_rows_land_in_it(engine):
    session = engine.session
    buffers = session._cache
    before = {name: buffer.ctypes.data for name, buffer in buffers.items()}
    assert all(address % 64 == 0 for address in before.values())
    for buffer in buffers.values():
        buffer[:] = np.inf
    engine.prefill(TOKENS[:5])
    rows = {name: buffer[:5].copy() for name, buffer in buffers.items()}
    session.step(TOKENS[5:6], np.array([0]))
    for name, buffer in buffers.items():
        assert np.isfinite(buffer[:6]).all() and np.isinf(buffer[6:]).all()
        assert (buffer[:5] == rows[name]).all(), "a step does not touch earlier rows"
        assert buffer.ctypes.data == before[name]
    assert {view.name: view.address for view in session.views} == before


def test_decoding_binds_tokens_and_logits_once(engine):
    session = engine.session
    engine.prefill(TOKENS[:5])
    first = session.step(np.array([1]), np.array([0]))
    second = session.step(np.array([2]), np.array([0]))
    assert first is second


def test_generated_text(tmp_path):
    with load(chained(tmp_path, "def x(€)")) as engine:
        generation = engine.generate("\0")
        assert list(generation) == ["d", "e", "f", " ", "x", "(", "€", ")"]
        assert generation.finish_reason == "stop"
        assert generation.prompt_tokens == 1
        assert generation.tokens == [*"def x(€)".encode(), fake_engine.EOS]
        assert 0 < generation.prompt_seconds <= generation.seconds
        assert "".join(engine.generate([0], max_new_tokens=3)) == "def"
        short = engine.generate([0], max_new_tokens=7)
        assert "".join(short) == "def x(\ufffd" and short.finish_reason == "length"
        assert "".join(engine.generate(list("\0def x(€".encode()[:-1]))) == "€)", "ids may end inside a character"


def test_stop_texts_span_tokens_and_are_not_given_out(tmp_path):
    with load(chained(tmp_path, "one, twy", then=256)) as engine:
        generation = engine.generate([0], stop=["zz", ", t"])
        assert "".join(generation) == "one" and generation.finish_reason == "stop"
        assert "".join(engine.generate([0], max_new_tokens=6, stop=[", tw"])) == "one, t"


def test_seeds_repeat_exactly(engine, fake_bundle):
    def text(engine, seed):
        return "".join(engine.generate("hello", max_new_tokens=20, temperature=1.0, top_p=0.9, seed=seed))

    assert text(engine, 5) == text(engine, 5) != text(engine, 6)
    with load(fake_bundle, prefill_chunk=2) as other:
        assert text(other, 5) == text(engine, 5)
    sampled = engine.generate("hello", max_new_tokens=20, temperature=1.0)
    first = "".join(sampled)
    again = engine.generate("hello", max_new_tokens=20, temperature=1.0, seed=sampled.seed)
    assert "".join(again) == first


def test_the_models_own_defaults(tmp_path):
    bundle = fake_engine.write_bundle(tmp_path / "bundle")
    (bundle / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 3, "eos_token_id": [7, 9]}))
    with load(bundle) as engine:
        assert engine.eos_token_ids == {7, 9}
        assert engine.generate("a", max_new_tokens=1).sampling.top_k == 3
        assert engine.generate("a", max_new_tokens=1, temperature=0).sampling.temperature == 0


def test_chat_uses_the_template(tmp_path):
    bundle = fake_engine.write_bundle(tmp_path / "bundle")
    with load(bundle) as engine:
        generation = engine.generate("hi", chat=True, max_new_tokens=1)
        assert generation.prompt_tokens == len("<user>hi<assistant>")
        with pytest.raises(UsageError, match="chat takes a text, not token ids"):
            engine.generate([1, 2], chat=True)


def test_context_end(tmp_path):
    with load(chained(tmp_path, "a", then=98)) as engine:
        capacity = fake_engine.MAX_SEQ_LEN
        full = engine.generate([0])
        assert "".join(full) == "a" + "b" * (capacity - 1) and full.finish_reason == "length"
        exact = engine.generate([0], max_new_tokens=capacity)
        assert len("".join(exact)) == capacity
        over, pieces = engine.generate([0], max_new_tokens=capacity + 1), []
        with pytest.raises(EngineError) as caught:
            pieces.extend(over)
        assert len("".join(over.tokens and pieces)) == capacity, "what there was room for has come"
        assert str(caught.value) == (
            "context is full: 1 tokens of the prompt and 64 of the 65 new ones fill the 64 there is room for; ask "
            "for fewer new tokens or give a shorter prompt, or make room: "
            f"moedge build {engine.bundle.path} --profile cpu --max-seq-len 128"
        )
        with pytest.raises(EngineError, match="context is full: the prompt has 65 tokens and there is room for 64; "):
            engine.generate([0] * 65)
        with pytest.raises(EngineError, match="context is full: .* room for 64 tokens, 60 are in it and 5 more came"):
            engine.logits([0] * 60)
            engine.session.step(np.zeros(5, np.int64), np.array([0]))
    with load(engine.bundle, max_seq_len=10) as small:
        with pytest.raises(EngineError, match="context is full: .* or load with max_seq_len up to 64"):
            small.logits([0] * 11)
    fake_engine.edit_json(engine.bundle.path / "engines/cpu/engine.json", max_seq_len=128)
    with load(engine.bundle) as large:
        with pytest.raises(EngineError, match=r"full: .* give a shorter prompt \(the model has 128 positions\)"):
            large.logits([0] * 129)


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([], "the prompt is empty: give at least one token"),
        ([1, 300], "token 300 at place 1 is out of range: this model's tokens are 0 to 299"),
        ([-1], "token -1 at place 0 is out of range: this model's tokens are 0 to 299"),
        ([1.5], r"token ids must be a list of whole numbers, not float64 of shape \(1,\)"),
        ([[1, 2]], r"token ids must be a list of whole numbers, not int64 of shape \(1, 2\)"),
        ([[1], [2, 3]], "token ids must be a list of whole numbers, not lists of several lengths"),
        (["a"], "token ids must be a list of whole numbers, not <U1"),
    ],
)
def test_wrong_tokens(engine, ids, text):
    for call in (engine.logits, engine.routing, engine.generate):
        with pytest.raises(EngineError, match=text):
            call(ids)


def test_wrong_arguments(engine, fake_bundle):
    with pytest.raises(EngineError, match="the prompt is empty"):
        engine.generate("")
    with pytest.raises(UsageError, match="max_new_tokens is 0; it must be a whole number, 1 or more"):
        engine.generate("a", max_new_tokens=0)
    with pytest.raises(UsageError, match="a stop text must not be empty"):
        engine.generate("a", stop=[""])
    with pytest.raises(UsageError, match="threads is 0; it must be a whole number, 1 or more"):
        load(fake_bundle, threads=0)
    with pytest.raises(EngineError, match="max_seq_len 65 is more than engine 'cpu' was built for .*--max-seq-len 65"):
        load(fake_bundle, max_seq_len=65)


def test_nan_logits(tmp_path):
    with load(fake_engine.write_bundle(tmp_path / "bundle", nan=True)) as engine:
        with pytest.raises(EngineError, match="the model gave NaN after token 0: .* check them: moedge verify"):
            engine.logits([1, 2])
        with pytest.raises(EngineError, match="the model gave no usable logits"):
            list(engine.generate("a"))


def test_closed_engine(fake_bundle):
    with load(fake_bundle) as engine:
        running = engine.generate("a", max_new_tokens=5)
        next(running)
    engine.close()
    with pytest.raises(EngineError, match="the engine is closed; load it again"):
        engine.logits([1])
    with pytest.raises(EngineError, match="the engine is closed"):
        list(running)
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.generate("a")


def test_another_call_ends_a_running_generation(engine):
    running = engine.generate([1], max_new_tokens=50)
    next(running)
    engine.logits([1, 2])
    with pytest.raises(EngineError, match="another call has taken this engine's context while a generation"):
        list(running)


def test_memory_threads_and_files_come_back(fake_bundle):
    """`scripts/check_loading.py --loads 1000` does it a thousand times."""

    def held():
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
        return resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    states = []
    for round in range(60):
        with load(fake_bundle, threads=2) as engine:
            engine.logits(TOKENS)
            list(engine.generate(TOKENS, max_new_tokens=2))
        if round % 20 == 19:
            states.append(held())
    (before, *most), (after, *left) = states[0], states[-1]
    assert after - before < 8 << 20 and left <= most


def test_load_needs_no_builder():
    code = (
        "import sys, moedge; from moedge.runtime import engine, commands, preflight;"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'tensorrt_rtx', 'rich', 'tokenizers', 'jinja2'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generate_command(tmp_path):
    bundle = chained(tmp_path, "def x(€)")
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "\0"])
    assert (result.exit_code, result.stdout) == (0, "def x(€)\n")
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "-", "--json", "-n", "4"], input="\0")
    document = json.loads(result.stdout)
    assert document["text"] == "def " and document["tokens"] == list(b"def ")
    assert (document["prompt_tokens"], document["finish_reason"], document["seed"]) == (1, "length", None)
    assert document["seconds"] >= document["ttft_s"] > 0
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "a", "--logprobs", "2"])
    told = "--logprobs is written with --json alone; add --json, or leave --logprobs out"
    assert str(result.exception) == told
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "-"], input=b"\xff")
    assert str(result.exception) == "the prompt on stdin is not UTF-8 (byte 0); convert it first"


def test_generate_command_stops_at_the_context_end_unless_told_how_many(tmp_path):
    bundle = chained(tmp_path, "a", then=98)
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "\0"])
    assert (result.exit_code, len(result.stdout)) == (0, 65)
    result = CliRunner().invoke(generate_command, [str(bundle), "-p", "\0", "-n", "70"])
    assert isinstance(result.exception, EngineError)


def test_inspect_command(fake_bundle, tmp_path):
    document = json.loads(CliRunner().invoke(inspect_command, [str(fake_bundle), "--json"]).stdout)
    assert document["model"]["name"] == "fake"
    assert [(engine["profile"], engine["runs_here"]) for engine in document["engines"]] == [("cpu", True)]
    kernels = document["engines"][0]["kernels"]
    text = CliRunner().invoke(inspect_command, [str(fake_bundle)]).stdout
    assert (f"cpu: its kernels here are {kernels}" in text) == (kernels is not None)
    assert document["engines"][0]["why_not_own_kernels"] is None  # it has no graph for them
    bare = tmp_path / "bare"
    shutil.copytree(fake_bundle, bare, ignore=shutil.ignore_patterns("engines"))
    text = CliRunner().invoke(inspect_command, [str(bare)]).stdout
    assert "experts" in text and "moedge.SigmoidTopKGate" in text and "moedge build" in text


def test_inspect_says_why_own_kernels_do_not_run(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEDGE_KERNELS", "stock")
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(inspect_command, [str(tiny_bundle)]).stdout
    told = "cpu: its kernels here are onnxruntime (MOEDGE_KERNELS is 'stock'; unset it)"
    assert told in " ".join(shown.split())


def test_load_is_public(fake_bundle):
    with moedge.load(str(fake_bundle), profile="cpu") as engine:
        assert engine.profile == "cpu"
