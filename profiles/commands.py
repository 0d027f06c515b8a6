"""`moedge build`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..bundle import ENGINE_MANIFEST, Bundle, read_json
from ..errors import BuildError
from ..progress import console_progress
from .build import (
    BUILD_FOLDER_MANIFEST,
    BuildOptions,
    build_portable,
    build_with,
    finish_build,
    plan,
)
from .device import load_profile
from .fit import size
from .plan import explain_parts, parts_table
from .shape import KV_CACHE_DEFAULT


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Device to build for; repeat for several.")
@click.option("--backend", metavar="NAME", help="Target other than the profile's own.")
@click.option("--max-batch", default=1, show_default=True, help="Sequences that run at once.")
@click.option("--max-seq-len", type=int, help="Tokens of prompt and answer. [default: the model's, up to 4096]")
@click.option("--portable", is_flag=True, help="One engine for all the devices (target tensorrt_rtx).")
@click.option("--max-memory", metavar="SIZE", help="Memory that building may take (16GiB): then several engines.")
@click.option("--prefill-chunk", type=int, metavar="N", help="Tokens of a prompt in one run (TensorRT). [default: 256]")
@click.option("--expert-buckets", is_flag=True, help="Chunks in buckets of bounded size (TensorRT).")
@click.option("--kv-cache", metavar="TYPE", help=f"On a CPU: fp32, fp16 or int8. [default: {KV_CACHE_DEFAULT}]")
@click.option(
    "--latent-attention",
    default="auto",
    metavar="FORM",
    help="Cache of MLA on TensorRT: absorbed (latents), expanded (by head). [default: expanded where it fits]",
)
@click.option("--precision", metavar="NAME", help="fp8: weights quantized again. [default: the bundle's weights]")
@click.option("--dry-run", is_flag=True, help="The fit check and the plan alone.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def build_command(
    bundle: Path,
    profiles: tuple[str, ...],
    backend: str | None,
    max_batch: int,
    max_seq_len: int | None,
    portable: bool,
    max_memory: str | None,
    prefill_chunk: int | None,
    expert_buckets: bool,
    kv_cache: str | None,
    latent_attention: str,
    precision: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bundle to an engine for each device profile.

    BUNDLE may also be a folder that was prepared for a Jetson: then the engine is finished here, on the device.
    """
    if (bundle / BUILD_FOLDER_MANIFEST).is_file():
        with console_progress() as progress:
            folder = finish_build(bundle, progress)
        _print_engines([folder], as_json)
        return
    if not profiles:
        raise BuildError("no device named; add --profile NAME (moedge profiles lists them)")
    names = list(dict.fromkeys(profiles))
    from ..export.memory import parse_size  # not at the top: `--help` must not cost what reading checkpoints does

    if portable and kv_cache is not None:
        raise BuildError("--portable engines keep their KV cache in their own type; leave --kv-cache out")
    options = BuildOptions(
        backend=backend,
        max_batch=max_batch,
        max_seq_len=max_seq_len,
        max_memory=None if max_memory is None else parse_size(max_memory),
        prefill_chunk=prefill_chunk,
        expert_buckets=expert_buckets,
        kv_cache=kv_cache,
        latent_attention=latent_attention,
        precision=precision,
    )
    if dry_run:
        _dry_run(bundle, names, options, as_json)
        return
    for name in names:  # a wrong one is told before the work for another
        load_profile(name)
    folders = []
    if portable:
        with console_progress() as progress:
            folders = build_portable(bundle, names, options, progress)
    for name in [] if portable else names:
        with console_progress() as progress:
            folders.append(build_with(bundle, name, options, progress))
    _print_engines(folders, as_json)


def _dry_run(path: Path, names: list[str], options: BuildOptions, as_json: bool) -> None:
    from rich.console import Console

    from .device_commands import fit_table

    bundle = Bundle.open(path)
    plans = [plan(bundle, load_profile(name), options) for name in names]
    if as_json:
        click.echo(json.dumps([each.to_json() for each in plans], indent=1))
    else:
        # A pipe has no width; 80 columns would cut the headings.
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(fit_table([each.fit for each in plans]))
        engines = parts_table(plans)
        if engines is not None:
            console.print(engines)
        for each in plans:
            said = explain_parts(each)
            if said is not None:
                click.echo(said)
            if each.built is not None:
                before = each.fit.to_json()
                click.echo(f"{each.fit.profile}: the engine that is there {_compare_scratch(before, each.built)}")
    for each in plans:
        if not each.fit.fits:
            raise BuildError(each.fit.explain())


def _compare_scratch(before: dict[str, Any], after: dict[str, Any]) -> str:
    return (
        f"has workspace {size(after['workspace_bytes'])} by its build log "
        f"({size(before['workspace_bytes'])} estimated) "
        f"and needs {size(after['total_bytes'])} of {size(after['available_bytes'])}"
    )


def _print_engines(folders: list[Path], as_json: bool) -> None:
    documents = [read_json(folder / ENGINE_MANIFEST, BuildError) for folder in folders]
    if as_json:
        click.echo(json.dumps(documents, indent=1))
        return
    for folder, document in zip(folders, documents, strict=True):
        state = "ready" if document["status"] == "ready" else "prepared, to be finished on the device"
        click.echo(
            f"{document['profile']}: {document['backend']} {document['backend_version']}, {document['precision']}, "
            f"{size(document['bytes'])}, {document['build_seconds']:.1f} s, {state}: {folder}"
        )
        parts = document["session"].get("parts", ())
        if len(parts) > 1:
            bound = size(document["session"]["max_build_memory_bytes"])
            ranges = ", ".join(f"{part['layers'][0]} to {part['layers'][1] - 1}" for part in parts)
            click.echo(f"  {len(parts)} engines, so that building each takes at most {bound}: layers {ranges}")
        if document.get("fit_built"):
            click.echo(f"  {_compare_scratch(document['fit'], document['fit_built'])}")
