"""Compare this machine's CPU engine with others, shape by shape: python scripts/bench_peers.py --work FOLDER

For each shape a random checkpoint is written, exported with `moedge export`'s defaults and built for the CPU, and a
random GGUF file of the same shape in Q4_0 is written. A bundle that an earlier version made with other defaults is made
anew. Every engine is a process of its own (scripts/peers_worker.py), all of them loaded; in
each round every one gets its turn while the others are stopped, and the memory's bandwidth is measured right before
and after our decode. Ratios and shares of the limit are of one round. The parts of a shape, each to be run alone with
--part:

    llama.cpp   prefill, decode, decode at a long context
    int4-head   the same with `moedge export --head int4` (where the head is much of what is read, or where asked for)
    genai       onnxruntime-genai over the engine's folder: prefill and decode
    batch       our engine with eight sequences a step (OLMoE, or where asked for)
    optimum     what optimum-onnx makes of a small checkpoint of the family (scripts/peers_optimum.py)

What was measured goes to docs/performance.json after each part, of which docs/performance.md and its chart are made.

Needs llama-cpp-python (built on the machine with its native flags) and gguf: in this environment, or in the one whose
Python --peer-python names. FOLDER takes 31 GB for the largest shape's checkpoint while it is exported, 9 GB afterwards.
"""

from __future__ import annotations

import argparse
import datetime
import inspect
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401
from peers_gguf import ARCHITECTURES
from peers_gguf import bytes_per_token as gguf_bytes_per_token
from peers_page import write_page
from synthetic_checkpoint import SHAPES, read_shape, write_checkpoint

import moedge
from moedge.bundle import Bundle, read_json, write_json
from moedge.export.pipeline import export_checkpoint
from moedge.profiles.advice import narrower_weight_bytes
from moedge.profiles.shape import ModelShape, bytes_per_token
from moedge.runtime import machine
from moedge.runtime.preflight import EngineInfo, read_engine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "performance.json"
DEFAULT = ("olmoe-1b-7b", "deepseek-v2-lite", "qwen3-30b-a3b:12")
PARTS = ("llama.cpp", "int4-head", "genai", "batch", "optimum")
# Parts that not every shape has unless asked for by --part: the one that the goal for batches is about, and the one
# whose head is nearly half of what a token reads.
ONLY = {"batch": ("olmoe-1b-7b",), "int4-head": ("qwen3-30b-a3b:12",)}
_FORM = ("weights", "head", "group_size", "algorithm")
PROMPT, NEW, LONG = 512, 32, 4096
BATCH_STEPS, OPTIMUM_SECONDS = 16, 240
GENAI_MEMORY = 2.1  # of the weights: our engine maps them, genai lays them out anew
GENAI_CACHE_BYTES = 4  # of an element: the graph that it runs caches float32


class WorkerError(Exception):
    """A worker ended before it answered; the text is the last that it said."""


class Worker:
    """An engine's process, stopped but when it is its turn."""

    def __init__(self, command: Sequence[str]) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, stderr=self._said, **pipes)
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
            code = self._process.wait()
            self._said.seek(0)
            said = [line.strip() for line in self._said.read().splitlines() if line.strip()]
            raise WorkerError(said[-1][:300] if said else f"it ended with exit code {code}")
        return dict(json.loads(line))


@dataclass(frozen=True)
class Files:
    """What is measured of a shape."""

    bundle: Path
    int4_head: Path | None  # where that part is run
    gguf: Path


