"""The engine for asyncio: many texts at once, each an `async for` over its pieces.

    async with AsyncEngine.load("bundle/", slots=4) as engine:
        async for piece in engine.generate("def main(", max_new_tokens=64): ...

The work is done in the scheduler's thread; the event loop only hands text on.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle
from ..errors import EngineError
from .engine import Engine, load
from .mailbox import Mailbox
from .requests import TextRequest, make_request
from .scheduler import Job, Scheduler, Update
from .writing import TokenLogprob

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .requests import Options


class AsyncGeneration(AsyncIterator[str]):
    """Pieces of text, each of whole characters. Leaving it unfinished (`aclose`, a cancelled task) frees its slot."""

    def __init__(self, scheduler: Scheduler, mailbox: Mailbox, request: TextRequest, seconds: float) -> None:
        self.prompt_tokens = len(request.prompt)
        self._inbox = mailbox.inbox()  # holds no reference to `self`, which ends the job when it goes
        self._updates: deque[Update] = deque()
        self._over = False
        (self._job,) = scheduler.submit([request], self._inbox.put, seconds=seconds)

    @property
    def tokens(self) -> list[int]:
        """Ids generated so far, the end token included."""
        return self._job.writer.tokens

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """How likely each of them was; empty unless asked for."""
        return self._job.writer.logprobs

    @property
    def finish_reason(self) -> str | None:
        """None while it runs, then "stop", "length", "cancelled" or "deadline"."""
        return self._job.writer.finish_reason

    @property
    def job(self) -> Job:
        """The text's place in the scheduler."""
        return self._job

    async def __anext__(self) -> str:
        while not self._over:
            if not self._updates:
                try:
                    self._updates.extend(update for _, update in await self._inbox.next())
                except asyncio.CancelledError:
                    self._job.cancel()
                    raise
            update = self._updates.popleft()
            self._over = update.done
            if self._over and self._job.error is not None:
                raise self._job.error
            if update.text:
                return update.text
        raise StopAsyncIteration

    def __del__(self) -> None:
        if hasattr(self, "_job"):
            self._job.cancel()

    async def aclose(self) -> None:
        """End it here."""
        self._job.cancel()
        self._over = True


class AsyncEngine:
    """An engine whose texts are awaited. Safe to use from any task; `generate` belongs to the loop it is called in."""

    def __init__(self, engine: Engine, *, slots: int = 4, queue: int = 64, owns_engine: bool = False) -> None:
        self.engine = engine
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self.scheduler = Scheduler(engine, slots=slots, queue=queue, told=self._ring)
        self._owns_engine = owns_engine

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        profile: str | None = None,
        *,
        slots: int = 4,
        queue: int = 64,
        **options: Any,
    ) -> AsyncEngine:
        """Load an engine as `moedge.load` does, with its options, `lanes` as `slots`; closing this closes it."""
        return cls(load(bundle, profile, **{"lanes": slots, **options}), slots=slots, queue=queue, owns_engine=True)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def generate(
        self, prompt: str | Sequence[int], *, seconds: float = math.inf, **options: Unpack[Options]
    ) -> AsyncGeneration:
        """Text that goes on from `prompt`; the options are those of `Engine.generate`.

        seconds: after which it ends with what it has (finish_reason "deadline"), waiting included.

        Raises:
            UsageError: a number out of range. Busy: too many are waiting.
            EngineError: the prompt is empty, too long, or has tokens out of range; or this is closed.
        """
        if not self.scheduler.open:
            raise EngineError("this AsyncEngine is closed; load it again")
        return AsyncGeneration(self.scheduler, self._mailbox(), make_request(self.engine, prompt, **options), seconds)

    async def aclose(self, drain_s: float = 0.0) -> None:
        """Take no more texts, let those there are go on for `drain_s` seconds, then cancel them and free the memory."""
        await asyncio.to_thread(self.scheduler.close, drain_s)
        if self._owns_engine:
            self.engine.close()

    def _mailbox(self) -> Mailbox:
        """That of the running loop."""
        for ended in [loop for loop in list(self._mailboxes) if loop.is_closed()]:
            self._mailboxes.pop(ended, None)
        return self._mailboxes.setdefault(asyncio.get_running_loop(), Mailbox())

    def _ring(self) -> None:
        for mailbox in list(self._mailboxes.values()):
            mailbox.ring()
