"""`moedge report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class Percent(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on
    """`5%` or `5`: a share, 0.05."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value!r} is no percentage; for example 5%", param, ctx)
        if not 0 <= share < float("inf"):
            self.fail(f"{value!r} is no percentage of 0 or more; for example 5%", param, ctx)
        return share


@click.command("report")
@click.argument("inputs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="By suffix: .html, .md, .csv, .png.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="EARLIER.json",
    help="Show what changed since these results; what got slower stands in red.",
)
@click.option(
    "--fail-above",
    type=Percent(),
    metavar="PERCENT",
    help="With --against: exit 1 where a median or a rate got slower by more than this, for example 5%.",
)
@click.option(
    "--matrix",
    is_flag=True,
    help="RESULTs are bundles: predict each on every --profile, on as many devices as hold it (.html, .md, .csv).",
)
@click.option("--profile", "profiles", multiple=True, metavar="NAME", help="With --matrix: device; can be repeated.")
@click.option("--prompt-tokens", type=click.IntRange(1), help="With --matrix. [default: 512]")
@click.option("--new-tokens", type=click.IntRange(1), help="With --matrix. [default: 64]")
def report_command(
    inputs: tuple[Path, ...],
    output: Path,
    against: Path | None,
    fail_above: float | None,
    matrix: bool,
    profiles: tuple[str, ...],
    prompt_tokens: int | None,
    new_tokens: int | None,
) -> None:
    """Latency report out of RESULTs: files that `moedge bench --json` and `moedge estimate --json` wrote.

    Devices are rows; measured and predicted are told apart. Files of `moedge eval --json` among them add quality.
    """
    if matrix:
        if against is not None or fail_above is not None:
            raise click.UsageError("--matrix takes neither --against nor --fail-above")
        if not profiles:
            raise click.UsageError("--matrix needs devices: --profile NAME (moedge profiles lists them)")
        _write_matrix(inputs, output, profiles, prompt_tokens or 512, new_tokens or 64)
        return
    if profiles or prompt_tokens or new_tokens:
        raise click.UsageError("--profile, --prompt-tokens and --new-tokens belong to --matrix")
    if fail_above is not None and against is None:
        raise click.UsageError("--fail-above needs --against EARLIER.json")
    _write_report(inputs, output, against, fail_above)


def _write_report(inputs: tuple[Path, ...], output: Path, against: Path | None, limit: float | None) -> None:
    from .report import check_suffix, load_inputs, load_results, write_report
    from .report_compare import compare

    check_suffix(output)
    results, evaluations = load_inputs(inputs)
    comparison = None
    if against is not None:
        comparison = compare(results, load_results([against]), str(against), limit)
    write_report(results, output, evaluations=evaluations, comparison=comparison)
    click.echo(f"wrote {output}", err=True)
    if comparison is not None:
        comparison.raise_for_failures()


def _write_matrix(
    inputs: tuple[Path, ...], output: Path, profiles: tuple[str, ...], prompt_tokens: int, new_tokens: int
) -> None:
    from .report_matrix import make_matrix, split_inputs, write_matrix

    bundles, evaluations = split_inputs(inputs)
    rows = make_matrix(bundles, profiles, evaluations, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    write_matrix(rows, output)
    click.echo(f"wrote {output}", err=True)
