"""`moedge serve`, asked by the official openai client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path

import fake_engine
import httpx
import numpy as np
import pytest
from serving import NAME, STREAM, serving

openai = pytest.importorskip("openai")

from moedge.errors import EngineError, UsageError  # noqa: E402
from moedge.runtime.engine import load  # noqa: E402
from moedge.runtime.openai_answers import Answer, sse  # noqa: E402
from moedge.runtime.requests import make_request  # noqa: E402
from moedge.runtime.scheduler import Job  # noqa: E402
from moedge.runtime.server_guard import Keys  # noqa: E402
from moedge.runtime.writing import TextWriter  # noqa: E402

LONGEST = fake_engine.MAX_SEQ_LEN
ENDLESS = {"max_tokens": 60, "logit_bias": {str(fake_engine.EOS): -100}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("server") / "bundle")
    with load(bundle, prefill_chunk=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, slots=3, queue=250) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client
    server.settle()


def alone(engine, prompt, **options):
    return "".join(engine.generate(prompt, **options))


@pytest.fixture
def slow(server, monkeypatch):
    """Steps that take their time, so that something can happen between them."""
    step = server.service.scheduler._step
    monkeypatch.setattr(server.service.scheduler, "_step", lambda work: (time.sleep(0.02), step(work))[1])


# Texts


def test_completions(client, engine):
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=9, temperature=0)
    want = engine.generate("hello", max_new_tokens=9)
    assert answer.choices[0].text == "".join(want) and answer.choices[0].finish_reason == want.finish_reason
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, len(want.tokens))
    assert answer.usage.total_tokens == 5 + len(want.tokens) and answer.model == NAME
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    several = client.completions.create(model=NAME, prompt=["hello", "world"], max_tokens=4, n=2, echo=True)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [text + alone(engine, text, max_new_tokens=4) for text in ("hello", "world")]
    assert [choice.text for choice in several.choices] == [texts[0]] * 2 + [texts[1]] * 2
    assert several.usage.prompt_tokens == 10
    by_ids = client.completions.create(model=NAME, prompt=[104, 105], max_tokens=4)
    assert by_ids.choices[0].text == alone(engine, [104, 105], max_new_tokens=4)
    both = client.completions.create(model=NAME, prompt=[[104], [105]], max_tokens=4)
    assert [choice.text for choice in both.choices] == [alone(engine, [t], max_new_tokens=4) for t in (104, 105)]


def test_chat(client, engine):
    messages = [{"role": "developer", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    answer = client.chat.completions.create(model=NAME, messages=messages, max_completion_tokens=8)
    want = engine.generate("<system>be<user>hi<assistant>", max_new_tokens=8)
    assert answer.choices[0].message.content == "".join(want) and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == want.prompt_tokens and answer.object == "chat.completion"


def test_streams_with_usage_at_the_end(client, engine):
    ask = {"model": NAME, "prompt": "hello", "max_tokens": 12, "stream": True}
    pieces = list(client.completions.create(**ask, stream_options={"include_usage": True}))
    want = engine.generate("hello", max_new_tokens=12)
    assert "".join(piece.choices[0].text for piece in pieces[:-1]) == "".join(want)
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]][-1] == want.finish_reason
    assert pieces[-1].choices == [] and pieces[-1].usage.completion_tokens == len(want.tokens)
    assert all(piece.usage is None and "usage" in piece.model_fields_set for piece in pieces[:-1])
    plain = list(client.completions.create(**ask))
    assert plain[-1].choices[0].finish_reason == want.finish_reason and len(plain) == len(pieces) - 1
    assert not any("usage" in piece.model_fields_set for piece in plain)
    messages = [{"role": "user", "content": "hi"}]
    chat = list(client.chat.completions.create(model=NAME, messages=messages, max_tokens=8, stream=True, n=2))
    for place in (0, 1):
        mine = [piece.choices[0] for piece in chat if piece.choices[0].index == place]
        text = "".join(choice.delta.content or "" for choice in mine)
        assert mine[0].delta.role == "assistant" and text == alone(engine, "<user>hi<assistant>", max_new_tokens=8)
        assert mine[-1].finish_reason


def test_options_reach_the_text(client, engine):
    ask = {"model": NAME, "prompt": "hello", "max_tokens": 8}
    options = {"temperature": 0.9, "top_p": 0.8, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    more = {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2}
    answer = client.completions.create(**ask, **options, extra_body=more)
    assert answer.choices[0].text == alone(engine, "hello", max_new_tokens=8, **options, **more)
    biased = client.completions.create(**ask, logit_bias={"65": 100}, stop=["AAAA"])
    assert biased.choices[0].text == "" and biased.choices[0].finish_reason == "stop"
    seeds = client.completions.create(**ask, n=2, temperature=1.0, seed=8)
    texts = [alone(engine, "hello", max_new_tokens=8, temperature=1.0, seed=seed) for seed in (8, 9)]
    assert [choice.text for choice in seeds.choices] == texts
    client.completions.create(**ask, seed=-5, temperature=1.0)


def test_logprobs(client, engine):
    want = engine.generate("hello", max_new_tokens=5, logprobs=2)
    list(want)
    answer = client.completions.create(model=NAME, prompt="hello", max_tokens=5, logprobs=2)
    found = answer.choices[0].logprobs
    assert found.token_logprobs == [one.logprob for one in want.logprobs] and len(found.tokens) == len(want.tokens)
    pieces = client.completions.create(model=NAME, prompt="hello", max_tokens=5, logprobs=2, stream=True)
    assert [place for piece in pieces for place in piece.choices[0].logprobs.text_offset] == found.text_offset
    ask = {"model": NAME, "messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**ask, max_tokens=6).choices[0].logprobs.content
    pieces = list(client.chat.completions.create(**ask, max_tokens=6, stream=True))
    streamed = [one for piece in pieces if piece.choices[0].logprobs for one in piece.choices[0].logprobs.content]
    assert streamed == whole and len(whole[0].top_logprobs) == 3
    assert whole[0].top_logprobs[0].logprob >= whole[0].logprob


def test_the_contexts_end(client):
    full = client.completions.create(model=NAME, prompt="a" * LONGEST, max_tokens=50, logit_bias={"65": 100})
    assert full.choices[0].text == "A" and full.choices[0].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="the prompt is too long: there is room for 64 tokens") as caught:
        client.completions.create(model=NAME, prompt="a" * (LONGEST + 1))
    assert caught.value.code == "context_length_exceeded"


def test_models(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "moedge"
    for ask in (
        lambda: client.models.retrieve("other"),
        lambda: client.completions.create(model="other", prompt="a"),
    ):
        with pytest.raises(openai.NotFoundError, match=f"there is no such model; this server has '{NAME}'"):
            ask()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature: Input should be "),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens: Input should be a valid integer"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"prompt": ""}, "prompt: must be a text, token ids, or a list of up to 64 of either, none of them empty"),
        ({"prompt": []}, "prompt: must be a text, token ids"),
        ({"prompt": [300]}, "token 300 at place 0 is out of range: this model's tokens are 0 to 299"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "\ud800"}, ""),
        ({"user": "\ud800", "stop": ["\udfff"]}, ""),
        ({"prompt": ["a"] * 9}, "prompts times n is more than 8"),
        ({"n": 9}, "prompts times n is more than 8"),
        ({"logit_bias": {"x": 1}}, "the keys of logit_bias must be token ids"),
        ({"logit_bias": {"300": 1}}, "logit_bias has token 300, which is out of range"),
        ({"stop": [""]}, "stop: must be a text, or a list of up to 16 texts, none of them empty"),
        ({"tools": [{"type": "function"}]}, "tools are not supported: leave them out"),
        ({"response_format": {"type": "json_object"}}, "response_format must be text"),
        ({"suffix": "x"}, "suffix is not supported: leave it out"),
        ({"echo": True, "logprobs": 1}, "echo and logprobs together are not supported"),
    ],
)
def test_wrong_requests(server, options, text):
    body = json.dumps({"model": NAME, "prompt": "a", **options}).encode()
    answer = server.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert text in answer.json()["error"]["message"]


def test_what_is_not_supported_in_a_chat_is_refused(client):
    ask = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    wrong = [{"tools": [tool]}, {"functions": [tool["function"]]}]
    wrong += [{"response_format": {"type": "json_object"}}, {"modalities": ["text", "audio"]}]
    for options in wrong:
        with pytest.raises(openai.BadRequestError, match="not supported|must be text"):
            client.chat.completions.create(**ask, **options)


# Load


def test_every_greedy_answer_under_load_is_the_one_alone(server, engine):
    """200 clients wait for 3 slots; some go away."""
    random = np.random.default_rng(4)
    prompts = [random.integers(0, 256, int(size)).tolist() for size in random.integers(1, 40, 60)]
    want = [alone(engine, prompt, max_new_tokens=10) for prompt in prompts]
    wrong: list[object] = []

    def work(start):
        with server.client(timeout=60) as client:
            for place in range(start, 200, 20):
                ask = {"model": NAME, "prompt": prompts[place % 60], "max_tokens": 10, "temperature": 0}
                if place % 3:
                    text = client.completions.create(**ask).choices[0].text
                else:
                    with client.completions.create(**ask, stream=True) as stream:
                        text = ""
                        for piece in stream:
                            text += piece.choices[0].text
                            if place % 9 == 0:
                                break
                if text != want[place % 60] and place % 9:
                    wrong.append((place, text))

    threads = [threading.Thread(target=work, args=(start,)) for start in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    server.settle()


def test_a_full_queue_answers_429(engine):
    with serving(engine, slots=1, queue=1) as server, server.client() as client:
        step = server.service.scheduler._step
        server.service.scheduler._step = lambda work: (time.sleep(0.02), step(work))[1]
        ask = {"model": NAME, "prompt": "a", **ENDLESS}
        streams = [client.completions.create(**ask, stream=True)]
        next(iter(streams[0]))
        waiting = threading.Thread(target=lambda: client.completions.create(**ask))
        waiting.start()
        while not server.service.scheduler.waiting:
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError, match="1 texts are waiting already") as caught:
            client.completions.create(**ask)
        assert 1 <= int(caught.value.response.headers["retry-after"]) <= 60
        waiting.join()
        server.settle()


def test_who_goes_away_frees_the_slot(server, slow):
    scheduler = server.service.scheduler
    for stream in (False, True):
        body = {"model": NAME, "prompt": "a", **ENDLESS, "stream": stream}
        with pytest.raises(httpx.ReadTimeout):
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.2))
            assert stream is False or answer
        if stream is False:
            began = time.monotonic()
            while scheduler.running:
                time.sleep(0.005)
            assert time.monotonic() - began < 0.5
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=5) as answer:
        next(answer.iter_lines())
        assert scheduler.running == 1
    server.settle()
    assert "cancelled" in server.http.get("/metrics").text


def test_deadlines(server, slow):
    ask = {"model": NAME, "prompt": "a", **ENDLESS}
    answer = server.http.post("/v1/completions", json={**ask, "timeout": 0.2}).json()
    assert answer["choices"][0]["finish_reason"] == "length" and 0 < answer["usage"]["completion_tokens"] < 60
    late = server.http.post("/v1/completions", json={**ask, "timeout": 1e-9})
    assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
    server.settle()


# Keys, limits, health


def test_api_keys(engine, tmp_path):
    (tmp_path / "keys").write_text("# who may\nann: secret-a\nbob:secret:b\nsecret-c\n")
    audit = tmp_path / "audit.jsonl"
    keys = Keys.read(tmp_path / "keys")
    with serving(engine, keys=keys, per_key=1, audit=audit) as server:
        assert keys.name_of(b"secret:b") == "bob", "all behind the first colon"
        for key in ("", "secret", "secret-a ", "ann", "sécret"):
            answer = server.http.get("/v1/models", headers={"authorization": f"Bearer {key}x".encode()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/healthz").status_code == 200
        with server.client(api_key="secret-a") as ann, server.client(api_key="secret-c") as other:
            step = server.service.scheduler._step
            server.service.scheduler._step = lambda work: (time.sleep(0.02), step(work))[1]
            stream = ann.completions.create(model=NAME, prompt="a", stream=True, **ENDLESS)
            next(iter(stream))
            with pytest.raises(openai.RateLimitError, match="this key has 1 requests running, which is all it may"):
                ann.completions.create(model=NAME, prompt="a")
            other.completions.create(model=NAME, prompt="private words", max_tokens=3)
            stream.close()
            server.settle()
    text = audit.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "private" not in text and {line["key"] for line in lines} == {"ann", "key-4"}
    (mine,) = [line for line in lines if line["key"] == "key-4"]
    assert lines[-1]["key"] == "ann" and lines[-1]["finish_reasons"] == ["cancelled"]
    assert mine["prompt_tokens"] == 13 and mine["completion_tokens"] == 3 and mine["finish_reasons"] == ["length"]
    assert len(mine["bundle_sha256"]) == 64 and mine["model"] == NAME and mine["path"] == "/v1/completions"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_an_audit_log_that_cannot_be_written_fails_no_text(engine, caplog):
    with serving(engine, audit=Path("/dev/full")) as server, server.client() as client:
        for _ in range(2):
            assert client.completions.create(model=NAME, prompt="a", max_tokens=2).usage.completion_tokens == 2
        server.settle()
    assert caplog.text.count("the audit log lacks an answer: No space left on device") == 2


def test_more_texts_than_there_are_places_for_are_not_told_to_come_again(engine):
    with serving(engine, slots=1, queue=1) as server, server.client() as client:
        with pytest.raises(openai.BadRequestError, match="prompts times n is more than 2"):
            client.completions.create(model=NAME, prompt="a", n=3)


def test_key_files_that_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    with pytest.raises(UsageError, match="the API keys in .*keys cannot be read"):
        Keys.read(path)
    for content, text in (
        ("# none\n", "keys has no API keys; write one on each line, as name:key"),
        ("a:b\na:c\n", "line 2 of .*keys has a name that was there already; write name:key, each name once"),
        ("a:\n", "line 1 of .*keys has no key; write name:key"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=text):
            Keys.read(path)
    monkeypatch.setenv("MOEDGE_API_KEYS", "ann:secret")
    assert Keys.read(None).name_of(b"secret") == "ann" and Keys.read(None).name_of(b"secre") is None
    monkeypatch.delenv("MOEDGE_API_KEYS")
    assert len(Keys.read(None)) == 0


def test_limits(engine):
    with serving(engine, max_body=1000, max_prompt_tokens=10, max_new_tokens=3, body_seconds=0.5) as server:
        with server.client() as client:
            assert client.completions.create(model=NAME, prompt="a", **ENDLESS).usage.completion_tokens == 3
            with pytest.raises(openai.BadRequestError, match="the prompt has 11 tokens; this server takes 10"):
                client.completions.create(model=NAME, prompt="a" * 11)
            with pytest.raises(openai.APIStatusError, match="the body is larger than 1000 bytes") as caught:
                client.completions.create(model=NAME, prompt="a" * 1000)
            assert caught.value.status_code == 413


def test_health_and_metrics(server, client):
    client.completions.create(model=NAME, prompt="same beginning", max_tokens=5)
    client.completions.create(model=NAME, prompt="same beginning", max_tokens=5)
    for path in ("healthz", "readyz", "metrics", "v1/models", f"v1/models/{NAME}", "v1/models/none", "openapi.json"):
        head, got = server.http.head(f"/{path}"), server.http.get(f"/{path}")
        assert (head.status_code, head.headers["content-type"]) == (got.status_code, got.headers["content-type"])
        assert head.content == b"" and int(head.headers["content-length"]) > 0
    assert server.http.head("/v1/completions").status_code == 405
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"status": "ready"}
    text = server.http.get("/metrics").text
    for name in (
        "moedge_time_to_first_token_seconds_count",
        "moedge_inter_token_latency_seconds_bucket",
        "moedge_queue_length 0.0",
        "moedge_batch_size_sum",
        "moedge_prefix_hits_total",
        "moedge_generated_tokens_total",
        'moedge_requests_total{path="/v1/completions",status="200"}',
    ):
        assert name in text
    server.http.get(f"/v1/{'x' * 50}")
    assert "xxx" not in server.http.get("/metrics").text, "labels come from a fixed set"
    assert server.http.get("/docs").status_code == 404


def test_memory_refused_fails_one_text(engine, monkeypatch):
    make = engine.new_context
    refusals = [EngineError(f"a cache in {engine.bundle.path} does not fit the memory"), MemoryError(), MemoryError()]
    monkeypatch.setattr(engine, "new_context", lambda: make() if not refusals else _raise(refusals.pop()))
    with serving(engine, slots=2) as server, server.client() as client:  # whose own first text is the first refused
        for text in ("not enough memory for this text", f"a cache in {NAME} does not fit"):
            with pytest.raises(openai.APIStatusError, match=text) as caught:
                client.completions.create(model=NAME, prompt="a")
            assert caught.value.status_code == 503
        assert client.completions.create(model=NAME, prompt="a", max_tokens=2).usage.completion_tokens == 2
        server.settle()
        numbers = server.http.get("/metrics").text
        assert "moedge_generated_tokens_total 2.0" in numbers, "a server's own first text is not counted"


def _raise(error):
    raise error


def test_a_text_that_fails_in_the_middle_of_its_stream(server, monkeypatch):
    count = []

    def step(work):
        count.append(1)
        return [EngineError("broken") for _ in work] if len(count) == 3 else real(work)

    real = server.service.scheduler._step
    monkeypatch.setattr(server.service.scheduler, "_step", step)
    with server.client() as client:
        with pytest.raises(openai.APIError, match="broken"):
            list(client.completions.create(model=NAME, prompt="a", stream=True, **ENDLESS))
    server.settle()


# Streams under load


def test_many_streams_are_written_together_with_an_event_for_each_token(engine, monkeypatch):
    """Every text is what it is alone, every token an event of its own, and few writes carry them."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "scripts"))
    from load_client import connected

    prompts = [[first, 7] for first in range(8)]
    bias = {**dict.fromkeys(range(128, 300), -100), 65: 3.0}
    options = {"max_tokens": 50, "temperature": 0, "logit_bias": bias, **STREAM}
    want = [alone(engine, prompt, max_new_tokens=50, logit_bias=bias, temperature=0) for prompt in prompts]

    async def crowd(port):
        async with connected(port, len(prompts)) as clients:
            asks = [{"model": NAME, "prompt": prompt, **options} for prompt in prompts]
            bodies = [json.dumps(ask).encode() for ask in asks]
            posts = [client.post("/v1/completions", body) for client, body in zip(clients, bodies, strict=True)]
            return await asyncio.gather(*posts)

    # All eight begin and end within a few rounds of each other; in between there are more than a few.
    with serving(engine, slots=8, stream_interval=5.0) as server:
        answers = asyncio.run(crowd(server.port))
        server.settle()
    assert [answer.text for answer in answers] == want
    for answer in answers:
        assert len(answer.events) == answer.tokens + 1 == 51
        chunks = [line for line in answer.body.split(b"\n") if line.endswith(b"\r")]
        assert len(chunks) < 50


@pytest.mark.parametrize("chat", [False, True])
def test_an_event_is_what_its_document_says(engine, chat):
    """Written from a frame, but equal to the document written whole, which the official client's types read."""
    jobs = [Job(make_request(engine, [1]), TextWriter(make_request(engine, [1]), None, frozenset()), print, 0, 1.0)]
    answer = Answer(chat, NAME, jobs, 1, engine.tokenizer, tells_usage=chat)
    kind = openai.types.chat.ChatCompletionChunk if chat else openai.types.Completion
    for text in ("a", 'quote " and \\ and \n', "\u00e9\u20ac\U0001f600", "\ud800", "data: [DONE]\n\n", "\x00\x7f"):
        event = answer.event(0, text, 0, 1, False)
        assert event == sse(answer.piece(0, text, 0, 1, False)) and event.count(b"\n\n") == 1
        document = json.loads(event.removeprefix(b"data: "))
        assert kind.construct(**document).model_dump(exclude_unset=True) == document
        choice = document["choices"][0]
        assert (choice["delta"]["content"] if chat else choice["text"]) == text
