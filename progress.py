"""Progress of long work on the console: a bar on a terminal, a line now and then elsewhere; always on stderr.

Library functions take `progress: Progress | None` and call it as `progress(what, done, total)`: `what` names the phase
(a new text begins a new phase), `done` of `total` are its units, whatever they are. They never print.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

Progress = Callable[[str, int, int], None]

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Shows what the yielded function is called with, until the block is left.

    A Ctrl-C that a library lost on its way (imports in C do) is raised again when progress is next told of.
    """
    with _interrupts() as seen:
        if sys.stderr.isatty():
            with _bar() as progress:
                yield _heeding(progress, seen)
        else:
            yield _heeding(Lines(sys.stderr), seen)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """The SIGINTs that came within the block, each handled as before too; none outside of the main thread."""
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _heeding(progress: Progress, seen: list[int]) -> Progress:
    def told(what: str, done: int, total: int) -> None:
        if seen:
            raise KeyboardInterrupt
        progress(what, done, total)

    return told


class Lines:
    """Progress as lines: one when a phase begins, one every few seconds, one at its end if it took a second or more.

    Phases may go on side by side, told of by several threads.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.phases: dict[str, tuple[float, float]] = {}  # of those that go on: when they began, and last gave a line
        self.finished: str | None = None  # the last one
        self.lock = threading.Lock()

    def __call__(self, what: str, done: int, total: int) -> None:
        with self.lock:
            now = self.clock()
            if what not in self.phases:
                if what == self.finished:
                    return
                self.phases[what] = (now, now)
                self._line(what)
            began, printed = self.phases[what]
            if done >= total > 0:
                self.finished = what
                del self.phases[what]
                if now - began >= 1.0:
                    self._line(f"{what}: done in {now - began:.1f} s")
            elif now - printed >= SECONDS_BETWEEN_LINES:
                self.phases[what] = (began, now)
                self._line(f"{what}: {100 * done // total}%" if total > 0 else f"{what}: {now - began:.0f} s")

    def _line(self, text: str) -> None:
        self.stream.write(f"{text}\n")  # in one piece: print writes the end of a line by itself
        self.stream.flush()


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            # A total of 0 is unknown: rich then draws a pulsing bar.
            bars.update(tasks[what], completed=done, total=total or None)

        yield progress
