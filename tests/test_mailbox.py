"""How seldom an event loop is woken, and that nothing waits for ever or comes out of order."""

from __future__ import annotations

import asyncio

import pytest

from moedge.runtime.mailbox import FEW, Mailbox
from moedge.runtime.scheduler import Update

LONG = 1000.0  # seconds


def text(tokens, done=False):
    return Update(chr(64 + tokens), tokens, done)


class Reader:
    """Reads an inbox as long as the test lasts."""

    def __init__(self, mailbox, **options):
        self.inbox = mailbox.inbox(**options)
        self.put = self.inbox.put
        self.read = ""
        self.wakes = 0
        self.task = asyncio.ensure_future(self.live())

    async def live(self):
        while True:
            for _, update in await self.inbox.next():
                self.read += update.text
            self.wakes += 1


async def turn():
    for _ in range(5):
        await asyncio.sleep(0)


def run(main):
    async def bounded():
        await asyncio.wait_for(main(), 20)

    asyncio.run(bounded())


def begun(mailbox, count):
    readers = [Reader(mailbox) for _ in range(count)]
    for reader in readers:
        reader.put(0, text(1))
    mailbox.ring()
    return readers


def test_a_few_texts_are_told_every_token_at_once():
    async def main():
        mailbox = Mailbox(LONG)
        readers = begun(mailbox, FEW)
        for tokens in (2, 3, 4):
            for reader in readers:
                reader.put(0, text(tokens))
            mailbox.ring()
            await turn()
            assert {reader.read for reader in readers} == {"ABCD"[:tokens]}

    run(main)


@pytest.mark.parametrize("interval", [0.0, LONG])
def test_many_texts_wait_for_the_interval_but_not_with_their_first_and_last(interval):
    async def main():
        mailbox = Mailbox(interval)
        readers = begun(mailbox, FEW + 2)
        await turn()
        assert {reader.read for reader in readers} == {"A"}, "the first piece waits for nothing"
        for tokens in (2, 3, 4):
            for reader in readers:
                reader.put(0, text(tokens))
            mailbox.ring()
            await turn()
        # The first round after a rest goes out at once; the others only where there is no interval.
        assert {reader.read for reader in readers} == {"AB" if interval else "ABCD"}
        readers[0].put(0, text(5, done=True))
        mailbox.ring()
        await turn()
        assert readers[0].read == "ABCDE", "the end brings what was held back, in order"
        assert {reader.read for reader in readers[1:]} == {"AB" if interval else "ABCD"}

    run(main)


def test_what_is_held_back_comes_after_the_interval_without_another_round():
    async def main():
        mailbox = Mailbox(0.02)
        readers = begun(mailbox, FEW + 1)
        await turn()
        for tokens in (2, 3):
            for reader in readers:
                reader.put(0, text(tokens))
            mailbox.ring()
        while {reader.read for reader in readers} != {"ABC"}:
            await asyncio.sleep(0.005)
        assert max(reader.wakes for reader in readers) <= 3
        while mailbox._timer is not None:  # which stops when nothing comes
            await asyncio.sleep(0.005)

    run(main)


def test_who_wants_the_whole_is_woken_for_ends_alone():
    async def main():
        mailbox = Mailbox()
        reader = Reader(mailbox, whole=True)
        await turn()
        for tokens in (1, 2):
            for place in (0, 1):
                reader.put(place, text(tokens))
            mailbox.ring()
            await turn()
        assert reader.wakes == 0
        for place in (0, 1):
            reader.put(place, text(3, done=True))
            mailbox.ring()
            await turn()
        assert reader.read == "AABBCC" and reader.wakes == 2

    run(main)


def test_a_loop_that_has_ended_takes_no_more():
    async def main():
        mailbox = Mailbox()
        return mailbox, mailbox.inbox()

    mailbox, inbox = asyncio.run(main())
    with pytest.raises(RuntimeError, match="the event loop has ended"):
        inbox.put(0, text(1))
    mailbox.hurried.append(inbox)
    mailbox.ring()  # no fault of whoever computes
