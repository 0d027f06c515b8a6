"""Clients that take their time, over raw sockets: bounded time and memory, and the others go on."""

from __future__ import annotations

import json
import socket
import time
from types import SimpleNamespace

import fake_engine
import pytest
from serving import NAME, serving

from moedge.runtime.engine import load
from moedge.runtime.server_patience import patient_protocol

ASK = {"model": NAME, "prompt": "a", "max_tokens": 3}
HEADER_SECONDS, WRITE_SECONDS, CONNECTIONS = 0.4, 0.8, 12


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    bundle = fake_engine.write_bundle(tmp_path_factory.mktemp("slow") / "bundle")
    limits = {"header_seconds": HEADER_SECONDS, "write_seconds": WRITE_SECONDS, "connections": CONNECTIONS}
    more = {"max_body": 50_000, "all_bodies": 80_000, "send_buffer": 4096}
    with load(bundle, prefill_chunk=8) as engine, serving(engine, slots=2, **limits, **more) as server:
        yield server


@pytest.fixture(autouse=True)
def others_go_on(server):
    yield
    server.settle()
    for _ in range(500):  # connections of the test, which end by themselves
        if len(connections(server)) <= 1:
            break
        time.sleep(0.01)
    assert len(connections(server)) <= 1, "a connection stays open"
    assert server.http.post("/v1/completions", json=ASK).json()["usage"]["completion_tokens"] == 3


def connections(server):
    return server.uvicorn.server_state.connections


def connect(server):
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def request(**changes):
    body = json.dumps({**ASK, **changes}).encode()
    return head(len(body)) + body


def head(length):
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def read_until_closed(peer):
    found = b""
    try:
        while part := peer.recv(65536):
            found += part
    except ConnectionResetError:
        pass
    return found


def drip(peer, data):
    """Send a byte now and then until the server hangs up; how long that took."""
    began = time.monotonic()
    try:
        for place in range(len(data)):
            peer.sendall(data[place : place + 1])
            time.sleep(0.02)
            peer.settimeout(0.001)
            try:
                if peer.recv(1, socket.MSG_PEEK) is not None:
                    break
            except TimeoutError:
                pass
    except OSError:
        pass
    peer.settimeout(10)
    return time.monotonic() - began


def test_headers_that_come_slowly(server):
    """Each byte is in time, the header is not (slowloris)."""
    with connect(server) as peer:
        taken = drip(peer, head(10)[:-2] + b"x: y\r\n" * 1000)
        assert read_until_closed(peer).startswith(b"HTTP/1.1 408 ")
    assert HEADER_SECONDS / 2 < taken < 10 * HEADER_SECONDS


def test_connections_on_which_nothing_comes(server):
    peers = [connect(server) for _ in range(8)]
    began = time.monotonic()
    assert server.http.post("/v1/completions", json=ASK).status_code == 200
    for peer in peers:
        with peer:
            assert read_until_closed(peer).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 10 * HEADER_SECONDS


def test_a_second_header_that_comes_slowly(server):
    """The first byte of it ends the limit for connections that are kept; its own goes on."""
    with connect(server) as peer:
        peer.sendall(request())
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")
        taken = drip(peer, head(10)[:-2] + b"x: y\r\n" * 1000)
        assert b"HTTP/1.1 408 " in read_until_closed(peer)
    assert taken < 10 * HEADER_SECONDS


def test_a_text_that_takes_longer_than_a_header_may(server, monkeypatch):
    step = server.service.scheduler._step
    monkeypatch.setattr(server.service.scheduler, "_step", lambda work: (time.sleep(0.05), step(work))[1])
    with connect(server) as peer:
        began = time.monotonic()
        peer.sendall(request(max_tokens=20, stream=True, logit_bias={str(fake_engine.EOS): -100}))
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            found += peer.recv(65536)
        assert time.monotonic() - began > 2 * HEADER_SECONDS and b"[DONE]" in found
        peer.sendall(request())  # and the connection is still good
        assert peer.recv(65536).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("stream", [False, True])
def test_readers_that_do_not_read(server, stream):
    """600 KB of log-probabilities that nobody takes: the text ends, the connection is cut, its place is free."""
    with connect(server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bias = {str(fake_engine.EOS): -100}
        peer.sendall(request(stream=stream, max_tokens=60, n=8, logprobs=20, logit_bias=bias))
        began = time.monotonic()
        while not server.service.scheduler.running:
            assert time.monotonic() - began < 10
            time.sleep(0.005)
        while server.service._serving or len(connections(server)) > 1:
            assert time.monotonic() - began < 20, "the reader holds its place"
            time.sleep(0.01)
        assert b"HTTP/1.1 200 " in read_until_closed(peer)


class Loop:
    """Timers that end when the test says so."""

    def call_later(self, seconds, call):
        assert seconds == WRITE_SECONDS
        self.call = call


def test_who_takes_32_kib_in_each_span_of_time_is_not_cut_off(monkeypatch):
    protocol = object.__new__(patient_protocol(HEADER_SECONDS, WRITE_SECONDS, CONNECTIONS))
    waiting, cut = [200_000], []
    protocol.loop, protocol.transport = Loop(), SimpleNamespace(
        get_write_buffer_size=lambda: waiting[0], abort=lambda: cut.append(waiting[0])
    )
    protocol._watch_writing()
    for _ in range(3):
        waiting[0] -= 32 << 10
        protocol.loop.call()
        assert not cut
    waiting[0] -= (32 << 10) - 1
    protocol.loop.call()
    assert cut == [200_000 - 4 * (32 << 10) + 1]


def test_readers_that_read_slowly_get_everything(server, monkeypatch):
    """Far more than the buffers between hold, in small pieces."""
    monkeypatch.setattr(server.uvicorn.config.http, "write_seconds", 100 * WRITE_SECONDS)  # the test above has that
    with connect(server) as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        bias = {str(fake_engine.EOS): -100}
        peer.sendall(request(stream=True, max_tokens=60, n=8, logprobs=20, logit_bias=bias))
        found = b""
        while not found.endswith(b"0\r\n\r\n"):
            part = peer.recv(16 << 10)
            assert part, "cut off"
            found += part
            time.sleep(len(part) / 400_000)
        assert b"[DONE]" in found and len(found) > 100_000


def test_more_connections_than_may_be(server):
    """They are closed at once, and the others are served on."""
    with connect(server) as first:
        first.sendall(request())
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")
        peers = [connect(server) for _ in range(3 * CONNECTIONS)]
        refused = 0
        for peer in peers:
            with peer:
                refused += read_until_closed(peer) == b""
        assert 2 * CONNECTIONS <= refused < 3 * CONNECTIONS


def test_bodies_that_are_large_together(server):
    """Each within the limit, all of them not: who comes last is told to come again."""
    with connect(server) as first:
        first.sendall(head(45_000) + b" " * 44_999)
        for _ in range(2):
            with connect(server) as peer:
                peer.sendall(head(45_000) + b" " * 44_999)
                refused = read_until_closed(peer)
                assert refused.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in refused
                assert b"too many large requests at once; try again in a moment" in refused
        first.sendall(b" ")
        assert first.recv(65536).startswith(b"HTTP/1.1 400 ")
    with connect(server) as peer:
        peer.sendall(head(45_000) + b" " * 45_000)
        assert peer.recv(65536).startswith(b"HTTP/1.1 400 "), "there is room again"
