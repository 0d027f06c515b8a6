"""`moedge eval`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..bundle import check_place, staged_file
from ..progress import console_progress


@click.command("eval")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--text", "text_file", type=click.Path(path_type=Path), metavar="FILE", help="UTF-8 text to score.")
@click.option(
    "--tasks", metavar="NAME,...", help="Tasks of the lm-evaluation-harness instead of a text (pip install lm-eval)."
)
@click.option("--include-path", type=click.Path(path_type=Path), metavar="FOLDER", help="With --tasks: your own, YAML.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="With --tasks: so many documents of each.")
@click.option("--fewshot", type=click.IntRange(0), metavar="N", help="With --tasks: examples before each.")
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    metavar="CHECKPOINT_OR_BUNDLE",
    help="Compare with it: top-1 agreement and KL divergence. A checkpoint runs under transformers.",
)
@click.option("--profile", metavar="NAME", help="Engine. [default: the best that runs on this machine]")
@click.option("--context", type=click.IntRange(1), metavar="N", help="Tokens of a window. [default: 512, or the room]")
@click.option("--stride", type=click.IntRange(1), metavar="N", help="Tokens it advances by. [default: half of it]")
@click.option("--threads", type=click.IntRange(1), help="Threads that compute. [default: physical cores]")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="One JSON document, on stdout or in FILE.",
)
def eval_command(
    bundle: Path,
    text_file: Path | None,
    tasks: str | None,
    include_path: Path | None,
    limit: int | None,
    fewshot: int | None,
    json_file: str | None,
    **options: Any,
) -> None:
    """Perplexity and bits per byte of a text, and agreement with a checkpoint or another bundle.

    Or, with --tasks, multiple-choice and other tasks through EleutherAI's lm-evaluation-harness.
    """
    if (text_file is None) == (tasks is None):
        raise click.UsageError("give a text, --text FILE, or tasks, --tasks NAMES")
    if json_file not in (None, "-"):
        check_place(Path(str(json_file)))
    if tasks is not None:
        beside = [name for name in ("against", "context", "stride") if options.pop(name) is not None]
        if beside:
            raise click.UsageError(f"--{beside[0]} belongs to --text")
        own = {"include_path": include_path, "limit": limit, "fewshot": fewshot}
        _write(_run_tasks(bundle, tasks, **own, **options), json_file, _print_tasks)
        return
    if include_path is not None or limit is not None or fewshot is not None:
        raise click.UsageError("--include-path, --limit and --fewshot belong to --tasks")
    assert text_file is not None
    _write(_run_text(bundle, text_file, **options), json_file, _print)


def _run_text(bundle: Path, text_file: Path, **options: Any) -> dict[str, Any]:
    from .eval import evaluate, read_text_file

    text = read_text_file(text_file)
    with console_progress() as progress:
        return evaluate(bundle, text, text_name=text_file.name, progress=progress, **options)


def _run_tasks(bundle: Path, tasks: str, **options: Any) -> dict[str, Any]:
    from .eval_tasks import evaluate_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return evaluate_tasks(bundle, names, **options)


def _write(result: dict[str, Any], json_file: str | None, show: Callable[[dict[str, Any]], None]) -> None:
    document = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    if json_file == "-":
        click.echo(document)
        return
    if json_file is not None:
        with staged_file(Path(json_file)) as staged:
            staged.write_text(document + "\n", encoding="utf-8")
    show(result)


def _print_tasks(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "figure", title="tasks", title_justify="left")
    table.add_column("value", justify="right")
    for task, figures in result["results"].items():
        for name, value in figures.items():
            if isinstance(value, float) and "_stderr" not in name:
                spread = figures.get(name.replace(",", "_stderr,", 1))
                more = f" ± {spread:.4f}" if isinstance(spread, float) else ""
                table.add_row(task, name.removesuffix(",none"), f"{value:.4f}{more}")
    Console().print(table)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    where = f"{result['model']} {result['weights']} ({result['profile']}, {result['backend']}) on {result['text']}"
    table = Table(title=Text(where), title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    scored = f"{result['scored_tokens']:,} tokens, {result['bytes']:,} bytes"
    table.add_row("scored", f"{scored}; windows of {result['context']}, advancing by {result['stride']}")
    table.add_row("bits per byte", f"{result['bits_per_byte']:.4f}")
    table.add_row("perplexity", f"{_perplexity(result)} a token")
    against = result["against"]
    if against is not None:
        table.add_row("against", Text(f"{against['name']} ({against['kind']})"))
        table.add_row("  its bits per byte", f"{against['bits_per_byte']:.4f}")
        table.add_row("  its perplexity", _perplexity(against))
        table.add_row("  top-1 agreement", f"{100 * against['top1_agreement']:.2f}%")
        divergence = against["kl_nats"]
        table.add_row("  KL divergence", f"mean {divergence['mean']:.3g}, p99 {divergence['p99']:.3g} nats")
    for row in result["routing"]:
        told = f"mean load / max load {row['mean_over_max']:.3f}, entropy {row['entropy']:.3f}"
        unused = f", {row['unused']} experts unused" if row["unused"] else ""
        table.add_row(f"experts, layer {row['layer']}", told + unused)
    Console().print(table)


def _perplexity(result: dict[str, Any]) -> str:
    value = result["perplexity"]
    return "beyond any number" if value is None else f"{value:,.4g}"
