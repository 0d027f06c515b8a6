"""The official client against `moedge serve`: errors by their classes, asyncio, timeouts, `n`, log-probabilities."""

from __future__ import annotations

import asyncio
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import fake_engine
import pytest
from serving import NAME, STREAM, serving

openai = pytest.importorskip("openai")

from moedge.errors import EngineError  # noqa: E402
from moedge.runtime.engine import load  # noqa: E402
from moedge.runtime.server_guard import Keys  # noqa: E402

ASK = {"model": NAME, "prompt": "hello", "max_tokens": 8}
NO_END = {str(fake_engine.EOS): -100}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("client") / "bundle")
    with load(bundle, prefill_chunk=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, slots=3, queue=250, keys=Keys({"ann": "secret"})) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client(api_key="secret") as client:
        yield client
    server.settle()


def asynchronous(server, **options):
    given = {"base_url": f"{server.url}/v1", "api_key": "secret", "max_retries": 0, **options}
    return openai.AsyncOpenAI(**given)


def test_errors_are_the_clients_own_classes(server, client, monkeypatch):
    with server.client(api_key="other") as stranger, pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(**{**ASK, "model": "gpt-4"})
    assert caught.value.code == "model_not_found" and caught.value.type == "not_found_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**ASK, temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    monkeypatch.setattr(server.service.scheduler, "_step", lambda work: [EngineError("no memory") for _ in work])
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(**ASK, logit_bias=NO_END)
    assert caught.value.status_code == 503 and caught.value.code == "engine_error"
    with pytest.raises(openai.APIError, match="no memory"):
        list(client.completions.create(**ASK, logit_bias=NO_END, **STREAM))


def test_a_client_that_waits_no_longer(server, client, monkeypatch):
    """Its timeout is its own affair, and frees the slot here."""
    step = server.service.scheduler._step
    monkeypatch.setattr(server.service.scheduler, "_step", lambda work: (time.sleep(0.05), step(work))[1])
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(**{**ASK, "max_tokens": 60}, logit_bias=NO_END, timeout=0.3)
    server.settle()
    assert server.service.scheduler.running == 0


def test_a_client_that_comes_again_when_it_is_told_to(engine):
    """429 with Retry-After: the official client waits that long and asks again by itself."""
    with serving(engine, slots=1, queue=1, per_key=1) as server, server.client(max_retries=5) as client:
        scheduler = server.service.scheduler
        step = scheduler._step
        scheduler._step = lambda work: (time.sleep(0.01), step(work))[1]
        stream = client.completions.create(**{**ASK, "max_tokens": 60}, logit_bias=NO_END, stream=True)
        next(iter(stream))
        began = time.monotonic()
        assert client.completions.create(**ASK).choices[0].text
        assert time.monotonic() - began > 0.4, "it was refused at first"
        stream.close()
        server.settle()


def test_many_texts_by_asyncio(server, engine):
    """Streams and whole answers side by side, each what it is alone."""
    prompts = [f"{'hello ' * (place % 4)}{place}" for place in range(24)]
    want = [engine.generate(prompt, max_new_tokens=8) for prompt in prompts]
    texts = ["".join(text) for text in want]

    async def ask(client, place):
        given = {**ASK, "prompt": prompts[place], "temperature": 0}
        if place % 2:
            return (await client.completions.create(**given)).choices[0].text
        pieces = [piece async for piece in await client.completions.create(**given, **STREAM)]
        assert pieces[-1].usage.completion_tokens == len(want[place].tokens)
        return "".join(choice.text for piece in pieces for choice in piece.choices)

    async def all_of_them():
        async with asynchronous(server) as client:
            return await asyncio.gather(*(ask(client, place) for place in range(len(prompts))))

    assert asyncio.run(all_of_them()) == texts
    server.settle()


def test_a_cancelled_task_frees_its_slot(server, monkeypatch):
    step = server.service.scheduler._step
    monkeypatch.setattr(server.service.scheduler, "_step", lambda work: (time.sleep(0.02), step(work))[1])

    async def leave():
        async with asynchronous(server) as client:
            given = {**ASK, "max_tokens": 60, "logit_bias": NO_END}
            whole = asyncio.ensure_future(client.completions.create(**given))
            while not server.service.scheduler.running:  # it is the first, however busy the machine
                await asyncio.sleep(0.002)
            stream = await client.completions.create(**given, stream=True)
            async for _ in stream:
                break
            assert server.service.scheduler.running == 2
            whole.cancel()
            with pytest.raises(asyncio.CancelledError):
                await whole
            await stream.close()

    asyncio.run(leave())
    server.settle()


