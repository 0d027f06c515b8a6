"""Whatever comes over the wire: no 500, nothing in the log, no stuck slot, nothing left open."""

from __future__ import annotations

import gc
import json
import os
import re
import socket
import struct
import time

import fake_engine
import httpx
import pytest
from serving import NAME, serving

from moedge.export.memory import resident_bytes
from moedge.runtime.engine import load

pytest.importorskip("schemathesis")

from random_requests import ask_by_schema, ask_bytes, ask_fields  # noqa: E402

MARK = "a prompt that nobody may log"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("faults") / "bundle")
    with load(bundle, prefill_chunk=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine, slots=2, max_body=100_000, max_new_tokens=3, body_seconds=0.5) as server:
        yield server


@pytest.fixture(autouse=True)
def unharmed(server, capfd):
    """What must hold after each test."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    server.settle()
    metrics = server.http.get("/metrics").text
    assert not re.findall(r'moedge_requests_total{.*status="500"}', metrics)
    answer = server.http.post("/v1/completions", json={"model": NAME, "prompt": "a"}, timeout=10)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3
    out, err = capfd.readouterr()
    assert "Traceback" not in err and MARK not in out + err, err
    for _ in range(100):  # connections that were cut are closed a moment later
        gc.collect()
        if len(os.listdir("/proc/self/fd")) <= files + 8:
            return
        time.sleep(0.05)
    raise AssertionError("connections stay open")


def post(server, content, path="completions", **headers):
    headers = {"content-type": "application/json", **headers}
    return server.http.post(f"/v1/{path}", content=content, headers=headers)


# Bodies


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"model": "\xff", "prompt": "a"}',
        b"\x00" * 50,
        b"[" * 50_000,
        b'{"a":' * 9_000,
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": -Infinity}',
        b'{"model": "tiny", "prompt": "a", "n": true}',
        b'{"model": "tiny", "prompt": [1, "a"]}',
        b'{"model": "tiny", "prompt": [[1], "a"]}',
        b'{"model": "tiny", "prompt": [99999999999999999999999]}',
        b'{"model": "tiny", "prompt": [1.5]}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"\\ud800": 1}',
        b'{"model": "tiny", "prompt": "a", "stop": "\\ud800", "logit_bias": {"\\ud800": 1}}',
        b'{"model": "tiny", "prompt": "a", "stream_options": 5, "stream": "yes"}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"-1": 1}}',
        b'{"model": "tiny", "prompt": "a", "logit_bias": {"\xc2\xb2": 1}}',
    ],
)
def test_bodies_that_are_no_request(server, body):
    for path in ("completions", "chat/completions"):
        answer = post(server, body, path)
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "boss", "content": MARK}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "{{ 1/0 }}{% for %}"}],
        [{"role": "user", "content": "\ud800"}],
        [{"role": "user", "content": "x", "name": "\x00"}] * 30,
        [{"role": "assistant", "content": None}, {"role": "tool", "content": ""}],
        "text",
        {"role": "user"},
    ],
)
def test_odd_messages(server, messages):
    answer = post(server, json.dumps({"model": NAME, "messages": messages}).encode(), "chat/completions")
    assert answer.status_code in (200, 400) and answer.json()


@pytest.mark.parametrize("kind", [None, "", "application/x-www-form-urlencoded", "text/plain", "multipart/form-data"])
def test_a_body_that_is_not_called_json(server, kind):
    """What `curl -d` sends by itself is called a form; the answer names the header and says what it must be."""
    body = json.dumps({"model": NAME, "prompt": MARK}).encode()
    request = server.http.build_request("POST", "/v1/completions", content=body)
    if kind is not None:
        request.headers["content-type"] = kind
    answer = server.http.send(request)
    was = f"is {kind!r}" if kind else "is missing"
    assert answer.status_code == 400
    text = f"the header Content-Type {was}; send JSON, with Content-Type: application/json"
    assert answer.json()["error"]["message"] == text


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b'{"model": "x", "prompt": \'a\'}', "the body is no JSON: Expecting value at character 25"),
        (b"", "Field required"),
        (b'{"model": "x"', "the body is no JSON: Expecting ',' delimiter at character 13"),
    ],
)
def test_a_body_that_is_no_json_is_told_where(server, body, text):
    answer = post(server, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["message"], error["param"]) == (text, None)


def test_json_by_any_name_of_it(server):
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.api+json"):
        answer = post(server, json.dumps({"model": NAME, "prompt": "a"}).encode(), **{"content-type": kind})
        assert answer.status_code == 200, (kind, answer.text)


def test_a_model_without_a_chat_template(server, monkeypatch):
    monkeypatch.setattr(server.service.engine.tokenizer, "_config", {})
    ask = {"model": NAME, "messages": [{"role": "user", "content": "a"}]}
    answer = post(server, json.dumps(ask).encode(), "chat/completions")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "no_chat_template"
    assert answer.json()["error"]["message"] == "this model has no chat template: ask /v1/completions"


def test_other_types_methods_and_places(server):
    assert post(server, b"prompt=a", **{"content-type": "text/plain"}).status_code == 400
    for method, path, status in (("GET", "completions", 405), ("DELETE", "models", 405), ("POST", "nothing", 404)):
        answer = server.http.request(method, f"/v1/{path}")
        assert answer.status_code == status and answer.json()["error"]["message"]
    told = server.http.get("/v1/nothing").json()["error"]["message"]
    assert told == "there is nothing at /v1/nothing; see /openapi.json"
    assert server.http.get(f"/v1/models/{'%2e%2e%2f' * 20}etc").status_code == 404
    assert server.http.get("/v1/models/%ff%fe").status_code == 404


def test_large_bodies_are_refused_before_they_are_read(server):
    before = resident_bytes()
    answer = post(server, b" " * 200_000)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"

    def endless():
        for _ in range(100):
            yield b" " * (1 << 20)

    for _ in range(3):
        try:
            assert post(server, endless()).status_code == 413
        except httpx.TransportError:
            pass  # the server hung up while the rest was still being sent
    with connection(server) as peer:
        peer.sendall(head(100 << 20))
        assert b" 413 " in peer.recv(1000)
    assert resident_bytes() - before < 32 << 20


# Connections


def connection(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def head(length):
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def test_sockets_closed_in_the_middle(server):
    body = json.dumps({"model": NAME, "prompt": MARK, "stream": True}).encode()
    whole = head(len(body)) + body
    for cut in (0, 1, 20, 60, len(whole) - len(body), len(whole) - 5, len(whole)):
        for reset in (False, True):
            with connection(server) as peer:
                peer.sendall(whole[:cut])
                if cut == len(whole):
                    peer.recv(10)
                if reset:
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: " + b"9" * 4000 + b"\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_bytes_that_are_no_http(server, data):
    with connection(server) as peer:
        try:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            answer = peer.recv(1000)
        except OSError:
            return
        assert not answer or re.match(rb"HTTP/1.1 4\d\d", answer), answer


def test_bodies_that_come_slowly(server):
    with connection(server) as peer:
        peer.sendall(head(50))
        began = time.monotonic()
        for _ in range(100):
            try:
                peer.sendall(b" ")
                peer.settimeout(0.05)
                answer = peer.recv(1000)
                break
            except TimeoutError:
                continue
    assert b" 408 " in answer and time.monotonic() - began < 5


def test_readers_that_do_not_read(server):
    body = json.dumps({"model": NAME, "prompt": "a", "stream": True}).encode()
    with connection(server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        peer.sendall((head(len(body)) + body) * 20)  # pipelined, and nothing is read
        time.sleep(0.2)
        assert server.http.get("/healthz", timeout=5).status_code == 200


# Random requests


def test_random_fields(server):
    asked = ask_fields(server.http, 100)
    assert {200, 400} <= set(asked) <= {200, 400, 429, 504}, asked


def test_random_bytes(server):
    assert set(ask_bytes(server.http, 60)) <= {400, 404}


def test_random_requests_by_the_servers_own_openapi(server):
    """`scripts/fuzz_server.py` sends 10,000 of both."""
    asked = ask_by_schema(server.url, 20, seconds=5)
    assert 200 in asked and 400 in asked and asked.total() > 20
