"""What the scheduler's thread has for an event loop, which is woken as seldom as can be.

Waking a loop is a system call, and takes Python's lock from the thread that computes. So it is woken when a round has
nothing more to tell, once for all of its texts. Where more than a few texts come piece by piece, it is woken for them
every `interval` seconds at most; a text's first piece and its last never wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque

from .scheduler import Update

FEW = 4  # texts whose every token is handed on at once

_HURRIED, _ALL = 1, 2


class Mailbox:
    """The inboxes of one event loop, and which of them something came for."""

    def __init__(self, interval: float = 0.0) -> None:
        """`interval`: seconds; 0 hands everything on with its round."""
        self.interval = interval
        self.loop: asyncio.AbstractEventLoop | None = None
        self.hurried: deque[Inbox] = deque()
        self.listed: deque[Inbox] = deque()
        self._next = 0.0  # when many that are listed may be told again
        self._called = 0  # what the loop was called for, and has not begun
        self._timer: asyncio.TimerHandle | None = None

    def inbox(self, *, whole: bool = False) -> Inbox:
        """One for a consumer in the running loop; see `Inbox`."""
        self.loop = asyncio.get_running_loop()
        return Inbox(self, self.loop, whole)

    def ring(self) -> None:
        """Nothing more is to tell for a while; in the scheduler's thread."""
        wanted = _HURRIED if self.hurried else 0
        if self.listed:
            many, now = len(self.listed) > FEW and self.interval > 0, time.monotonic()
            if not many or now >= self._next:
                wanted = _ALL
                self._next = now + self.interval
        if wanted > self._called and self.loop is not None:
            self._called = wanted
            with contextlib.suppress(RuntimeError):  # a loop that has ended: nobody reads any more
                self.loop.call_soon_threadsafe(self._deliver, wanted)

    def _deliver(self, wanted: int) -> None:
        self._called = 0
        while self.hurried:
            self.hurried.popleft().wake()
        if wanted < _ALL:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if len(self.listed) > FEW and self.interval > 0 and self.loop is not None:
            # What is listed by then does not wait for a round that is long in coming.
            self._timer = self.loop.call_later(self.interval, self._deliver, _ALL)
        while self.listed:
            inbox = self.listed.popleft()
            inbox.listed = False
            inbox.wake()


class Inbox:
    """What came for one consumer: `put` is for the scheduler's thread, all else for the event loop.

    whole: the consumer has no use for a text before its end.
    """

    def __init__(self, mailbox: Mailbox, loop: asyncio.AbstractEventLoop, whole: bool) -> None:
        self.listed = False
        self._mailbox = mailbox
        self._loop = loop
        self._whole = whole
        self._begun: set[int] = set()
        self._came: deque[tuple[int, Update]] = deque()
        self._awaited: asyncio.Future[None] | None = None

    def put(self, place: int, update: Update) -> None:
        """What came of the text at `place`.

        Raises:
            RuntimeError: the loop has ended.
        """
        if self._loop.is_closed():
            raise RuntimeError("the event loop has ended")
        self._came.append((place, update))
        if update.done or not (self._whole or place in self._begun):
            self._begun.add(place)
            self._mailbox.hurried.append(self)
        elif not (self._whole or self.listed):
            self.listed = True
            self._mailbox.listed.append(self)

    def wake(self) -> None:
        """Something may have come."""
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def next(self) -> list[tuple[int, Update]]:
        """What came since the last call, at least one update; waits for it.

        Raises:
            RuntimeError: somebody waits already, and would not be woken any more.
        """
        if self._awaited is not None and not self._awaited.done():
            raise RuntimeError("this text is awaited already")
        while not self._came:
            self._awaited = self._loop.create_future()
            await self._awaited
        return [self._came.popleft() for _ in range(len(self._came))]
