"""Answers that come piece by piece, as server-sent events. Imported by the server alone."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from .openai_answers import Answer, error_document, sse
from .scheduler import Update
from .server_runs import ClientGone, Refusal, Run, unless_gone

_MOST = 64 << 10  # bytes made before the reader has taken what went before
_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class EventStream(StreamingResponse):
    """The events of a run, of which `first` came already; what `places` hold is freed with it, also where the client
    went before the first piece was asked for."""

    def __init__(
        self,
        run: Run,
        answer: Answer,
        first: list[tuple[int, Update]],
        places: contextlib.ExitStack,
    ) -> None:
        super().__init__(_events(run, answer, first), media_type="text/event-stream", headers=_HEADERS)
        self._places = places

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Without starlette's group of tasks, which looks after each piece.
        with self._places, contextlib.suppress(ClientGone):
            await unless_gone(receive, self.stream_response(send))


async def _events(run: Run, answer: Answer, first: list[tuple[int, Update]]) -> AsyncIterator[bytes]:
    """Chunks of whole events, one event for each update: all that came while the last was being written go as one."""
    sent = [0] * len(run.jobs)
    openings = [answer.opening(place) for place in range(len(run.jobs))]
    chunk = bytearray(b"".join(sse(opening) for opening in openings if opening is not None))
    came, left = first, len(run.jobs)
    try:
        while came:
            for place, update in came:
                left -= update.done
                chunk += answer.event(place, update.text, sent[place], update.tokens, update.done)
                sent[place] = update.tokens
                if len(chunk) >= _MOST:
                    yield bytes(chunk)
                    chunk.clear()
            if left and chunk:
                yield bytes(chunk)
                chunk.clear()
            came = await run.next()
        if answer.tells_usage:
            chunk += sse(answer.closing())
    except Refusal as refusal:
        chunk += sse(error_document(str(refusal), "server_error", refusal.code))
    yield bytes(chunk + sse("[DONE]"))
