"""Measure `moedge build` of real shapes: python scripts/bench_build.py deepseek-v2-lite --max-memory 10GiB

For each shape a synthetic checkpoint is written and exported (once: FOLDER/SHAPE-WEIGHTS is used again where it is
there), the dry run is asked for its plan, and the build runs in a process of its own. Peak memory is measured twice:
what the builders and the process that starts them say of themselves (engine.json), and the resident memory of all
processes of the build together, read from /proc ten times a second. The results go to a JSON file (--results), and
all that it holds into a page beside it (docs/device-builds.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401

# The neighbours: a script's own folder is first on the path.
from bench_export import describe_machine
from synthetic_checkpoint import read_shape, write_checkpoint

import moedge
from moedge.export.memory import parse_size
from moedge.profiles.fit import size
from moedge.progress import console_progress

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "device-builds.json"
PARTS = ("layers", "weights, planned", "weights, log", "peak, planned", "peak, OS", "time")
PARTS += ("workspace, estimated", "workspace, log", "experts written out")


def make_bundle(shape: str, layers: int | None, weights: str, work: Path) -> Path:
    """The bundle of a random checkpoint of that shape, kept in `work` for the next run."""
    name = Path(shape).stem
    bundle = work / f"{name}{'' if layers is None else f'-{layers}'}-{weights}"
    if bundle.is_dir():
        return bundle
    with tempfile.TemporaryDirectory(prefix="bench-build-", dir=work) as folder, console_progress() as progress:
        source = Path(folder) / name
        write_checkpoint(read_shape(shape, layers), source, progress=progress)
        moedge.export(source, bundle, weights=weights, verify=False, max_memory="2GiB", progress=progress)
        shutil.rmtree(source)
    return bundle


def measure(shape: str, bundle: Path, profile: str, max_memory: str | None) -> dict[str, Any]:
    """The plan, the build, and what both processes and the operating system say of it."""
    command = [sys.executable, "-m", "moedge", "build", str(bundle), "--profile", profile, "--json"]
    command += [] if max_memory is None else ["--max-memory", max_memory]
    planned = subprocess.run([*command, "--dry-run"], stdout=subprocess.PIPE, text=True, check=True)
    (plan,) = json.loads(planned.stdout)
    busy = os.getloadavg()[1]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as written:  # a pipe that nobody empties would stop it
        with subprocess.Popen(command, stdout=written) as process:
            together = watch(process)
        seconds = time.monotonic() - began
        written.seek(0)
        said = written.read()
    if process.returncode:
        raise SystemExit(f"error: the build of {shape} for {profile} failed")
    (engine,) = json.loads(said)
    session = engine["session"]
    return {
        "shape": shape,
        "parameters": json.loads((bundle / "moedge.json").read_text())["model"]["parameters"],
        "profile": profile,
        "weights": engine["precision"].split()[0],
        "layers": engine["layers"],
        "max_memory": max_memory,
        "max_seq_len": engine["max_seq_len"],
        "backend": f"{engine['backend']} {engine['backend_version']}",
        "seconds": seconds,
        "together_peak_bytes": together,
        "engine_peak_bytes": engine["peak_build_memory_bytes"],
        "engine_bytes": engine["bytes"],
        "plan": plan,
        "fit_built": engine["fit_built"],
        "numerics": session["numerics"],
        "parts": [
            {key: part[key] for key in ("layers", "network_weights_bytes", "memory", "builder_seconds")}
            | {key: part[key] for key in ("peak_build_memory_bytes", "caller_memory_bytes")}
            for part in session["parts"]
        ],
        "machine": describe_machine(),
        "load_before": busy,
        "date": datetime.date.today().isoformat(),
    }


def watch(process: subprocess.Popen[bytes]) -> int:
    """The largest resident memory, in bytes, of a process and all its descendants together, until it ends."""
    most = 0
    while process.poll() is None:
        most = max(most, _resident(process.pid))
        time.sleep(0.1)
    return most


def _resident(root: int) -> int:
    children: dict[int, list[int]] = {}
    pages: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue  # it ended meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry.name))
            pages[int(entry.name)] = int(fields[21])
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += pages.get(pid, 0)
        waiting += children.get(pid, [])
    return total * os.sysconf("SC_PAGE_SIZE")


def make_page(results: list[dict[str, Any]]) -> str:
    """The page, as Markdown."""
    lines = [
        "# Time and memory of a build",
        "",
        "Made by `scripts/bench_build.py`; weights are random, of the shape named. *Planned* is what `moedge build",
        "--dry-run` says before. *Peak, OS* of an engine is its builder's largest resident memory (VmHWM) and what the",
        "process that started it held meanwhile; *all processes* is read from /proc ten times a second. *Log* is",
        "TensorRT's build log; *experts written out* counts the kernels that write a dequantized matrix of an expert's",
        "size, for one token and for a chunk.",
    ]
    for result in results:
        lines += ["", *_section(result)]
    machines = {f"{result['machine']} ({result['date']})": None for result in results}
    lines += ["", f"Machine: {'; '.join(machines)}.", "", "To repeat:", "", "```", *_commands(results), "```", ""]
    return "\n".join(lines)


def _section(result: dict[str, Any]) -> list[str]:
    numerics, plan = result["numerics"], result["plan"]
    bound = f"`--max-memory {result['max_memory']}`" if result["max_memory"] else "no bound"
    experts = f"{numerics.get('experts_at_once')} of {numerics.get('of_experts')} experts at once"
    checked = numerics.get("reason", "")
    if numerics["checked"]:
        checked = f"{numerics['layers']} of {numerics['of_layers']} layers, {numerics['chained']} engines chained, "
        checked += f"every expert ({experts}) of the first {numerics['layers_with_every_expert']} layers: "
        checked += f"difference {numerics['difference']:.1e}"
    lines = [
        f"## {result['shape']}, {result['layers']} layers, {result['weights']}, for `{result['profile']}`",
        "",
        f"- {result['parameters'] / 1e9:.2f} B parameters, {result['backend']}, {bound}, room for "
        f"{result['max_seq_len']} tokens",
        f"- {len(result['parts'])} engine(s), {size(result['engine_bytes'])} in files, {result['seconds']:.0f} s in "
        f"all (load before: {result['load_before']:.1f})",
        f"- peak: {size(result['engine_peak_bytes'])} by engine.json, {size(result['together_peak_bytes'])} of all "
        "processes together",
        f"- needed on the device: {size(plan['total_bytes'])} estimated, {size(result['fit_built']['total_bytes'])} by "
        f"the log, of {size(plan['available_bytes'])}",
        f"- checked on onnxruntime: {checked}",
        "",
        f"| {' | '.join(PARTS)} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part, planned in zip(result["parts"], plan["parts"], strict=False):
        memory = part["memory"]
        cells = [
            f"{part['layers'][0]} to {part['layers'][1] - 1}",
            size(part["network_weights_bytes"]),
            size(memory["weights_bytes"]),
            size(planned["build_memory_bytes"]),
            size(part["peak_build_memory_bytes"] + part["caller_memory_bytes"]),
            f"{part['builder_seconds']:.0f} s",
            size(plan["workspace_bytes"] / len(plan["parts"])),
            size(max(memory["activation_bytes"])),
            " and ".join(str(count) for count in memory["materialized_matrices"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _commands(results: list[dict[str, Any]]) -> list[str]:
    commands = []
    for result in results:
        command = f"python scripts/bench_build.py {result['shape']} --weights {result['weights']} "
        command += f"--profile {result['profile']}"
        commands.append(command + (f" --max-memory {result['max_memory']}" if result["max_memory"] else ""))
    return commands


def keep(results: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The new result in the place of an older one of the same run."""
    same = ("shape", "layers", "weights", "profile", "max_memory")
    older = [result for result in results if any(result[key] != new[key] for key in same)]
    return [*older, new]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", metavar="SHAPE", help="a name or config.json: see synthetic_checkpoint.py")
    parser.add_argument("--layers", type=int, help="so many decoder layers instead of the shape's own")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--profile", default="rtx4090")
    parser.add_argument("--max-memory", help="bound of the build (default: none, one engine)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where bundles are kept")
    parser.add_argument("--bundle", type=Path, help="a bundle of that shape, instead of one in the work folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.max_memory:
        parse_size(arguments.max_memory)  # a slip is found before the checkpoint is written
    bundle = arguments.bundle or make_bundle(arguments.shape, arguments.layers, arguments.weights, arguments.work)
    result = measure(arguments.shape, bundle, arguments.profile, arguments.max_memory)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
    results = keep(results, result)
    arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    arguments.results.with_suffix(".md").write_text(make_page(results))
    print(f"{arguments.shape}: {result['seconds']:.0f} s, peak {size(result['together_peak_bytes'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
