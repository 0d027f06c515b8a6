"""`async for` over texts: many at once, cancelled with their task, gone with their loop."""

from __future__ import annotations

import asyncio
import gc

import fake_engine
import pytest

from moedge.errors import EngineError, UsageError
from moedge.runtime.aio import AsyncEngine
from moedge.runtime.engine import load
from moedge.runtime.scheduler import Busy

ENDLESS = {"max_new_tokens": 10_000_000, "context_end": "slide", "logit_bias": {fake_engine.EOS: -1e4}}


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory):
    return fake_engine.write_bundle(tmp_path_factory.mktemp("aio") / "bundle")


async def read(generation):
    return "".join([piece async for piece in generation])


async def settled(engine):
    """Wait until no text runs or waits."""
    for _ in range(200):
        if not engine.scheduler.running + engine.scheduler.waiting:
            return
        await asyncio.sleep(0.02)
    raise AssertionError("a slot is stuck")


def test_many_texts_at_once_are_what_they_are_alone(fake_bundle):
    async def main():
        async with AsyncEngine.load(fake_bundle, slots=3, prefill_chunk=8) as engine:
            generations = [engine.generate([first, 2], max_new_tokens=10, logprobs=1) for first in range(12)]
            texts = await asyncio.gather(*map(read, generations))
            assert all(g.finish_reason in ("stop", "length") for g in generations)
            assert all(len(g.logprobs) == len(g.tokens) for g in generations) and generations[0].prompt_tokens == 2
            return texts

    with load(fake_bundle, prefill_chunk=8) as engine:
        assert asyncio.run(main()) == ["".join(engine.generate([f, 2], max_new_tokens=10)) for f in range(12)]


def test_leaving_a_text_frees_its_slot(fake_bundle):
    async def main():
        async with AsyncEngine.load(fake_bundle, slots=1) as engine:
            async for _ in engine.generate([1], **ENDLESS):
                break
            gc.collect()
            await settled(engine)
            generation = engine.generate([1], **ENDLESS)
            await generation.__anext__()
            await generation.aclose()
            assert [piece async for piece in generation] == []
            await settled(engine)
            task = asyncio.create_task(read(engine.generate([1], **ENDLESS)))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await settled(engine)
            late = engine.generate([1], seconds=0.05, **ENDLESS)
            await read(late)
            assert late.finish_reason == "deadline"

    asyncio.run(main())


def test_errors_come_where_they_belong(fake_bundle):
    async def main():
        engine = AsyncEngine.load(fake_bundle, slots=1, queue=1)
        with pytest.raises(UsageError, match="top_p is 2; "):
            engine.generate([1], top_p=2)
        with pytest.raises(EngineError, match="context is full: 1 tokens of the prompt and 64 of the 70 new"):
            await read(engine.generate([1], max_new_tokens=70, logit_bias={65: 1e4}))
        first = engine.generate([1], **ENDLESS)
        await first.__anext__()
        second = engine.generate([1], **ENDLESS)
        with pytest.raises(Busy):
            engine.generate([1])
        await engine.aclose()
        await asyncio.gather(read(first), read(second))
        assert first.finish_reason == second.finish_reason == "cancelled"
        with pytest.raises(EngineError, match="this AsyncEngine is closed; load it again"):
            engine.generate([1])
        with pytest.raises(EngineError, match="the engine is closed"):
            engine.engine.logits([1])

    asyncio.run(main())


def test_a_loop_that_ends_takes_its_texts_along(fake_bundle):
    async def start():
        return engine.generate([1], **ENDLESS)

    with load(fake_bundle) as plain:
        engine = AsyncEngine(plain, slots=1)
        generation = asyncio.run(start())

        async def after():
            await settled(engine)
            text = await read(engine.generate([1], max_new_tokens=3))
            await engine.aclose()
            return text

        assert asyncio.run(after()) == "".join(plain.generate([1], max_new_tokens=3))
        assert generation.finish_reason == "cancelled"