def prepare(name: str, work: Path, peer_python: str, parts: Sequence[str]) -> Files:
    """The bundles and the GGUF file of a shape, made where they are not there yet."""
    shape, _, layers = name.partition(":")
    config = read_shape(shape, int(layers) if layers else None)
    if "llama.cpp" in parts and config["model_type"] not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise SystemExit(f"error: {name}: no GGUF file of {config['model_type']} is known here, only of {known}")
    folder = work / label(name).replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    bundles: dict[str | None, Path] = {None: folder / "bundle"}
    if "int4-head" in parts:
        bundles["int4"] = folder / "bundle-int4-head"
    missing = [head for head, bundle in bundles.items() if not is_made(bundle, head)]
    if missing:
        say(f"{name}: writing a checkpoint, exporting it")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        write_checkpoint(config, folder / "checkpoint")
        for head in missing:
            moedge.export(folder / "checkpoint", bundles[head], head=head, verify=False, force=True)
        shutil.rmtree(folder / "checkpoint")
    for bundle in bundles.values():
        moedge.build(bundle, "cpu", max_seq_len=room(config))
    other = folder / "q4_0.gguf"
    write_json(folder / "config.json", config)
    if not other.exists():
        say(f"{name}: writing {other.name}")
        script = Path(__file__).with_name("peers_gguf.py")
        command = [peer_python, script, folder / "config.json", other.with_suffix(".part")]
        subprocess.run(command, check=True)
        other.with_suffix(".part").rename(other)
    return Files(bundles[None], bundles.get("int4"), other)


def label(name: str) -> str:
    """What a shape is called in results: of a config.json's path the file's name."""
    shape, colon, layers = name.partition(":")
    return (Path(shape).stem if shape.endswith(".json") else shape) + colon + layers


def is_made(bundle: Path, head: str | None) -> bool:
    """Whether a bundle is there, laid out to the byte as `moedge export` does where at most a head is asked for."""
    if not (bundle / "moedge.json").exists():
        return False
    manifest = Bundle.open(bundle).manifest
    usual = inspect.signature(export_checkpoint).parameters["weights"].default
    asked = usual if head is None else f"{usual} --head {head}"
    return sum(manifest["sizes"].values()) == narrower_weight_bytes(manifest, asked)


def room(config: dict[str, Any]) -> int:
    """Tokens of the context: the long one and what follows, or what the shape has."""
    return min(LONG + NEW, int(config["max_position_embeddings"]))


