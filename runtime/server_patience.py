"""Connections that take their time: uvicorn's HTTP protocol with limits of its own. Imported by the server alone.

uvicorn closes a connection that is idle between two requests, and waits for ever for a header's rest, and for a peer
that does not read what was written to it.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
_LEAST = 32 << 10  # bytes that a peer must take in `write_seconds`, or all there are


class PatientProtocol(H11Protocol):
    """Closes a connection whose request header is not there after `header_seconds`, counted from the connection or from
    the header's first byte; one whose peer takes less than 32 KiB of what waits for it in `write_seconds`; and at once
    one that comes when there are `connections` already."""

    header_seconds = 10.0
    write_seconds = 30.0
    most_connections = 900

    _header_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes that waited when the write timer was set

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        self._watch_header()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_writing()  # an answer's end, for which nobody else waits

    def _watch_header(self) -> None:
        serving = self.cycle is not None and not self.cycle.response_complete
        if serving or self.transport.is_closing():
            self._stop_header_timer()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._header_is_late)

    def _header_is_late(self) -> None:
        self._header_timer = None
        self.transport.write(_LATE)
        self.transport.close()
        self._watch_writing()

    def _watch_writing(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        if self._unsent and self._write_timer is None:
            self._write_timer = self.loop.call_later(self.write_seconds, self._check_writing)

    def _check_writing(self) -> None:
        self._write_timer = None
        left = self.transport.get_write_buffer_size()
        if left and self._unsent - left < _LEAST:
            self.transport.abort()
        else:
            self._watch_writing()

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def patient_protocol(header_seconds: float, write_seconds: float, connections: int) -> type[PatientProtocol]:
    """The protocol with these limits, for `uvicorn.Config(http=...)`."""
    limits = {"header_seconds": header_seconds, "write_seconds": write_seconds, "most_connections": connections}
    return type("LimitedProtocol", (PatientProtocol,), limits)
