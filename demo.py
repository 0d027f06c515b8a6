"""`moedge demo`: the whole path on the sample model that comes with the package."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from .bundle import ENGINE_MANIFEST, Bundle, Progress, read_json, write_json
from .errors import BundleError, EngineError
from .progress import console_progress

SAMPLE = Path(__file__).parent / "sample"
PROMPT = "def __init__(self"
WEIGHTS = ("int4", "int8")
ENGINES = ("cpu", "rtx4090", "a100-80gb", "jetson-agx-orin-64gb")
PROMPT_TOKENS, NEW_TOKENS, REPEAT = 256, 64, 5
SECONDS, MIB = 20, 76  # what a run took on two cores, and its folder


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("moedge-demo"),
    show_default=True,
    help="Folder for bundles, engines and the report; made anew.",
)
def demo_command(output: Path) -> None:
    """The whole path on the bundled sample model.

    Exports the sample checkpoint, builds engines for this machine, an RTX 4090 and an A100, prepares a folder for a
    Jetson, generates text, and writes a latency report.
    """
    began = time.monotonic()
    check_sample()
    click.echo(f"{output}: about {SECONDS} s on two free cores, {MIB} MiB of disk")
    bundles = {weights: export_sample(output / f"sample-{weights}", weights) for weights in WEIGHTS}
    build_engines(bundles["int4"], ENGINES)
    build_engines(bundles["int8"], ("cpu",))
    generate_text(bundles["int4"])
    report = write_latency_report(bundles, output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20
    heading(f"Done in {time.monotonic() - began:.0f} s, {size:.0f} MiB in {output}")
    click.echo(f"report:  {report}")
    click.echo(f"bundles: {', '.join(str(bundle.path) for bundle in bundles.values())}")
    options = '-p "def read(self" -n 100 --temperature 0.7'
    click.echo(f"next:    {own_command()} generate {bundles['int4'].path} {options}")


def check_sample() -> None:
    """The sample travels with the package; a damaged installation lacks it."""
    if not (SAMPLE / "model.safetensors").is_file():
        raise BundleError(f"{SAMPLE} lacks the sample checkpoint; install again: pip install --force-reinstall moedge")


def own_command() -> str:
    """How this command was called, so that what is printed can be typed again."""
    called = Path(sys.argv[0])
    return f"{sys.executable} -m moedge" if called.name == "__main__.py" else str(called)


def heading(text: str) -> None:
    click.echo(click.style(f"\n== {text}", bold=True))


@contextmanager
def timed(what: str) -> Iterator[Progress]:
    """Progress on stderr; afterwards one line on stdout with the time."""
    began = time.monotonic()
    with console_progress() as progress:
        yield progress
    click.echo(f"{what}: {time.monotonic() - began:.1f} s")


def export_sample(path: Path, weights: str) -> Bundle:
    """The sample checkpoint as a bundle at `path`; an earlier demo's bundle there is replaced."""
    from .export.pipeline import export_checkpoint

    heading(f"Export the sample checkpoint at {weights}")
    if path.exists():
        Bundle.open(path)  # refuses to replace what is no bundle
    with timed(f"{path}: parity checked") as progress:
        bundle = export_checkpoint(SAMPLE, path, weights=weights, force=True, progress=progress)
    model = bundle.manifest["model"]
    size = sum(bundle.sizes.values()) / 2**20
    click.echo(
        f"{model['family']}, {model['parameters'] / 1e6:.1f}M parameters, "
        f"{model['active_parameters'] / 1e6:.1f}M active a token, {size:.1f} MiB of weights"
    )
    return bundle


def build_engines(bundle: Bundle, profiles: tuple[str, ...]) -> None:
    """An engine for each profile, each with what its engine.json says of it."""
    from .profiles.build import build

    heading(f"Build engines of {bundle.path.name} for {', '.join(profiles)}")
    for profile in profiles:
        with timed(f"{profile}: built") as progress:
            folder = build(bundle.path, profile, progress=progress)
        click.echo(f"  {describe_engine(read_json(folder / ENGINE_MANIFEST))}: {folder}")


def describe_engine(document: dict[str, Any]) -> str:
    """One line on an engine: backend, compute capability, size, and whether it is finished."""
    capability = document.get("compute_capability")
    where = f" for SM{capability[0]}{capability[1]}" if capability else ""
    state = "ready" if document["status"] == "ready" else "to be finished on the device: moedge build FOLDER"
    return (
        f"{document['backend']} {document['backend_version'] or ''}{where}, {document['precision']}, "
        f"{document['bytes'] / 2**20:.1f} MiB, {state}"
    )


def generate_text(bundle: Bundle) -> None:
    """Stream a completion of the prompt from the cpu engine."""
    from .runtime.engine import load

    heading("Generate on this machine (cpu engine)")
    with load(bundle, "cpu") as engine:
        click.echo(PROMPT, nl=False)
        generation = engine.generate(PROMPT, max_new_tokens=100, temperature=0.7, top_p=0.95, seed=1)
        for piece in generation:
            click.echo(piece, nl=False)
    click.echo(f"\n{len(generation.tokens)} tokens: {generation.seconds:.1f} s")


def bench_alone(bundle: Bundle, progress: Progress) -> dict[str, Any]:
    """`moedge bench` in a process of its own: this one still holds what exporting and building loaded."""
    progress("measuring", 0, 1)
    counts = {"--prompt-tokens": PROMPT_TOKENS, "--new-tokens": NEW_TOKENS, "--repeat": REPEAT}
    options = [str(part) for option in counts.items() for part in option]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", __package__, "bench", str(bundle.path), "--profile", "cpu", *options]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
        run = subprocess.run(
            [*command, "--json", str(result)], env=environment, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise EngineError((run.stderr.strip().splitlines() or ["the benchmark failed"])[-1].removeprefix("error: "))
        progress("measuring", 1, 1)
        return read_json(result)


def write_latency_report(bundles: dict[str, Bundle], output: Path) -> Path:
    """Measure the cpu engines, predict the devices, print the table, write JSON and HTML; returns the HTML's path."""
    from rich.console import Console

    from .profiles.device import load_profile
    from .profiles.estimate import estimate
    from .runtime.report import render_table, write_report

    heading("Latency report: this machine measured, devices predicted")
    results = []
    for weights, bundle in bundles.items():
        with timed(f"measured cpu at {weights}") as progress:
            results.append(bench_alone(bundle, progress))
    devices = [load_profile(profile) for profile in ENGINES if profile != "cpu"]
    manifest = bundles["int4"].manifest
    results += [
        estimate(manifest, device, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS) for device in devices
    ]
    write_json(output / "results.json", results)
    report = output / "report.html"
    write_report(results, report)
    click.echo()
    Console().print(render_table(results))
    return report