@contextmanager
def open_workers(kinds: dict[str, Path], context: int, args: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """Engines by their kind and file, loaded one after the other."""
    script = str(Path(__file__).with_name("peers_worker.py"))
    with ExitStack() as stack:
        workers = {}
        for kind, path in kinds.items():
            say(f"  loading {kind}")
            python = args.peer_python if kind == "llama.cpp" else sys.executable
            workers[kind] = Worker([python, script, kind, str(path), str(args.threads), str(context)])
            stack.callback(workers[kind].close)
        yield workers


def race(kinds: dict[str, Path], context: int, filling: int, rounds: int, args: argparse.Namespace) -> dict[str, Any]:
    """`rounds` rounds of the engines after one to warm up; `filling`: tokens of the long context, 0 for none."""
    found: dict[str, Any] = {}
    bandwidth = []
    with open_workers(kinds, context, args) as workers:
        for peer, worker in workers.items():
            say(f"  {peer}: filling a context of {filling}" if filling else f"  {peer}: warming up")
            filled = worker.ask("fill", filling) if filling else worker.ask("prefill", PROMPT)
            found[peer] = {"about": worker.about, "memory": filled if filling else worker.about}
            found[peer] |= {key: [] for key in ("prefill_s", "decode_s", *(["decode_long_s"] if filling else []))}
        for turn in range(rounds + 1):
            say(f"  round {turn} of {rounds}" if turn else "  warming up")
            for peer, worker in workers.items():
                times = {"prefill_s": worker.ask("prefill", PROMPT)["seconds"]}
                times["decode_s"], near = beside_bandwidth(worker, "decode", NEW, args.threads)
                if filling:
                    times["decode_long_s"] = statistics.median(worker.ask("decode_long", NEW)["seconds"])
                for key, seconds in times.items() if turn else ():
                    found[peer][key].append(seconds)
                if turn and peer == "moedge":
                    bandwidth.append(near)
    return {"peers": found, "bandwidth_bytes_per_s": bandwidth}


def beside_bandwidth(worker: Worker, run: str, tokens: int, threads: int) -> tuple[float, float]:
    """Seconds of a step, the median, and what the memory gave right before and right after: it has better and worse
    phases on a machine that others share."""
    before = machine.measure_bandwidth(threads)
    seconds = statistics.median(worker.ask(run, tokens)["seconds"])
    return seconds, (before + machine.measure_bandwidth(threads)) / 2


def measure_llama(name: str, bundle: Bundle, other: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Beside llama.cpp: what the shape's result is of."""
    context = room(bundle.config)
    filling = context - NEW
    kinds = {"moedge": bundle.path, "llama.cpp": other}
    try:
        read = {"llama.cpp": read_of_gguf(read_json(other.with_name("config.json")), filling)}
        found = describe(bundle, filling, args) | race(kinds, context, filling, args.rounds, args)
        return found | {"peer_bytes_per_token": read}
    except WorkerError as error:
        raise SystemExit(f"error: {name}: an engine ended: {error}") from None


def contexts(filling: int) -> dict[str, int]:
    """Tokens in the cache in the middle of each run."""
    return {"decode": PROMPT + NEW // 2, "decode_long": filling + NEW // 2}


def read_of_gguf(config: dict[str, Any], filling: int) -> dict[str, int]:
    """Bytes that a token reads of the peer's file, by run."""
    return {what: gguf_bytes_per_token(config, context) for what, context in contexts(filling).items()}


def describe(bundle: Bundle, filling: int, args: argparse.Namespace) -> dict[str, Any]:
    """The machine, the shape and what a token has to read."""
    engine = read_engine(bundle, "cpu")
    element = cache_element(engine)
    quantization = bundle.manifest["quantization"]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "threads": args.threads,
        "load_before": os.getloadavg()[0],
        "parameters": bundle.manifest["model"]["parameters"],
        "active_parameters": bundle.manifest["model"]["active_parameters"],
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "long_context": filling,
        "backend_version": engine.backend_version,
        "weights": {name: quantization[name] for name in _FORM if name in quantization},  # older ones say no head
        "cache": engine.cache[0].dtype,
        "bytes_per_token": {
            what: bytes_per_token(bundle.manifest, context, 1, element) for what, context in contexts(filling).items()
        },
    }


def cache_element(engine: EngineInfo) -> float:
    """Bytes of an element of the engine's cache."""
    return {"float32": 4, "float16": 2, "int8": 1}[engine.cache[0].dtype]


def measure_genai(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """onnxruntime-genai over the engine's own folder, beside our engine; or the reason why not."""
    folder = bundle.engine_dir("cpu")
    if not (folder / "genai_config.json").exists():
        return {"reason": "the engine's folder has no genai_config.json"}
    wanted, free = round(GENAI_MEMORY * sum(bundle.sizes.values())), machine.available_memory_bytes()
    if free is not None and free < wanted:
        return {"reason": f"both engines want {wanted / 2**30:.0f} GiB of memory, {free / 2**30:.0f} are free"}
    context = PROMPT + 2 * NEW
    try:
        kinds = {"moedge": bundle.path, "genai": folder}
        read = bytes_per_token(bundle.manifest, PROMPT + NEW // 2, 1, GENAI_CACHE_BYTES)
        found = race(kinds, context, 0, args.rounds, args)
        return found | {"date": today(), "bytes_per_token": {"decode": read}}
    except WorkerError as error:
        return {"reason": str(error), "date": today()}


def measure_batch(bundle: Bundle, args: argparse.Namespace) -> dict[str, Any]:
    """Eight sequences a step, each behind PROMPT tokens, beside one, in turns."""
    engine, shape = read_engine(bundle, "cpu"), ModelShape.from_manifest(bundle.manifest)
    context = PROMPT + 2 * NEW
    one, several, bandwidth = [], [], []
    with open_workers({"moedge": bundle.path, "moedge-lanes": bundle.path}, context, args) as workers:
        lanes = workers["moedge-lanes"].about["lanes"]
        workers["moedge-lanes"].ask("fill", PROMPT)
        for turn in range(args.rounds + 1):
            say(f"  round {turn} of {args.rounds}" if turn else "  warming up")
            workers["moedge"].ask("prefill", PROMPT)
            alone = statistics.median(workers["moedge"].ask("decode", BATCH_STEPS)["seconds"])
            together, near = beside_bandwidth(workers["moedge-lanes"], "decode_batch", BATCH_STEPS, args.threads)
            if turn:
                one.append(alone)
                several.append(together)
                bandwidth.append(near)
    read = bytes_per_token(bundle.manifest, PROMPT + BATCH_STEPS // 2, lanes, cache_element(engine))
    return {
        "date": today(),
        "lanes": lanes,
        "expected_distinct_experts": shape.distinct_experts(lanes),
        "experts": shape.experts,
        "bytes_per_step": read,
        "decode_s": one,
        "step_s": several,
        "bandwidth_bytes_per_s": bandwidth,
    }


def measure_optimum(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What optimum-onnx makes of a small checkpoint of the shape's family, tried in a process of its own."""
    shape, _, layers = name.partition(":")
    folder = args.work / "optimum"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", read_shape(shape, int(layers) if layers else None))
    script = Path(__file__).with_name("peers_optimum.py")
    command = [sys.executable, script, folder / "config.json", folder / "work"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=OPTIMUM_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"exported": False, "reason": f"not done in {OPTIMUM_SECONDS} s", "date": today()}
    if done.returncode:
        return {"exported": False, "reason": f"its process ended with exit code {done.returncode}", "date": today()}
    return dict(json.loads(done.stdout)) | {"date": today()}


def today() -> str:
    return datetime.date.today().isoformat()


def measure_part(part: str, name: str, files: Files, args: argparse.Namespace) -> dict[str, Any]:
    """What a part adds to the shape's result."""
    bundle = Bundle.open(files.bundle)
    if part == "llama.cpp":
        return measure_llama(name, bundle, files.gguf, args)
    if part == "int4-head":
        assert files.int4_head is not None
        return {"int4_head": measure_llama(name, Bundle.open(files.int4_head), files.gguf, args)}
    if part == "genai":
        return {"genai": measure_genai(bundle, args)}
    if part == "batch":
        return {"batch": measure_batch(bundle, args)}
    return {"optimum": measure_optimum(name, args)}


def keep(path: Path, name: str, found: dict[str, Any]) -> None:
    """Write what was found into the shape's result, and the page of all results."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    own = next((each for each in results if each["shape"] == name), {"shape": name})
    results = [*(each for each in results if each["shape"] != name), own | found]
    results.sort(key=lambda each: str(each["shape"]))
    write_json(path, results)
    if all("peers" in each for each in results):
        write_page(results, path.with_suffix(".md"))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for bundles and GGUF files; kept between runs")
    parser.add_argument("--shape", action="append", metavar="NAME[:LAYERS]",
                        help=f"a shape, or a config.json's path; default: {', '.join(DEFAULT)}")  # fmt: skip
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; may be given again")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has llama-cpp-python")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prepare-only", action="store_true", help="write bundles and GGUF files, measure nothing")
    args = parser.parse_args(arguments)
    known = json.loads(SHAPES.read_text(encoding="utf-8"))
    for name in args.shape or DEFAULT:
        shape, _, layers = name.partition(":")
        if shape not in known and not Path(shape).is_file():
            parser.error(f"no shape {shape!r}; there are {', '.join(known)}; or the path of a config.json")
        if layers and not (layers.isdecimal() and int(layers) > 0):
            parser.error(f"{name!r}: after the colon comes a number of layers")
        say(name)
        parts = args.part or [part for part in PARTS if name in ONLY.get(part, (name,))]
        files = prepare(name, args.work, args.peer_python, parts)
        for part in () if args.prepare_only else parts:
            say(f" {part}")
            keep(args.results, label(name), measure_part(part, name, files, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
