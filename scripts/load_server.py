"""Mixed load on `moedge serve`: rates, fairness, and whether its memory stays flat. Not part of the tests.

    python scripts/load_server.py BUNDLE --seconds 1800 --clients 32
    python scripts/load_server.py BUNDLE --seconds 20 --clients 32 --threads 2 --json load.json

Clients stream greedy texts of mixed lengths; some go away in the middle, some ask for nonsense. First one client alone,
then all of them. Every answer that came whole is compared with the same prompt's answer from the single client.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

PROMPTS = 40
LONGEST_PROMPT, LONGEST_TEXT = 400, 64


class Load:
    """What the clients share, and what they found."""

    def __init__(self, url: str, model: str, prompts: list[str]) -> None:
        self.url, self.model, self.prompts = url, model, prompts
        self.answers: dict[int, str] = {}
        self.wrong: list[str] = []
        self.tokens = 0
        self.texts = 0
        self.rates: list[float] = []  # tokens a second after the first one, of each stream long enough to have a pace
        self.first: list[float] = []  # seconds to the first token
        self.refused = 0
        self.lock = threading.Lock()

    def ask(self, http: httpx.Client, place: int, *, leave: bool = False) -> str | None:
        """Stream one text; None where it was left or refused."""
        body = {"model": self.model, "prompt": self.prompts[place], "stream": True, "temperature": 0}
        body |= {"max_tokens": 8 + place * 7 % LONGEST_TEXT}
        began, first, text, count = time.monotonic(), 0.0, "", 0
        with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.status_code == 429:
                with self.lock:
                    self.refused += 1
                time.sleep(min(1.0, float(answer.headers["retry-after"])))
                return None
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code}: {answer.read()!r}")
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line[6:])
                first = first or time.monotonic() - began
                text += piece["choices"][0]["text"]
                count = piece["usage"]["completion_tokens"] if piece["usage"] else count
                if leave and text:
                    return None
        with self.lock:
            self.tokens += count
            self.texts += 1
            self.first.append(first)
            if count >= 16:
                self.rates.append((count - 1) / (time.monotonic() - began - first))
        return text

    def work(self, seed: int, until: float) -> None:
        """One client's life."""
        draw = random.Random(seed)
        with httpx.Client(timeout=120, verify=False) as http:
            while time.monotonic() < until:
                try:
                    self.turn(http, draw)
                except (RuntimeError, httpx.HTTPError, ValueError, KeyError) as error:
                    self.wrong.append(repr(error)[:300])

    def turn(self, http: httpx.Client, draw: random.Random) -> None:
        place = draw.randrange(len(self.prompts))
        kind = draw.random()
        if kind < 0.05:
            status = http.post(f"{self.url}/v1/completions", content=draw.randbytes(100)).status_code
            if status != 400:
                self.wrong.append(f"nonsense was answered by {status}")
            return
        text = self.ask(http, place, leave=kind < 0.15)
        if text is not None and text != self.answers.setdefault(place, text):
            self.wrong.append(f"prompt {place} had another answer")


def resident(pid: int) -> int:
    """The process's resident memory in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))


def make_prompts() -> list[str]:
    """Python-like text of mixed lengths, some with one beginning."""
    draw = random.Random(0)
    words = "def class return import self value for in if else not None print range len open with as".split()
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, LONGEST_PROMPT // 5))) for _ in range(PROMPTS)]
    return [texts[0] + text if place % 4 == 0 else text for place, text in enumerate(texts)]


def measure(options: argparse.Namespace, process: subprocess.Popen[str], url: str, model: str) -> dict[str, Any]:
    prompts = make_prompts()
    alone = Load(url, model, prompts)
    began = time.monotonic()
    with httpx.Client(timeout=120, verify=False) as http:
        for place in range(PROMPTS):
            text = alone.ask(http, place)
            assert text is not None
            alone.answers[place] = text
    alone_s = time.monotonic() - began
    everybody = Load(url, model, prompts)
    everybody.answers = alone.answers
    began = time.monotonic()
    until = began + options.seconds
    threads = [threading.Thread(target=everybody.work, args=(seed, until)) for seed in range(options.clients)]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until and process.poll() is None:
        time.sleep(min(10.0, options.seconds / 10))
        memory.append(resident(process.pid))
    for thread in threads:
        thread.join()
    settled = memory[len(memory) // 5 :]  # the first fifth fills caches
    return {
        "clients": options.clients,
        "tokens_per_s_alone": alone.tokens / alone_s,
        "tokens_per_s": everybody.tokens / (time.monotonic() - began),
        "stream_tokens_per_s": {"slowest": min(everybody.rates), "median": statistics.median(everybody.rates)},
        "ttft_s": {"median": statistics.median(everybody.first), "worst": max(everybody.first)},
        "texts": everybody.texts,
        "refused": everybody.refused,
        "wrong": len(everybody.wrong),
        "resident_bytes": {"first": settled[0], "last": settled[-1], "growth": settled[-1] / settled[0] - 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    command = [sys.executable, "-m", "moedge", "serve", options.bundle, "--port", "0"]
    command += ["--threads", str(options.threads), "--slots", str(options.slots)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        if " on http://" not in line:
            sys.exit(line.strip())
        model, url = line.split(" on ")[0], line.split(" on ")[1].split()[0].removesuffix("/v1")
        figures = measure(options, process, url, model)
    finally:
        process.terminate()
        process.communicate()
    text = json.dumps({**figures, "exit": process.returncode}, indent=1)
    print(text)
    if options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
