"""`moedge export`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from ..bundle import MANIFEST, Bundle
from ..progress import console_progress
from .options import ALGORITHMS, BY_CHANNEL, GROUP_SIZES, WEIGHTS_CHOICES


@click.command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, metavar="BUNDLE", type=click.Path(path_type=Path), help="Output.")
@click.option("--weights", type=click.Choice(WEIGHTS_CHOICES), default="int4", show_default=True)
@click.option(
    "--group-size",
    type=click.Choice([*(str(size) for size in sorted(GROUP_SIZES)), "channel"]),
    default="128",
    show_default=True,
    help="Input channels that share a scale; the largest that divides is used, up to this; or one a channel.",
)
@click.option("--algorithm", type=click.Choice(ALGORITHMS), default="rtn", show_default=True)
@click.option(
    "--zero-points/--symmetric",
    "zero_points",
    default=None,
    help="A zero point for each group of a layer's matrices, or none.  [default: --symmetric]",
)
@click.option("--adapter", metavar="FOLDER", type=click.Path(path_type=Path), help="LoRA adapter (PEFT) to merge.")
@click.option(
    "--calibration", metavar="FILE", type=click.Path(path_type=Path), help="Text that --algorithm gptq calibrates with."
)
@click.option(
    "--max-memory",
    metavar="SIZE",
    help="Bound on peak resident memory, the check included: 2GiB, 500MB, bytes. Default: a quarter of what is free.",
)
@click.option("--no-verify", is_flag=True, help="Skip the parity check.")
@click.option("--force", is_flag=True, help="Replace an output folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="The manifest on stdout.")
def export_command(
    source: Path,
    output: Path,
    weights: str,
    group_size: str,
    algorithm: str,
    zero_points: bool | None,
    adapter: Path | None,
    calibration: Path | None,
    max_memory: str | None,
    no_verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Checkpoint folder to bundle.

    SOURCE is a Hugging Face checkpoint folder: config.json and safetensors.
    """
    if calibration is None:
        # Before numpy loads: the products of an export are small, and threads that wait for each other cost more than
        # they bring. Calibration multiplies large matrices.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from .pipeline import export_checkpoint

    with console_progress() as progress:
        bundle = export_checkpoint(
            source,
            output,
            weights=weights,
            group_size=BY_CHANNEL if group_size == "channel" else int(group_size),
            algorithm=algorithm,
            zero_points=zero_points,
            adapter=adapter,
            calibration=calibration,
            max_memory=max_memory,
            verify=not no_verify,
            force=force,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(bundle.manifest, indent=1))
    else:
        click.echo(_summary(bundle, output))


def _summary(bundle: Bundle, output: Path) -> str:
    manifest = bundle.manifest
    model, quantization = manifest["model"], manifest["quantization"]
    total = sum(manifest["sizes"].values())
    mega = model["parameters"] / 1e6, model["active_parameters"] / 1e6
    verified = "parity checked" if manifest["provenance"]["verified"] else "not checked"
    lines = [
        f"{model['name']} ({model['family']}): {mega[0]:.1f}M parameters, "
        f"{mega[1]:.1f}M active, {quantization['weights']}, {total / 2**20:.1f} MiB, {verified}"
    ]
    for role, entry in quantization["classes"].items():
        if "relative_error" in entry:
            error = 100 * entry["relative_error"]
            own = ", zero points" if entry["zero_points"] else ""
            lines.append(f"  {role}: {entry['dtype']}, group {entry['group_size']}{own}, relative error {error:.2f}%")
    lines += [f"  note: {note}" for note in manifest["provenance"]["notes"]]
    return "\n".join([*lines, f"written: {output / MANIFEST}"])
