"""Measure `moedge export` on real shapes: python scripts/bench_export.py deepseek-v2-lite --work FOLDER

For each shape: a synthetic checkpoint is written, exported in a process of its own with the parity check, and removed.
The results go to a JSON file (--results); docs/export-memory.md is made from all that it holds. Peak memory is what the
operating system says of the process (VmHWM on Linux).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import explain_missing  # noqa: F401

# The neighbour: a script's own folder is first on the path.
from synthetic_checkpoint import read_shape, write_checkpoint

from moedge.export.memory import MIB, free_bytes, parse_size
from moedge.progress import console_progress

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "export-memory.md"
COLUMNS = ("shape", "parameters", "checkpoint", "export", "bound", "peak memory", "time", "writing", "checking")
COLUMNS += ("CPU time", "load", "bundle")
# The stages' times are when their progress begins and the next one's does.
MEASURED = """
import json, os, sys, time
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as `moedge export` does
from moedge.export.pipeline import export_checkpoint
stages = {}
def progress(what, done, total):
    first, _ = stages.get(what, (time.monotonic(), 0))
    stages[what] = (first, time.monotonic())
began = time.monotonic()
source, output, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
bundle = export_checkpoint(source, output, progress=progress, **options)
seconds = time.monotonic() - began
try:
    status = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
except OSError:
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
used = os.times()
times = {what: last - first for what, (first, last) in stages.items()}
cpu = {"user": used.user, "system": used.system}
result = {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak, "stages": times, "manifest": bundle.manifest}
print(json.dumps(result))
"""


def measure(shape: str, layers: int | None, options: dict[str, Any], work: Path) -> dict[str, Any]:
    """Write, export and remove one checkpoint; what was measured."""
    config = read_shape(shape, layers)
    busy = os.getloadavg()[1] if hasattr(os, "getloadavg") else 0.0
    with tempfile.TemporaryDirectory(prefix="bench-export-", dir=work) as folder:
        source, output = Path(folder) / shape, Path(folder) / "bundle"
        began = time.monotonic()
        with console_progress() as progress:
            source_bytes = write_checkpoint(config, source, progress=progress)
        written = time.monotonic() - began
        print(f"{shape}: {source_bytes / 1e9:.1f} GB in {written:.0f} s; exporting ...", file=sys.stderr)
        command = [sys.executable, "-c", MEASURED, str(source), str(output), json.dumps(options)]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if result.returncode:
            raise SystemExit(f"error: the export of {shape} failed")
        measured = json.loads(result.stdout)
        bundle_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        shutil.rmtree(source)
    manifest = measured.pop("manifest")
    return {
        "shape": shape,
        "layers": config["num_hidden_layers"],
        "parameters": manifest["model"]["parameters"],
        "source_bytes": source_bytes,
        "bundle_bytes": bundle_bytes,
        "options": options,
        "verified": manifest["provenance"]["verified"],
        "machine": describe_machine(),
        "load_before": busy,
        "date": datetime.date.today().isoformat(),
        **measured,
    }


def describe_machine() -> str:
    names = [line.split(":")[1].strip() for line in _read_lines("/proc/cpuinfo") if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    memory = [int(line.split()[1]) / 2**20 for line in _read_lines("/proc/meminfo") if line.startswith("MemTotal")]
    return f"{os.cpu_count()} cores ({processor}), {memory[0]:.0f} GiB" if memory else f"{os.cpu_count()} cores"


def _read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def make_page(results: list[dict[str, Any]]) -> str:
    """docs/export-memory.md."""
    lines = [
        "# Memory and time of an export",
        "",
        "Made by `scripts/bench_export.py`; checkpoints are random, of the shape named, in bf16. Peak memory is the",
        "operating system's figure for the whole process; time is from start to bundle, parity check included. CPU",
        "time is of all threads, and load is what other processes asked of the cores when the run began.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        options, stages = result["options"], result["stages"]
        export = f"{options['weights']} {options['algorithm']}, group {options['group_size']}"
        checking = sum(seconds for what, seconds in stages.items() if what.startswith("checking"))
        cells = [
            f"{result['shape']}, {result['layers']} layers",
            f"{result['parameters'] / 1e9:.2f} B",
            f"{result['source_bytes'] / 1e9:.1f} GB",
            export,
            options.get("max_memory") or "default",
            f"{result['peak_bytes'] / MIB:.0f} MiB",
            f"{result['seconds']:.0f} s",
            f"{stages.get('writing weights', 0):.0f} s",
            f"{checking:.0f} s" if result["verified"] else "off",
            f"{sum(result['cpu_seconds'].values()):.0f} s",
            f"{result['load_before']:.1f}",
            f"{result['bundle_bytes'] / 1e9:.1f} GB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    machines = {f"{result['machine']} ({result['date']})": None for result in results}
    lines += ["", f"Machine: {'; '.join(machines)}.", "", "To repeat:", "", "```", *_commands(results), "```", ""]
    return "\n".join(lines)


def _commands(results: list[dict[str, Any]]) -> list[str]:
    commands = []
    for result in results:
        options = result["options"]
        command = f"python scripts/bench_export.py {result['shape']} --layers {result['layers']}"
        command += f" --weights {options['weights']} --algorithm {options['algorithm']}"
        commands.append(command + (f" --max-memory {options['max_memory']}" if options.get("max_memory") else ""))
    return list(dict.fromkeys(commands))


def keep(results: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The new result in the place of an older one of the same run."""

    def run(result: dict[str, Any]) -> tuple[Any, ...]:
        return result["shape"], result["layers"], json.dumps(result["options"], sort_keys=True)

    return [*(result for result in results if run(result) != run(new)), new]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", metavar="SHAPE", nargs="+", help="a name or config.json: see synthetic_checkpoint.py")
    parser.add_argument("--layers", type=int, help="so many decoder layers instead of the shape's own")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--algorithm", default="rtn")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--max-memory", help="bound for the export (default: the exporter's own)")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints are written")
    parser.add_argument("--results", type=Path, default=PAGE.with_suffix(".json"))
    arguments = parser.parse_args()
    options = {
        "weights": arguments.weights,
        "algorithm": arguments.algorithm,
        "group_size": arguments.group_size,
        "max_memory": arguments.max_memory,
    }
    if arguments.max_memory and parse_size(arguments.max_memory) > free_bytes():
        print(f"note: less than {arguments.max_memory} of memory is free", file=sys.stderr)
    for shape in arguments.shapes:
        results = json.loads(arguments.results.read_text()) if arguments.results.exists() else []
        result = measure(shape, arguments.layers, options, arguments.work)
        results = keep(results, result)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
        PAGE.write_text(make_page(results))
        gigabytes = result["source_bytes"] / 1e9
        print(
            f"{shape}: peak {result['peak_bytes'] / MIB:.0f} MiB, {result['seconds']:.0f} s, "
            f"{gigabytes / result['seconds'] * 1000:.0f} MB/s of checkpoint"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
