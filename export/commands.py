"""`moedge export`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from ..bundle import MANIFEST, Bundle
from ..progress import console_progress
from .options import ALGORITHMS, BY_CHANNEL, GROUP_SIZES, HEAD, HEAD_CHOICES, WEIGHTS_CHOICES, LoadAware, names_builder


@click.command("export")
@click.argument("source")
@click.option("-o", "--output", required=True, metavar="BUNDLE", type=click.Path(path_type=Path), help="Output.")
@click.option("--weights", type=click.Choice(WEIGHTS_CHOICES), default="int4", show_default=True)
@click.option(
    "--head", type=click.Choice(HEAD_CHOICES), help=f"Of the head, where weights are int4.  [default: {HEAD}]"
)
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
@click.option("--load-aware", is_flag=True, help="Choose experts under a penalty for busy ones and a capacity of each.")
@click.option("--load-penalty", type=float, help=f"What a mean load costs a score. [default: {LoadAware.penalty}]")
@click.option(
    "--load-capacity", type=float, help=f"Room, in even shares of a call. [default: {LoadAware.capacity_factor}]"
)
@click.option("--load-decay", type=float, help=f"Worth of a choice a token later. [default: {LoadAware.decay}]")
@click.option(
    "--tokenizer", metavar="FOLDER", type=click.Path(path_type=Path), help="tokenizer.json to go with a torch model."
)
@click.option(
    "--max-positions", type=click.IntRange(1), metavar="N", help="Tokens that a torch model takes. [default: found out]"
)
@click.option("--no-verify", is_flag=True, help="Skip the parity check.")
@click.option("--force", is_flag=True, help="Replace an output folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="The manifest on stdout.")
def export_command(
    source: str,
    output: Path,
    weights: str,
    head: str | None,
    group_size: str,
    algorithm: str,
    zero_points: bool | None,
    adapter: Path | None,
    calibration: Path | None,
    max_memory: str | None,
    load_aware: bool,
    load_penalty: float | None,
    load_capacity: float | None,
    load_decay: float | None,
    tokenizer: Path | None,
    max_positions: int | None,
    no_verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Checkpoint folder to bundle.

    SOURCE is a Hugging Face checkpoint folder: config.json and safetensors. Or it names a function of yours that takes
    nothing and returns a PyTorch model, my_package.my_module:build_model; it is imported from the current folder or
    the installed packages and called, so this runs its code (docs/torch.md).
    """
    common: dict[str, Any] = {
        "weights": weights,
        "head": head,
        "group_size": BY_CHANNEL if group_size == "channel" else int(group_size),
        "algorithm": algorithm,
        "zero_points": zero_points,
        "verify": not no_verify,
        "force": force,
    }
    of_checkpoints: dict[str, Any] = {"adapter": adapter, "calibration": calibration, "max_memory": max_memory}
    of_checkpoints["load_aware"] = _read_load_aware(load_aware, load_penalty, load_capacity, load_decay)
    of_models: dict[str, Any] = {"tokenizer": tokenizer, "max_positions": max_positions}
    with console_progress() as progress:
        if names_builder(source) and not Path(source).exists():
            _refuse(of_checkpoints, "is for checkpoints, and this is a torch model")
            from .torch_model import export_torch_model

            bundle = export_torch_model(source, output, **common, **of_models, progress=progress)
        else:
            _refuse(of_models, "is for torch models (my_package:build_model), and this is a checkpoint folder")
            if calibration is None:
                # Before numpy loads: the products of an export are small, and threads that wait for each other cost
                # more than they bring. Calibration multiplies large matrices.
                os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
            from .pipeline import export_checkpoint

            bundle = export_checkpoint(source, output, **common, **of_checkpoints, progress=progress)
    if as_json:
        click.echo(json.dumps(bundle.manifest, indent=1))
    else:
        click.echo(_summary(bundle, output))


def _refuse(options: dict[str, Any], why: str) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise click.UsageError(f"--{given[0].replace('_', '-')} {why}")


def _read_load_aware(
    asked: bool, penalty: float | None, capacity: float | None, decay: float | None
) -> LoadAware | None:
    """The settings, each of which asks for the gate by itself."""
    given = {"penalty": penalty, "capacity_factor": capacity, "decay": decay}
    changes = {name: value for name, value in given.items() if value is not None}
    return LoadAware(**changes) if asked or changes else None


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
            also = f" (some {'; '.join(entry['also'])})" if "also" in entry else ""
            form = f"{entry['dtype']}, group {entry['group_size']}{own}{also}"
            lines.append(f"  {role}: {form}; weights' relative error by rounding: {error:.2f}%")
    lines += [f"  note: {note}" for note in manifest["provenance"]["notes"]]
    return "\n".join([*lines, f"written: {output / MANIFEST}"])
