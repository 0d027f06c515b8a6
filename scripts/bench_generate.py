"""What moedge adds to a token beside the graph's own run: `generate` against the bare session.

    python scripts/bench_generate.py [BUNDLE] [--tokens 200] [--rounds 8] [--threads 1] [--json FILE]

Greedy text of one prompt, round by round in turns: by the session alone (a step, the largest logit), and by
`Engine.generate`, with sampling and decoding of text. Each line gives the least time of a token over the rounds, from
the first token to the last; the difference is what sampling and text cost. Without a bundle: the sample model at int4.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import explain_missing  # noqa: F401
import numpy as np

import moedge
from moedge.runtime import kernels
from moedge.runtime.engine import Engine

SAMPLE = Path(__file__).resolve().parent.parent / "sample"
PROMPT = "def read(self"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or make_sample(Path(folder) / "sample")
        with moedge.load(bundle, "cpu", threads=args.threads) as engine:
            bare, whole = float("inf"), float("inf")
            for _ in range(args.rounds):
                bare = min(bare, time_session(engine, args.tokens))
                whole = min(whole, time_generate(engine, args.tokens))
            found = kernels.describe(engine.info.session)
    print(f"session  {bare * 1e6:8.1f} us a token  {1 / bare:8.0f} tokens/s  ({found}, {args.threads} threads)")
    print(f"generate {whole * 1e6:8.1f} us a token  {1 / whole:8.0f} tokens/s")
    print(f"added    {(whole - bare) * 1e6:8.1f} us a token")
    if args.json:
        args.json.write_text(json.dumps({"session_s": bare, "generate_s": whole}) + "\n", encoding="utf-8")


def make_sample(folder: Path) -> Path:
    moedge.export(SAMPLE, folder, weights="int4", verify=False)
    moedge.build(folder, "cpu")
    return folder


def time_session(engine: Engine, count: int) -> float:
    """Seconds a token of `count` steps behind the prompt."""
    session, row = engine.begin(), np.zeros(1, np.int64)
    token = np.array([int(engine.prefill(np.array(engine.tokenize(PROMPT), np.int64), session).argmax())])
    began = time.perf_counter()
    for _ in range(count):
        token[0] = session.step(token, row).argmax()
    return (time.perf_counter() - began) / count


def time_generate(engine: Engine, count: int) -> float:
    """Seconds a token from the first piece of text to the last."""
    pieces = engine.generate(PROMPT, max_new_tokens=count + 1, temperature=0.0)
    next(pieces)
    began, before = time.perf_counter(), len(pieces.tokens)
    for _ in pieces:
        pass
    return (time.perf_counter() - began) / (len(pieces.tokens) - before)


if __name__ == "__main__":
    main()
