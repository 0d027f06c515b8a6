"""HTTP clients for `load_server.py` that cost little: they share the processor with the server they measure.

One asyncio loop; while an answer comes its bytes are only put aside, and read when it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

CUT = object()  # instead of an answer, where the client left in the middle


@dataclass
class Answer:
    """What came back, and when. `times` are seconds: of asking, of the first piece and of the last."""

    status: int
    headers: dict[str, str]
    body: bytes
    began: float
    first: float
    last: float

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Those of a stream; read when they are asked for, so that counting tokens costs no more than it must."""
        return [json.loads(line) for line in self._event_lines]

    @cached_property
    def _event_lines(self) -> list[bytes]:
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return []
        # A chunk of the transfer holds whole events, so that its framing is lines of their own.
        return [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: {")]

    @property
    def text(self) -> str:
        """The text of a stream of completions."""
        return "".join(event["choices"][0]["text"] for event in self.events if event.get("choices"))

    @property
    def tokens(self) -> int:
        """Tokens that a stream was made of, by the usage at its end."""
        usage = json.loads(self._event_lines[-1])["usage"] if self._event_lines else None
        return int(usage["completion_tokens"]) if usage else 0


class _Peer(asyncio.Protocol):
    """Collects one answer at a time over a connection that stays open."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._begin(None)

    def _begin(self, waiter: asyncio.Future[None] | None) -> None:
        self.waiter, self.parts, self.first, self.last, self.pieces = waiter, [], 0.0, 0.0, 0
        self.end: bytes | int | None = None  # the mark that ends a chunked body, or the length of the whole answer
        self.got = 0
        self.leave_after: int | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        self.got += len(data)
        if self.end is None:
            head, mark, rest = b"".join(self.parts).partition(b"\r\n\r\n")
            if not mark:
                return
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
            length = fields.get(b"content-length")
            self.end = b"0\r\n\r\n" if length is None else len(head) + 4 + int(length)
            if not rest:
                return
        self.last = time.perf_counter()
        self.first = self.first or self.last
        self.pieces += 1
        whole = data.endswith(self.end) if isinstance(self.end, bytes) else self.got >= self.end
        if (whole or self.pieces == self.leave_after) and self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_exception(error or ConnectionResetError("the server closed the connection"))

    async def answered(self, leave_after: int | None) -> None:
        self._begin(asyncio.get_running_loop().create_future())
        self.leave_after = leave_after
        assert self.waiter is not None
        await self.waiter


class Client:
    """One connection, opened when it is needed, and again where the server or `leave_after` closed it."""

    def __init__(self, port: int, host: str = "127.0.0.1", timeout: float = 120.0) -> None:
        self.port, self.host, self.timeout = port, host, timeout
        self._peer: _Peer | None = None

    async def post(self, path: str, body: bytes, *, leave_after: int | None = None) -> Answer | None:
        """The answer to a JSON body; None where the client left, after so many pieces of it."""
        if self._peer is None or self._peer.transport.is_closing():
            loop = asyncio.get_running_loop()
            _, self._peer = await loop.create_connection(_Peer, self.host, self.port)
        peer, began = self._peer, time.perf_counter()
        head = f"POST {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        peer.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        try:
            await asyncio.wait_for(peer.answered(leave_after), self.timeout)
        except BaseException:
            self.close()
            raise
        if leave_after is not None and peer.pieces >= leave_after:  # more may have come before this task's turn
            self.close()
            return None
        return _answer(b"".join(peer.parts), began, peer)

    def close(self) -> None:
        """Hang up."""
        if self._peer is not None:
            self._peer.transport.abort()
            self._peer = None


def _answer(raw: bytes, began: float, peer: _Peer) -> Answer:
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Answer(int(first.split()[1]), headers, body, began, peer.first, peer.last)


@contextlib.asynccontextmanager
async def connected(port: int, count: int) -> Any:
    """`count` clients, closed at the end."""
    clients = [Client(port) for _ in range(count)]
    try:
        yield clients
    finally:
        for client in clients:
            client.close()
