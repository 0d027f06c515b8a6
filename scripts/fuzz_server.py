"""10,000 random requests to `moedge serve`, judged: exit code 1 on a 500, a leak or a stuck slot. Not one of the tests.

    python scripts/fuzz_server.py BUNDLE --requests 10000

A third are known fields with values of any type, a third follow the server's own OpenAPI, and the rest break it or are
random bytes. It needs what the tests need.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import explain_missing  # noqa: F401
import httpx
from load_server import Server
from verdicts import FLAT, Verdict, leave, show

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from random_requests import ask_by_schema, ask_bytes, ask_fields  # noqa: E402

ROUNDS = 10
LIMITS = {"slots": 4, "threads": 1, "max_new_tokens": 8, "max_body": 100_000}


def ask(server: Server, requests: int, seed: int) -> tuple[Counter[int], list[int]]:
    """Send them in rounds; the statuses that came, and the resident memory after each round."""
    url = f"http://127.0.0.1:{server.port}"
    asked: Counter[int] = Counter()
    memory = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for turn in range(ROUNDS):
            count = requests * (turn + 1) // ROUNDS
            asked += ask_fields(http, (count - asked.total()) // 3, seed + turn)
            asked += ask_bytes(http, (count - asked.total()) // 8, seed + turn)
            while asked.total() < count:  # each has some kinds of request, most of them of /v1
                asked += ask_by_schema(url, max(1, (count - asked.total()) // 8), seed + turn)
                seed += 1000
            memory.append(server.memory("VmRSS"))
            print(f"{asked.total():,} requests, {memory[-1] / 2**20:.1f} MiB", flush=True)
    return asked, memory


def judge(server: Server, requests: int, seed: int) -> list[Verdict]:
    files = server.open_files()
    asked, memory = ask(server, requests, seed)
    for _ in range(100):
        stuck, failed = server.left_behind()
        files_left = server.open_files() - files
        if not stuck and files_left <= 1:
            break
        time.sleep(0.1)
    growth = memory[-1] / memory[1] - 1  # the first rounds fill caches
    none = not failed and 500 not in asked
    statuses = ", ".join(f"{count:,} of {status}" for status, count in sorted(asked.items()))
    return [
        Verdict(f"{asked.total():,} random requests: no 500", statuses, none),
        Verdict("no leak of memory", f"{growth:.1%} from the second of {ROUNDS} rounds to the last", growth <= FLAT),
        Verdict("no leak of connections", f"{files_left} descriptors more than before", files_left <= 1),
        Verdict("no stuck slot", f"{stuck} texts run or wait", not stuck),
        Verdict("nothing in the log", f"{len(server.log.splitlines()) - 1} lines", "Traceback" not in server.log),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(options.bundle, Path(folder) / "log", **LIMITS)
        try:
            verdicts = judge(server, options.requests, options.seed)
        finally:
            code = server.end()
    verdicts.append(Verdict("it ends cleanly", f"exit code {code}", code == 0))
    show(verdicts)
    leave(verdicts)


if __name__ == "__main__":
    main()
