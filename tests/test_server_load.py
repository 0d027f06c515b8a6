"""Many clients at once on an engine with lanes: every answer is the one alone, memory is bounded, faults stay alone."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from serving import NAME, serving

import moedge
from moedge.export.memory import resident_bytes

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
CLIENTS, PROMPTS, NEW = 200, 25, 6
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def engine(tiny_bundle):
    with moedge.load(tiny_bundle, threads=1, lanes=4, prefill_chunk=16) as engine:
        assert engine.session.lanes >= 4
        yield engine


def prompts():
    random = np.random.default_rng(8)
    return [random.integers(0, 250, int(size)).tolist() for size in random.integers(1, 60, PROMPTS)]


def body(prompt, **options):
    ask = {"model": NAME, "prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 0}
    return json.dumps({**ask, **options}).encode()


def test_two_hundred_clients_at_once(engine, tiny_bundle, monkeypatch):
    """`scripts/load_server.py` does it on the sample, in waves, and reads the server's own peak of memory."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from load_client import connected

    with moedge.load(tiny_bundle, threads=1, prefill_chunk=16) as application:  # the graph of one sequence
        expected = []
        for prompt in prompts():
            text = application.generate(prompt, max_new_tokens=NEW, temperature=0, logprobs=0)
            expected.append(("".join(text), [one.logprob for one in text.logprobs]))

    async def wave(port):
        async with connected(port, CLIENTS) as clients:
            bodies = [body(prompt) for prompt in prompts()]
            asked = [client.post("/v1/completions", bodies[place % PROMPTS]) for place, client in enumerate(clients)]
            return await asyncio.gather(*asked)

    with serving(engine, slots=4, queue=CLIENTS) as server:
        sizes = []
        for _ in range(2):
            answers = asyncio.run(wave(server.port))
            assert [answer.status for answer in answers] == [200] * CLIENTS
            for place, answer in enumerate(answers):
                choice = json.loads(answer.body)["choices"][0]
                text, logprobs = expected[place % PROMPTS]
                assert choice["text"] == text
                # Stock ops of larger groups round a single sequence in their own way; of groups of 32 they do not.
                assert choice["logprobs"]["token_logprobs"] == logprobs
            sizes.append(resident_bytes())
        assert sizes[1] - sizes[0] < 24 << 20
        server.settle()


def test_memory_refused_while_a_slot_is_made_fails_that_request_alone(engine, monkeypatch):
    """The system refuses the third of four caches: 503 for its request, the running ones and the next go on."""
    from moedge.runtime.sessions import _ort_cache

    each, made = len(_ort_cache.stack_entries(engine.info)), []

    def make(shape, dtype):
        made.append(shape)
        refused = len(made) - 2 * each in (1, 2)  # the stack, then a layer of it
        return real((2**45,) if refused else shape, dtype)

    real = _ort_cache.aligned_empty
    monkeypatch.setattr(_ort_cache, "aligned_empty", make)
    lanes = engine.session._runner.users
    with serving(engine, slots=4, queue=8) as server:
        scheduler = server.service.scheduler
        hold, step = threading.Event(), scheduler._step
        scheduler._step = lambda work: (hold.wait(20), step(work))[1]  # all four have come before any goes on
        answers = []

        def ask():
            answers.append(server.http.post("/v1/completions", content=body([1, 2], max_tokens=4), headers=JSON))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while scheduler.running + scheduler.waiting + len(answers) < 4:
            pass
        hold.set()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 503]
        (refused,) = [answer for answer in answers if answer.status_code == 503]
        assert "MiB does not fit the memory; load with a smaller max_seq_len" in refused.json()["error"]["message"]
        texts = {answer.json()["choices"][0]["text"] for answer in answers if answer.status_code == 200}
        want = "".join(engine.generate([1, 2], max_new_tokens=4, temperature=0))
        assert texts == {want}
        again = server.http.post("/v1/completions", content=body([1, 2], max_tokens=4), headers=JSON)
        assert again.json()["choices"][0]["text"] == want
        server.settle()
    assert engine.session._runner.users == lanes, "every slot's cache is given back"


def test_a_client_that_leaves_keeps_no_connection_where_more_came_before_its_turn(monkeypatch):
    """Else the next answer would begin with the rest of this one."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from load_client import Client, _Peer

    class Transport:
        aborted = False

        def write(self, data):
            asyncio.get_running_loop().call_later(0.05, self.answer, client._peer)

        def answer(self, peer):
            for part in (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", b"1", b"2", b"3", b"4"):
                peer.data_received(part)

        def is_closing(self):
            return self.aborted

        def abort(self):
            self.aborted = True

    async def main():
        client._peer = _Peer()
        client._peer.transport = transport = Transport()
        assert await client.post("/v1/completions", b"{}", leave_after=3) is None
        assert transport.aborted and client._peer is None

    client = Client(1, timeout=10)
    asyncio.run(main())


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_the_scripts_judge(monkeypatch, tmp_path):
    """A bar that is missed is said to be missed, and the page shows it, with what it has from other runs."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import load_server

    met, missed = load_server.Verdict("a bar", "5", True), load_server.Verdict("another", "9", False)
    page = tmp_path / "load.md"
    load_server.write_page(page, {"rates": {"about": "m, 4 slots", "verdicts": [met]}})
    load_server.write_page(page, {"mixture": {"about": "m, 8 slots", "verdicts": [missed]}})
    load_server.write_page(page, {"rates": {"about": "m, 8 slots", "verdicts": [met, met]}})
    text = page.read_text()
    assert text.count("| a bar | 5 | yes |") == 2 and "| another | 9 | **no** |" in text
    assert "4 slots" not in text and text.count("m, 8 slots; ") == 1

    class Silent:
        wrong: list[str] = []

        async def streams(self, clients, seconds, seed):
            rates = [10.0, 10.0, 2.0] if clients > 1 else [10.0]
            return {"tokens": 20 * min(clients, 2), "seconds": 1.0, "rates": rates, "waits": [0.1]}

    _, verdicts = asyncio.run(load_server.compare_rates(Silent(), 32, 1))
    assert [verdict.met for verdict in verdicts] == [True, False, False]
    assert verdicts[1].found.startswith("5.00 times") and verdicts[2].found.startswith("2.00 times")
