"""The texts of a request between the scheduler's thread and the event loop. Imported by the server alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from .requests import TextRequest
from .scheduler import Job, Scheduler, Update

_T = TypeVar("_T")


class Refusal(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Mailbox:
    """What the scheduler's thread has for the event loop, which is woken once for all texts of a round."""

    def __init__(self) -> None:
        self._letters: deque[tuple[Run, int, Update]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None

    def belong(self, loop: asyncio.AbstractEventLoop) -> None:
        """Deliver in this loop."""
        self._loop = loop

    def put(self, run: Run, place: int, update: Update) -> None:
        """Put something in; from any thread."""
        self._letters.append((run, place, update))

    def ring(self) -> None:
        """Have everything delivered; from any thread."""
        if self._letters and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # a loop that has ended: nobody reads any more
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        while self._letters:
            run, place, update = self._letters.popleft()
            run.take(place, update)


class Run:
    """The texts of one request while they run.

    Raises:
        Refusal: the scheduler is closing. Busy: no more texts may wait.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        mailbox: Mailbox,
        requests: list[TextRequest],
        seconds: float,
        failure: Callable[[Exception], Refusal],
    ) -> None:
        """`failure` says what a client is told of a text that failed."""
        self._failure = failure
        self._came: list[tuple[int, Update]] = []
        self._awaited: asyncio.Future[None] | None = None
        self._left = len(requests)
        self.texts = [""] * len(requests)
        mailbox.belong(asyncio.get_running_loop())
        if not scheduler.open:
            raise Refusal(503, "the server is closing", "closing")
        self.jobs: list[Job] = scheduler.submit(
            requests, lambda place, update: mailbox.put(self, place, update), seconds=seconds
        )

    def take(self, place: int, update: Update) -> None:
        """Something came, in the event loop."""
        self._came.append((place, update))
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.cancel()

    async def next(self) -> list[tuple[int, Update]]:
        """What came since the last call, at least one update; none when all is over.

        Raises:
            Refusal: a text failed, or had no token when its time was over.
        """
        if not self._came and self._left:
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        came, self._came = self._came, []
        for place, update in came:
            if update.done:
                self._left -= 1
                self._check(self.jobs[place])
            self.texts[place] += update.text
        return came

    def _check(self, job: Job) -> None:
        if job.error is not None:
            raise self._failure(job.error)
        if job.writer.finish_reason == "deadline" and not job.writer.tokens:
            raise Refusal(504, "the time was over before the first token came", "timeout")
        if job.writer.finish_reason == "cancelled":
            raise Refusal(503, "the server is closing", "closing")

    async def rest(self) -> None:
        """Read until all is over."""
        while await self.next():
            pass


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """What `work` gives, unless the client closes the connection before.

    Raises:
        ClientGone: it did.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
