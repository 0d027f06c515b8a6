"""`moedge verify`. It stands here and not in runtime because `--deep` lowers networks again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..bundle import Bundle
from ..errors import BundleError
from ..progress import console_progress

if TYPE_CHECKING:
    from ..runtime.verify import Verdict


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def verify_command(bundle: Path, as_json: bool) -> None:
    """Checks every checksum, every expert, and the engines' preflight on this machine."""
    from ..runtime.verify import verify

    opened = Bundle.open(bundle)
    with console_progress() as progress:
        verdict = verify(opened, progress)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), **verdict.to_json()}, indent=1))
        verdict.raise_for_faults()
        return
    _print(verdict)
    if verdict.faults:
        count = "1 fault" if len(verdict.faults) == 1 else f"{len(verdict.faults)} faults"
        raise BundleError(f"{bundle}: {count}, listed above with what mends it")


def _print(verdict: Verdict) -> None:
    files = f"{verdict.files} files ({verdict.bytes / 2**20:,.1f} MiB)"
    click.echo(f"{files}, {verdict.experts} experts, {len(verdict.engines)} engines")
    for profile, state in verdict.engines.items():
        # A fault of its own stands below, once.
        told = "runs here" if state["runs_here"] else "" if state["reason"] in verdict.faults else state["reason"]
        click.echo(f"engine {profile}: " + "; ".join(filter(None, ["ok" if state["ok"] else "damaged", told])))
    for line in verdict.unchecked:
        click.echo(f"not checked: {line}")
    for line in verdict.faults:
        click.echo(f"fault: {line}")
