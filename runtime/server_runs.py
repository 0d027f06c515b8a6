"""The texts of a request between the scheduler's thread and the event loop. Imported by the server alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from .mailbox import Mailbox
from .requests import TextRequest
from .scheduler import Job, Scheduler, Update

if TYPE_CHECKING:
    from .server_guard import Receive

_T = TypeVar("_T")


class Refusal(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class ClientGone(Exception):
    """Nobody waits for the answer."""


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
        *,
        whole: bool,
    ) -> None:
        """`failure` says what a client is told of a text that failed; `whole`: nothing is read before it is over."""
        self._scheduler = scheduler
        self._failure = failure
        self._left = len(requests)
        self._inbox = mailbox.inbox(whole=whole)
        if not scheduler.open:
            raise _closing()
        self.jobs: list[Job] = scheduler.submit(requests, self._inbox.put, seconds=seconds)

    def cancel(self) -> None:
        """Nobody waits any more."""
        for job in self.jobs:
            job.cancel()

    async def next(self) -> list[tuple[int, Update]]:
        """What came since the last call, at least one update; none when all is over.

        Raises:
            Refusal: a text failed, or had no token when its time was over.
        """
        if not self._left:
            return []
        came = await self._inbox.next()
        for place, update in came:
            if update.done:
                self._left -= 1
                self._check(self.jobs[place])
        return came

    def _check(self, job: Job) -> None:
        if job.error is not None:
            raise self._failure(job.error)
        late = job.writer.finish_reason == "deadline" and not job.writer.tokens
        if job.writer.finish_reason == "cancelled" or (late and not self._scheduler.open):
            raise _closing()
        if late:
            raise Refusal(504, "the time was over before the first token came", "timeout")

    async def rest(self) -> list[str]:
        """Wait until all is over; the texts. Raises as `next`."""
        parts: list[list[str]] = [[] for _ in self.jobs]
        while came := await self.next():
            for place, update in came:
                parts[place].append(update.text)
        return ["".join(text) for text in parts]


def _closing() -> Refusal:
    return Refusal(503, "the server is closing", "closing")


async def unless_gone(receive: Receive, work: Awaitable[_T]) -> _T:
    """What `work` gives, unless the client closes the connection before; `receive` is ASGI's.

    Raises:
        ClientGone: it did.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
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
