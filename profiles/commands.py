"""`moedge build`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ..bundle import ENGINE_MANIFEST, Bundle, read_json
from ..errors import BuildError
from ..progress import console_progress
from .build import BUILD_FOLDER_MANIFEST, build, check_build_fit, finish_build, pick_max_seq_len
from .device import load_profile
from .fit import size


@click.command("build")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="Device to build for; repeat for several.")
@click.option("--backend", metavar="NAME", help="Target other than the profile's own.")
@click.option("--max-batch", default=1, show_default=True, help="Sequences that run at once.")
@click.option("--max-seq-len", type=int, help="Tokens of prompt and answer. [default: the model's, up to 4096]")
@click.option("--dry-run", is_flag=True, help="The fit check alone.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def build_command(
    bundle: Path,
    profiles: tuple[str, ...],
    backend: str | None,
    max_batch: int,
    max_seq_len: int | None,
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
    if dry_run:
        _dry_run(bundle, names, max_batch, max_seq_len, as_json)
        return
    folders = []
    for name in names:
        with console_progress() as progress:
            folders.append(
                build(
                    bundle,
                    name,
                    backend=backend,
                    max_batch=max_batch,
                    max_seq_len=max_seq_len,
                    progress=progress,
                )
            )
    _print_engines(folders, as_json)


def _dry_run(path: Path, names: list[str], max_batch: int, max_seq_len: int | None, as_json: bool) -> None:
    from rich.console import Console

    from .device_commands import fit_table

    bundle = Bundle.open(path)
    length = pick_max_seq_len(bundle, max_seq_len)
    fits = [check_build_fit(bundle, load_profile(name), max_batch, length) for name in names]
    if as_json:
        click.echo(json.dumps([fit.to_json() for fit in fits], indent=1))
    else:
        Console().print(fit_table(fits))
    for fit in fits:
        if not fit.fits:
            raise BuildError(fit.explain())


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