def test_samples_with_log_probabilities_in_a_stream(client, engine):
    """`n`, `seed`, `logprobs` and `stream_options` together; the pieces are those of the texts one by one."""
    options = {"temperature": 1.0, "seed": 11}
    given = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, **options}
    more = {"logprobs": True, "top_logprobs": 2, **STREAM, "n": 3}
    pieces = list(client.chat.completions.create(**given, **more))
    assert pieces[-1].choices == [] and pieces[-1].usage.prompt_tokens_details.cached_tokens >= 0
    made = 0
    for place in range(3):
        text = engine.generate(
            "<user>hi<assistant>", max_new_tokens=6, temperature=1.0, seed=11 + place, logprobs=2
        )
        whole = "".join(text)
        mine = [piece.choices[0] for piece in pieces[:-1] if piece.choices[0].index == place]
        assert "".join(choice.delta.content or "" for choice in mine) == whole
        found = [one for choice in mine if choice.logprobs for one in choice.logprobs.content]
        assert [one.logprob for one in found] == [one.logprob for one in text.logprobs]
        tops = [[entry.logprob for entry in one.top_logprobs] for one in found]
        assert tops == [[value for _, value in one.top] for one in text.logprobs]
        assert mine[-1].finish_reason == text.finish_reason
        made += len(text.tokens)
    assert pieces[-1].usage.completion_tokens == made


def test_while_texts_end_nobody_else_is_taken_in(engine):
    """A graceful end: the running stream is finished, new connections are refused."""
    with serving(engine, slots=2) as server, server.client() as client, server.client() as late:
        scheduler = server.service.scheduler
        step = scheduler._step
        scheduler._step = lambda work: (time.sleep(0.03), step(work))[1]
        stream = iter(client.completions.create(**{**ASK, "max_tokens": 60}, logit_bias=NO_END, **STREAM))
        pieces = [next(stream)]
        server.uvicorn.should_exit = True
        refused = False
        while not refused and scheduler.running:
            try:
                late.completions.create(**{**ASK, "max_tokens": 1})
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                refused = True
                assert getattr(error, "status_code", 503) == 503
        assert refused and scheduler.running, "refused while the stream goes on"
        pieces += list(stream)
        assert pieces[-2].choices[0].finish_reason == "length" and pieces[-1].usage.completion_tokens == 60


def test_what_is_not_over_at_the_end_ends_with_what_it_has(engine, caplog):
    """No answer of 500, no stream without its end, no traceback; who has nothing yet is told 503."""
    asked = {**ASK, "max_tokens": 1000, "logit_bias": NO_END}
    with serving(engine, slots=2, drain=0.2) as server, server.client() as client, ThreadPoolExecutor() as pool:
        server.uvicorn.config.timeout_graceful_shutdown = 1
        step = server.service.scheduler._step
        server.service.scheduler._step = lambda work: (time.sleep(0.03), step(work))[1]
        stream = iter(client.completions.create(**asked, **STREAM))
        pieces = [next(stream)]
        whole = pool.submit(client.completions.create, **asked)
        while server.service.scheduler.running < 2:
            time.sleep(0.002)
        waits = pool.submit(client.completions.create, **asked)
        while not server.service.scheduler.waiting:
            time.sleep(0.002)
        with socket.create_connection(("127.0.0.1", server.port)) as late:
            late.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{")
            while server.service.scheduler.running and len(server.uvicorn.server_state.tasks) < 4:
                time.sleep(0.002)
            server.uvicorn.should_exit = True
            pieces += list(stream)
            assert late.recv(100).startswith(b"HTTP/1.1 503 ")
        made = pieces[-1].usage.completion_tokens
        assert pieces[-2].choices[0].finish_reason == "length" and 1 <= made < 1000
        choice = whole.result().choices[0]
        assert choice.finish_reason == "length" and choice.text
        with pytest.raises(openai.InternalServerError, match="the server is closing") as refused:
            waits.result()
        assert refused.value.status_code == 503
    assert "Exception in ASGI application" not in caplog.text
