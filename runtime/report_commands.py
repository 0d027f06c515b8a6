"""`moedge report`."""

from __future__ import annotations

from pathlib import Path

import click

from .report import load_results, write_report


@click.command("report")
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="By suffix: .html, .md, .csv, .png.",
)
def report_command(results: tuple[Path, ...], output: Path) -> None:
    """Latency report out of RESULTs: files that `moedge bench --json` and `moedge estimate --json` wrote.

    Devices are rows; measured and predicted are told apart.
    """
    write_report(load_results(results), output)
    click.echo(f"wrote {output}", err=True)
