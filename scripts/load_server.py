"""Load on `moedge serve`, judged: exit code 1 where a bar is missed. Not part of the tests.

    python scripts/load_server.py BUNDLE -o docs/serving-load.md
    python scripts/load_server.py BUNDLE --turns 0 --queued 0 --seconds 1800 -o docs/serving-load.md

In turns of a few seconds one client alone and all --clients together stream greedy texts of mixed lengths. Then
--queued clients ask at once, and every answer is compared, token for token, with what `moedge.load` gives the prompt
alone. Then, for --seconds, a mixture: texts, clients that leave in the middle, nonsense, floods, endless headers;
the server's resident memory is to stay flat.

With -o the figures are put into a JSON file beside the page, in the place of earlier ones of the same part, and the
page is made of all that is there: its parts may come from several runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
from load_client import Answer, Client, connected
from verdicts import FLAT, Verdict, leave, show

import moedge
from moedge.runtime import kernels, machine

PROMPTS = 40
LONGEST_PROMPT, LONGEST_TEXT = 400, 192  # characters; tokens
ALONE_S, CROWD_S = 3.0, 6.0
SLOWEST, TIMES = 3.0, 3.0  # of the median stream; of one client's rate
WAVES = 3
PARTS = {"rates": "Many clients beside one", "queue": "A queue", "mixture": "Everything at once"}


class Server:
    """`moedge serve` in a process of its own, and what the system says of it."""

    def __init__(self, bundle: str, log: Path, **options: int) -> None:
        command = [sys.executable, "-m", "moedge", "serve", bundle, "--port", "0"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._log = log
        self._stream = log.open("w")
        self.process = subprocess.Popen(command, stderr=self._stream)
        while " on http://" not in self.log and self.process.poll() is None:
            time.sleep(0.02)
        if self.process.poll() is not None:
            sys.exit(self.log.strip())
        line = next(line for line in self.log.splitlines() if " on http://" in line)
        self.model = line.split(" on http://")[0]
        self.port = int(re.findall(r":(\d+)/v1", line)[0])
        self.slots = int(re.findall(r", (\d+) slots\)", line)[0])
        self.left_behind()  # an answer: from here on it has what it always has open

    @property
    def log(self) -> str:
        """What it said on stderr."""
        return self._log.read_text()

    def memory(self, what: str) -> int:
        """Bytes: VmRSS, resident now, or VmHWM, the most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(rf"^{what}:\s*(\d+)", status, re.M)[0])

    def open_files(self) -> int:
        """Descriptors, sockets included."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def left_behind(self) -> tuple[int, int]:
        """Texts that run or wait, which nobody should when nobody asks, and answers of 500 so far."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        stuck = sum(float(value) for value in re.findall(r"^moedge_(?:running|queue_length) (\S+)", text, re.M))
        failed = sum(float(value) for value in re.findall(r'^moedge_requests_total{.*status="500"} (\S+)', text, re.M))
        return int(stuck), int(failed)

    def end(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.terminate()
        code = self.process.wait(timeout=60)
        self._stream.close()
        return code


class Load:
    """What the clients ask, and what they found."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.prompts = make_prompts()
        self.wrong: list[str] = []

    def body(self, place: int, **options: Any) -> bytes:
        """A request for the text of a prompt; a stream ends with its count of tokens."""
        if options.get("stream"):
            options["stream_options"] = {"include_usage": True}
        ask = {"model": self.server.model, "prompt": self.prompts[place], "max_tokens": new_tokens(place)}
        return json.dumps({**ask, "temperature": 0, **options}).encode()

    async def streams(self, clients: int, seconds: float, seed: int) -> dict[str, Any]:
        """Let so many clients stream one text after the other."""
        tokens, rates, waits = 0, [], []

        async def live(client: Client, draw: random.Random) -> None:
            nonlocal tokens
            while time.perf_counter() < until:
                answer = await client.post("/v1/completions", self.body(draw.randrange(PROMPTS), stream=True))
                assert answer is not None
                if answer.status != 200:
                    self.wrong.append(f"{answer.status}: {answer.body[:200]!r}")
                    continue
                tokens += answer.tokens
                waits.append(answer.first - answer.began)
                if answer.tokens >= 16 and answer.last > answer.first:  # long enough to have a pace
                    rates.append((answer.tokens - 1) / (answer.last - answer.first))

        async with connected(self.server.port, clients) as all_of_them:
            began = time.perf_counter()
            until = began + seconds
            draws = [random.Random(100 * seed + place) for place in range(clients)]
            await asyncio.gather(*map(live, all_of_them, draws))
        return {"tokens": tokens, "seconds": time.perf_counter() - began, "rates": rates, "waits": waits}

    async def wave(self, clients: int, expected: list[Any]) -> None:
        """So many clients at once, each with one text; every answer must be the expected one."""
        async with connected(self.server.port, clients) as all_of_them:
            bodies = [self.body(place % PROMPTS, logprobs=0) for place in range(clients)]
            asked = [client.post("/v1/completions", body) for client, body in zip(all_of_them, bodies, strict=True)]
            for place, answer in enumerate(await asyncio.gather(*asked)):
                assert answer is not None
                if answer.status != 200:
                    self.wrong.append(f"{answer.status}: {answer.body[:200]!r}")
                elif told(answer) != expected[place % PROMPTS]:
                    self.wrong.append(f"prompt {place % PROMPTS} was answered otherwise than alone")


def told(answer: Answer) -> tuple[str, list[float]]:
    """An answer's text, and the log-probability of each token: equal ones mean equal tokens, to the last bit."""
    choice = json.loads(answer.body)["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def make_prompts() -> list[str]:
    """Python-like text of mixed lengths, some with one beginning."""
    draw = random.Random(0)
    words = "def class return import self value for in if else not None print range len open with as".split()
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, LONGEST_PROMPT // 5))) for _ in range(PROMPTS)]
    return [texts[0] + text if place % 4 == 0 else text for place, text in enumerate(texts)]


def new_tokens(place: int) -> int:
    """How long a prompt's text is to be."""
    return 8 + place * 29 % LONGEST_TEXT


def answers_alone(bundle: str, slots: int) -> list[tuple[str, list[float]]]:
    """What each prompt gives an application."""
    lanes = 1 if kernels.library() is not None else slots  # stock ops round a single text in their own way
    found = []
    with moedge.load(bundle, lanes=lanes) as engine:
        for place, prompt in enumerate(make_prompts()):
            text = engine.generate(prompt, max_new_tokens=new_tokens(place), temperature=0, logprobs=0)
            found.append(("".join(text), [one.logprob for one in text.logprobs]))
    return found


async def compare_rates(load: Load, clients: int, turns: int) -> tuple[dict[str, Any], list[Verdict]]:
    """One client and many, in turns, so that both have the machine as it is."""
    await load.streams(clients, 1.0, 99)  # the first touches every page of the weights
    load.wrong.clear()
    alone, crowd = [], []
    for turn in range(turns):
        alone.append(await load.streams(1, ALONE_S, turn))
        crowd.append(await load.streams(clients, CROWD_S, turn))
    rate, waits = {}, [wait for part in crowd for wait in part["waits"]]
    for name, parts in (("alone", alone), ("together", crowd)):
        rate[name] = sum(part["tokens"] for part in parts) / sum(part["seconds"] for part in parts)
    times = rate["together"] / rate["alone"]
    # Of each turn by itself: a machine that is slower for a while makes no stream starve.
    pace = [(statistics.median(part["rates"]), min(part["rates"])) for part in crowd]
    median, slowest = max(pace, key=lambda both: both[0] / both[1])
    figures = {
        "clients": clients,
        "tokens_per_s": rate,
        "stream_tokens_per_s": {"slowest": slowest, "median": median},
        "ttft_s": {"median": statistics.median(waits), "worst": max(waits)},
        "ttft_alone_s": statistics.median(wait for part in alone for wait in part["waits"]),
        "texts": len(waits),
    }
    return figures, [
        Verdict(f"{clients} clients: no error", f"{len(load.wrong)} of {len(waits):,} texts failed", not load.wrong),
        Verdict(
            f"{clients} clients: the slowest stream within {SLOWEST:g} times the median",
            f"{median / slowest:.2f} times ({slowest:.0f} and {median:.0f} tokens/s)",
            median <= SLOWEST * slowest,
        ),
        Verdict(
            f"{clients} clients: at least {TIMES:g} times the tokens of one",
            f"{times:.2f} times ({rate['together']:,.0f} and {rate['alone']:,.0f} tokens/s)",
            times >= TIMES,
        ),
    ]


async def queue_up(load: Load, clients: int, expected: list[Any]) -> tuple[dict[str, Any], list[Verdict]]:
    """Waves of many clients at once."""
    load.wrong.clear()
    highest = []
    for _ in range(WAVES):
        await load.wave(clients, expected)
        highest.append(load.server.memory("VmHWM"))
    growth = highest[-1] / highest[0] - 1
    figures = {"queued": clients, "waves": WAVES, "peak_resident_bytes": highest}
    return figures, [
        Verdict(
            f"{clients} clients at once: every answer, token for token, what the prompt gives alone",
            f"{len(load.wrong)} of {WAVES * clients} differ",
            not load.wrong,
        ),
        Verdict(
            f"{clients} clients at once: bounded memory",
            f"at most {highest[-1] / 2**20:.0f} MiB; from the first wave to wave {WAVES} it grew by {growth:.1%}",
            growth <= FLAT,
        ),
    ]


class Mixture:
    """Hours of everything: texts, clients that leave, nonsense, floods, headers that never end."""

    def __init__(self, load: Load, clients: int, flood: int, expected: list[Any]) -> None:
        self.load, self.clients, self.flood, self.expected = load, clients, flood, expected
        self.count = dict.fromkeys(("texts", "left", "nonsense", "refused"), 0)
        self.until = 0.0

    async def run(self, seconds: float) -> tuple[dict[str, Any], list[Verdict]]:
        server, wrong = self.load.server, self.load.wrong
        wrong.clear()
        self.until = time.perf_counter() + seconds
        memory, files = [], server.open_files()
        async with connected(server.port, self.clients) as clients:
            work = [self.live(client, random.Random(place)) for place, client in enumerate(clients)]
            working = [asyncio.ensure_future(each) for each in (*work, self.floods(), self.dawdle())]
            while time.perf_counter() < self.until and server.process.poll() is None:
                await asyncio.sleep(min(5.0, seconds / 40))
                memory.append(server.memory("VmRSS"))
            await asyncio.gather(*working)
        settled = memory[len(memory) // 5 :]  # the first fifth fills caches
        spread = max(settled) / min(settled) - 1
        await asyncio.sleep(6)  # longer than a connection is kept
        stuck, failed = server.left_behind()
        figures = {"seconds": seconds, **self.count, "resident_bytes": {"least": min(settled), "most": max(settled)}}
        files_left = server.open_files() - files
        return figures, [
            Verdict(f"{seconds:g} s of mixed load: no wrong answer", f"{len(wrong)} wrong", not wrong),
            Verdict(
                f"{seconds:g} s of mixed load: resident memory flat within {FLAT:.0%}",
                f"{min(settled) / 2**20:.1f} to {max(settled) / 2**20:.1f} MiB, {spread:.1%}",
                spread <= FLAT,
            ),
            Verdict("no stuck slot, no 500", f"{stuck} stuck, {failed} answers of 500", not stuck and not failed),
            Verdict("no open connection left", f"{files_left} more than before", files_left <= 1),
        ]

    async def live(self, client: Client, draw: random.Random) -> None:
        """One client's life."""
        while time.perf_counter() < self.until:
            place, kind = draw.randrange(PROMPTS), draw.random()
            try:
                if kind < 0.05:
                    await self.nonsense(client, draw)
                elif kind < 0.15:
                    await client.post("/v1/completions", self.load.body(place, stream=True), leave_after=3)
                    self.count["left"] += 1
                else:
                    self.judge(await client.post("/v1/completions", self.load.body(place, logprobs=0)), place)
            except (OSError, asyncio.TimeoutError, ValueError) as error:
                self.load.wrong.append(repr(error)[:200])

    def judge(self, answer: Answer | None, place: int) -> None:
        assert answer is not None
        if answer.status == 429 and 1 <= int(answer.headers["retry-after"]) <= 60:
            self.count["refused"] += 1
        elif answer.status != 200:
            self.load.wrong.append(f"{answer.status}: {answer.body[:200]!r}")
        elif told(answer) != self.expected[place]:
            self.load.wrong.append(f"prompt {place} was answered otherwise than alone")
        else:
            self.count["texts"] += 1

    async def nonsense(self, client: Client, draw: random.Random) -> None:
        body = draw.choice([draw.randbytes(100), b"[" * 5000, b'{"model": 1}', self.load.body(0, prompt=[10**12])])
        answer = await client.post("/v1/completions", body)
        assert answer is not None
        self.count["nonsense"] += 1
        if answer.status not in (400, 404):
            self.load.wrong.append(f"nonsense was answered by {answer.status}")

    async def floods(self) -> None:
        """Now and then more at once than may wait."""
        while time.perf_counter() < self.until:
            async with connected(self.load.server.port, self.flood) as clients:
                asked = [client.post("/v1/completions", self.load.body(0, logprobs=0)) for client in clients]
                for answer in await asyncio.gather(*asked):
                    self.judge(answer, 0)
            await asyncio.sleep(max(0.0, min(20.0, self.until - time.perf_counter())))

    async def dawdle(self) -> None:
        """A header that never ends."""
        while time.perf_counter() < self.until:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.load.server.port)
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n")
            if b" 408 " not in await reader.read():
                self.load.wrong.append("a header without an end was not answered by 408")
            writer.close()


async def measure(options: argparse.Namespace, server: Server, queue: int) -> dict[str, dict[str, Any]]:
    """The figures and verdicts of each part that was asked for."""
    load, parts = Load(server), {}
    expected = answers_alone(options.bundle, options.slots)
    steps = {
        "rates": (options.turns, lambda: compare_rates(load, options.clients, options.turns)),
        "queue": (options.queued, lambda: queue_up(load, options.queued, expected)),
        "mixture": (options.seconds, lambda: Mixture(load, options.clients, queue + 50, expected).run(options.seconds)),
    }
    for name, (wanted, step) in steps.items():
        if wanted:
            figures, found = await step()
            show(found)
            parts[name] = {**figures, "wrong": load.wrong[:5], "verdicts": found}
    return parts


def make_page(parts: dict[str, dict[str, Any]]) -> str:
    """The document of what was found; parts of one server's run stand together."""
    lines = ["# Serving under load", "", "Written by `scripts/load_server.py`; not to be edited.", ""]
    about = ""
    for name in (name for name in PARTS if name in parts):
        part = parts[name]
        if part["about"] != about:
            about = part["about"]
            lines += [f"{about}; the clients run on the same processor.", ""]
        lines += [f"## {PARTS[name]}", "", "| bar | found | met |", "| --- | --- | --- |"]
        lines += [f"| {bar} | {found} | {'yes' if met else '**no**'} |" for bar, found, met in part["verdicts"]]
        lines.append("")
    return "\n".join(lines)


def write_page(page: Path, parts: dict[str, dict[str, Any]]) -> None:
    """Put the parts beside those that the page has from other runs, and write it anew."""
    kept = page.with_suffix(".json")
    known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    known |= parts
    kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    page.write_text(make_page(known), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--turns", type=int, default=4, help="of one client and of all; 0: not at all")
    parser.add_argument("--queued", type=int, default=200, help="clients at once; 0: not at all")
    parser.add_argument("--seconds", type=float, default=0.0, help="of mixed load; 0: not at all")
    parser.add_argument("--slots", type=int, help="default: the server's own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stream-interval", type=int, metavar="MS", help="default: the server's own")
    parser.add_argument("-o", "--output", type=Path, help="the page about it, and its figures beside it as JSON")
    options = parser.parse_args()
    queue = max(options.queued, 2 * options.clients)
    with tempfile.TemporaryDirectory() as folder:
        limits = {"threads": options.threads, "queue": queue}
        wanted = {"slots": options.slots, "stream_interval": options.stream_interval}
        limits |= {name: value for name, value in wanted.items() if value is not None}
        server = Server(options.bundle, Path(folder) / "log", **limits)
        options.slots = server.slots
        try:
            parts = asyncio.run(measure(options, server, queue))
        finally:
            code = server.end()
        clean = "Traceback" not in server.log
    said = f"exit code {code}, {'no' if clean else 'a'} traceback"
    end = Verdict("the server ends cleanly", said, clean and not code)
    show([end])
    where = f"{server.model}, {options.slots} slots, {options.threads} threads, on {machine.cpu_name()}"
    for part in parts.values():
        part["about"] = where
        part["verdicts"].append(end)
    if options.output:
        write_page(options.output, parts)
    leave([verdict for part in parts.values() for verdict in part["verdicts"]])


if __name__ == "__main__":
    main()
