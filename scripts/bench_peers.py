"""Compare this machine's CPU engine with llama.cpp, shape by shape: python scripts/bench_peers.py --work FOLDER

For each shape a random checkpoint is written, exported at int4 and built for the CPU, and a random GGUF file of the
same shape in Q4_0 is written. Every engine is a process of its own (scripts/peers_worker.py), all of them loaded; in
each round every one gets its turn while the others are stopped, and so does a measurement of the memory's bandwidth.
Ratios are of one round. What was measured goes to docs/performance.json; docs/performance.md and its chart are made of
all of it.

Needs llama-cpp-python (built on the machine with its native flags) and gguf: in this environment, or in the one whose
Python --peer-python names. FOLDER takes 31 GB for the largest shape's checkpoint while it is exported, 9 GB afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peers_page import write_page
from synthetic_checkpoint import SHAPES, read_shape, write_checkpoint

import moedge
from moedge.bundle import Bundle, write_json
from moedge.profiles.shape import bytes_per_token
from moedge.runtime import machine
from moedge.runtime.preflight import read_engine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "performance.json"
DEFAULT = ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b:12")
PROMPT, NEW, LONG = 512, 32, 4096


class Worker:
    """An engine's process, stopped but when it is its turn."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env={**os.environ, **(environment or {})}, **pipes)
        self.about = self._read()
        self._process.send_signal(signal.SIGSTOP)

    def ask(self, run: str, tokens: int) -> dict[str, Any]:
        """One run, alone."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps({"run": run, "tokens": tokens}) + "\n")
        self._process.stdin.flush()
        found = self._read()
        self._process.send_signal(signal.SIGSTOP)
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a worker ended; what it said stands above")
        return dict(json.loads(line))


def prepare(name: str, work: Path, peer_python: str) -> tuple[Path, Path]:
    """The bundle and the GGUF file of a shape, made where they are not there yet."""
    shape, _, layers = name.partition(":")
    config = read_shape(shape, int(layers) if layers else None)
    folder = work / name.replace(":", "-")
    bundle, other = folder / "bundle", folder / "q4_0.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not (bundle / "moedge.json").exists():
        say(f"{name}: writing a checkpoint, exporting it")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        write_checkpoint(config, folder / "checkpoint")
        moedge.export(folder / "checkpoint", bundle, weights="int4", verify=False)
        shutil.rmtree(folder / "checkpoint")
    moedge.build(bundle, "cpu", max_seq_len=room(config))
    if not other.exists():
        say(f"{name}: writing {other.name}")
        write_json(folder / "config.json", config)
        script = Path(__file__).with_name("peers_gguf.py")
        command = [peer_python, script, folder / "config.json", other.with_suffix(".part")]
        subprocess.run(command, check=True)
        other.with_suffix(".part").rename(other)
    return bundle, other


def room(config: dict[str, Any]) -> int:
    """Tokens of the context: the long one and what follows, or what the shape has."""
    return min(LONG + NEW, int(config["max_position_embeddings"]))


@contextmanager
def open_workers(bundle: Path, other: Path, context: int, args: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """All engines, loaded one after the other."""
    script = str(Path(__file__).with_name("peers_worker.py"))
    numbers = [str(args.threads), str(context)]
    with ExitStack() as stack:
        workers = {}
        commands = {
            "moedge": [sys.executable, script, "moedge", str(bundle), *numbers],
            "llama.cpp": [args.peer_python, script, "llama.cpp", str(other), *numbers],
        }
        for name, command in commands.items():
            say(f"  loading {name}")
            workers[name] = Worker(command)
            stack.callback(workers[name].close)
        yield workers


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One shape, `args.rounds` rounds after one to warm up."""
    bundle_path, other = prepare(name, args.work, args.peer_python)
    bundle = Bundle.open(bundle_path)
    context = room(bundle.config)
    filling = context - NEW
    load = os.getloadavg()[0]
    found: dict[str, Any] = {}
    with open_workers(bundle_path, other, context, args) as workers:
        for peer, worker in workers.items():
            say(f"  {peer}: filling a context of {filling}")
            filled = worker.ask("fill", filling)
            found[peer] = {"about": worker.about, "memory": filled}
            found[peer] |= {key: [] for key in ("prefill_s", "decode_s", "decode_long_s")}
        bandwidth = []
        for turn in range(args.rounds + 1):
            say(f"  round {turn} of {args.rounds}" if turn else "  warming up")
            for peer, worker in workers.items():
                prefill = worker.ask("prefill", PROMPT)["seconds"]
                decode = worker.ask("decode", NEW)["seconds"]
                long = worker.ask("decode_long", NEW)["seconds"]
                if turn:
                    found[peer]["prefill_s"].append(prefill)
                    found[peer]["decode_s"].append(statistics.median(decode))
                    found[peer]["decode_long_s"].append(statistics.median(long))
            if turn:
                bandwidth.append(machine.measure_bandwidth(args.threads))
    engine = read_engine(bundle, "cpu")
    element = {"float32": 4, "float16": 2, "int8": 1}[engine.cache[0].dtype]
    contexts = {"decode": PROMPT + NEW // 2, "decode_long": filling + NEW // 2}
    return {
        "shape": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": args.threads,
        "load_before": load,
        "parameters": bundle.manifest["model"]["parameters"],
        "active_parameters": bundle.manifest["model"]["active_parameters"],
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "long_context": filling,
        "backend_version": engine.backend_version,
        "bytes_per_token": {
            what: bytes_per_token(bundle.manifest, context, 1, element) for what, context in contexts.items()
        },
        "bandwidth_bytes_per_s": bandwidth,
        "peers": found,
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles and GGUF files; kept between runs")
    parser.add_argument("--shape", action="append", metavar="NAME[:LAYERS]", help=f"default: {', '.join(DEFAULT)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prepare-only", action="store_true", help="write bundles and GGUF files, measure nothing")
    args = parser.parse_args(arguments)
    known = json.loads(SHAPES.read_text(encoding="utf-8"))
    for name in args.shape or DEFAULT:
        if name.partition(":")[0] not in known:
            parser.error(f"no shape {name!r}; there are {', '.join(known)}")
        say(name)
        if args.prepare_only:
            prepare(name, args.work, args.peer_python)
            continue
        result = measure(name, args)
        results = json.loads(args.results.read_text()) if args.results.exists() else []
        results = [*(each for each in results if each["shape"] != name), result]
        write_json(args.results, sorted(results, key=lambda each: str(each["shape"])))
        write_page(results, args.results.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
