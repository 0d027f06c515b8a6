"""What the KV cache's type costs: quality on the sample model, and step times on a bundle of your own.

    python scripts/kv_cache.py -o docs/kv-cache.md
    python scripts/kv_cache.py -o docs/kv-cache.md --times BUNDLE --contexts 512,4096

The sample is exported at int4 and scored on its held-out text with each type (`moedge eval`, the first --characters of
it). Times are those of one decode step behind so many tokens, the least of twelve, in processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

import moedge
from moedge.bundle import ENGINE_MANIFEST, Bundle, read_json
from moedge.errors import EngineError
from moedge.profiles.shape import KV_CACHES
from moedge.runtime.eval import evaluate

ROOT = Path(__file__).resolve().parent.parent
TYPES = KV_CACHES["onnxruntime"]
STEPS, CHUNK, SEED = 12, 64, 0


def score(folder: Path, characters: int) -> list[str]:
    """Rows of the table of quality."""
    text = (ROOT / "sample" / "heldout.txt").read_text(encoding="utf-8")[:characters]
    moedge.export(ROOT / "sample", folder, weights="int4", verify=False)
    rows = ["| KV cache | bytes a token | perplexity | bits a byte |", "| --- | ---: | ---: | ---: |"]
    for kind in TYPES:
        engine = moedge.build(folder, "cpu", kv_cache=kind)
        nbytes = read_json(engine / ENGINE_MANIFEST, EngineError)["cache_bytes_per_token"]
        found = evaluate(folder, text, "cpu", threads=1)
        rows.append(f"| {kind} | {nbytes:,} | {found['perplexity']:.4f} | {found['bits_per_byte']:.4f} |")
        print(rows[-1], flush=True)
    return rows


def measure(bundle: Path, contexts: list[int]) -> list[str]:
    """Rows of the table of times, in ms."""
    rows = ["| KV cache | bytes a token | " + " | ".join(f"ms at {count:,}" for count in contexts) + " |"]
    rows.append("| --- | ---: |" + " ---: |" * len(contexts))
    for kind in TYPES:
        moedge.build(bundle, "cpu", kv_cache=kind, max_seq_len=max(contexts) + 1)
        with moedge.load(bundle, "cpu", threads=1) as engine:
            session, cells = engine.begin(), []
            tokens = np.random.default_rng(SEED).integers(0, engine.info.vocab_size, max(contexts))
            for count in contexts:
                while session.length < count:
                    part = tokens[session.length : min(count, session.length + CHUNK)]
                    session.step(part, np.empty(0, np.int64))
                times = []
                for _ in range(STEPS):
                    began = time.thread_time()
                    session.step(tokens[:1], np.zeros(1, np.int64))
                    times.append(time.thread_time() - began)
                    session.truncate(count)
                cells.append(f"{1e3 * min(times):.2f}")
            rows.append(f"| {kind} | {engine.info.cache_bytes_per_token:,} | " + " | ".join(cells) + " |")
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=20_000)
    parser.add_argument("--times", type=Path, action="append", default=[], metavar="BUNDLE")
    parser.add_argument("--contexts", default="512,4096")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quality = score(Path(folder) / "sample", options.characters)
    page = ["# The KV cache's type", "", "Written by `scripts/kv_cache.py`; not to be edited.", ""]
    page += ["`moedge build BUNDLE --profile cpu` takes fp16 where the weights are integers and moedge's own kernels"]
    page += ["are compiled, else fp32. `--kv-cache` asks for another; engine.json says what it is (`kv_cache`).", ""]
    page += [f"The sample model at int4 on the first {options.characters:,} characters of its held-out text:", ""]
    page += quality
    contexts = [int(word) for word in options.contexts.split(",")]
    for bundle in options.times:
        model = Bundle.open(bundle).manifest["model"]["name"]
        page += ["", f"One decode step of {model} (random weights), one thread, processor time:", ""]
        page += measure(bundle, contexts)
    options.output.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
