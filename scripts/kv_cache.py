"""What the KV cache's type costs: quality on the sample model, and step times on a bundle of your own.

    python scripts/kv_cache.py -o docs/kv-cache.md --grouped CHECKPOINT
    python scripts/kv_cache.py -o docs/kv-cache.md --times BUNDLE --contexts 512,4096

The sample is exported at int4 and scored on its held-out text with each type (`moedge eval`, the first --characters of
it, in windows of 1,024 tokens), and so is a model of grouped attention (scripts/train_grouped.py). Times are those of
one decode step behind so many tokens, the least of twelve, in processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
import numpy as np

import moedge
from moedge.bundle import ENGINE_MANIFEST, Bundle, read_json
from moedge.errors import EngineError
from moedge.profiles.shape import KV_CACHES
from moedge.runtime.eval import evaluate

INTRODUCTION = """\
Of an engine for a CPU, `moedge build --kv-cache` chooses the type. By itself it is int8 beside int4 and int8 weights
where moedge's own kernels run (fp16 for an MLA latent in blocks below 32 channels), else fp32. engine.json says what it
is (`kv_cache`), and what the graph of onnxruntime's own ops has where that is another (`stock`).

An int8 row has a scale for each head of keys and values, or each block of a latent, made when it is written. The tables
have bits a byte; the mean divergence (KL, nats a token) from the same model with exact weights and an fp32 cache, and
what the cache's type adds to it; the divergence from the same int4 weights with an fp32 cache, and how often the
likeliest token is the same. There fp16 differs too: where two experts are nearly as likely, any rounding may choose.
Windows are of 1,024 tokens; each token has 512 or more before it where there are so many.
""".splitlines()
ROOT = Path(__file__).resolve().parent.parent
TYPES = KV_CACHES["onnxruntime"]
STEPS, CHUNK, SEED, CONTEXT = 12, 64, 0, 1024


def score(folder: Path, checkpoint: Path, text: str) -> list[str]:
    """Rows of the table of quality."""
    exact, plain, tried = folder / "exact", folder / "plain", folder / "tried"
    moedge.export(checkpoint, exact, weights="fp32", verify=False)
    moedge.export(checkpoint, plain, weights="int4", verify=False)
    shutil.copytree(plain, tried)
    moedge.build(exact, "cpu", kv_cache="fp32")
    moedge.build(plain, "cpu", kv_cache="fp32")
    columns = ["bytes a token", "bits a byte", "from exact weights", "added", "from an fp32 cache", "same token"]
    rows = ["| KV cache | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    settings: dict[str, Any] = {"context": CONTEXT, "stride": CONTEXT // 2, "threads": 1}
    int4 = 0.0
    for kind in TYPES:
        engine = moedge.build(tried, "cpu", kv_cache=kind)
        nbytes = read_json(engine / ENGINE_MANIFEST, EngineError)["cache_bytes_per_token"]
        found = evaluate(tried, text, "cpu", against=exact, **settings)
        whole = found["against"]["kl_nats"]["mean"]
        own = evaluate(tried, text, "cpu", against=plain, **settings)["against"]
        int4 = int4 or whole
        cells = [f"{nbytes:,}", f"{found['bits_per_byte']:.4f}", f"{whole:.5f}", f"{whole / int4 - 1:+.1%}"]
        cells += [f"{own['kl_nats']['mean']:.5f}", f"{own['top1_agreement']:.1%}"]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
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
    parser.add_argument("--grouped", type=Path, metavar="CHECKPOINT", help="what scripts/train_grouped.py wrote")
    options = parser.parse_args()
    text = (ROOT / "sample" / "heldout.txt").read_text(encoding="utf-8")[: options.characters]
    models = {"The sample model (MLA's latent)": ROOT / "sample"}
    if options.grouped:
        models["A Qwen2-MoE model that `scripts/train_grouped.py` trains (keys and values)"] = options.grouped
    page = ["# The KV cache's type", "", "Written by `scripts/kv_cache.py`; not to be edited.", "", *INTRODUCTION]
    for name, checkpoint in models.items():
        with tempfile.TemporaryDirectory() as folder:
            quality = score(Path(folder), checkpoint, text)
        page += ["", f"{name}, at int4, on the first {options.characters:,} characters of the sample's held-out text:"]
        page += ["", *quality]
    contexts = [int(word) for word in options.contexts.split(",")]
    for bundle in options.times:
        model = Bundle.open(bundle).manifest["model"]["name"]
        page += ["", f"One decode step of {model} (random weights), one thread, processor time:", ""]
        page += measure(bundle, contexts)
    options.output.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
