"""`moedge bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle import check_place, staged_file
from ..progress import console_progress

if TYPE_CHECKING:
    from rich.table import Table


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--profile", metavar="NAME", help="Engine. [default: the best that runs on this machine]")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2), default=64, show_default=True)
@click.option("--batch", default="1", show_default=True, metavar="N", help="Sequences decoded together.")
@click.option("--context", default="0", show_default=True, metavar="N", help="Tokens in each cache before the prompt.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs, after one to warm up.")
@click.option("--threads", type=click.IntRange(1), help="Threads that compute. [default: physical cores]")
@click.option(
    "--scenario",
    type=click.Choice(["single-stream", "offline"]),
    help="MLPerf's: queries one by one, or all at once; --repeat is how many.",
)
@click.option(
    "--sweep",
    is_flag=False,
    flag_value="auto",
    metavar="[N,N,...]",
    help="Several prompt lengths in place of one: 16, 64, 256, ... as far as there is room, or those given. --batch "
    "and --context may then be lists too; each with each is measured.",
)
@click.option("--breakdown", is_flag=True, help="Run once more under the profiler: time by kind of operation.")
@click.option("--samples", is_flag=True, help="Keep every single time in the JSON.")
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="One JSON document, on stdout or in FILE; a list with --sweep.",
)
def bench_command(
    bundle: Path, json_file: str | None, sweep: str | None, batch: str, context: str, **options: Any
) -> None:
    """Measures one engine on this machine: latency, rates, memory, and the share of the memory bandwidth it uses."""
    from .bench import bench, bench_sweep

    if json_file not in (None, "-"):
        check_place(Path(str(json_file)))
    document: dict[str, Any] | list[dict[str, Any]]
    with console_progress() as progress:
        batches, contexts = _numbers("--batch", batch, 1, sweep), _numbers("--context", context, 0, sweep)
        if sweep is None:
            document = bench(bundle, batch=batches[0], context=contexts[0], progress=progress, **options)
        else:
            options |= {"lengths": _lengths(sweep, options), "batches": batches, "contexts": contexts}
            document = bench_sweep(bundle, progress=progress, **options)
    text = json.dumps(document, indent=1)
    if json_file == "-":
        click.echo(text)
        return
    if json_file is not None:
        with staged_file(Path(json_file)) as staged:
            staged.write_text(text + "\n", encoding="utf-8")
    if isinstance(document, list):
        _print(_sweep_table(document))
        return
    from .tables import bench_table

    _print(bench_table(document), *_more(document))


def _lengths(sweep: str, options: dict[str, Any]) -> list[int] | None:
    """The lengths asked for; None for the default ones. What a sweep cannot have is refused."""
    if options.pop("scenario") is not None or options.pop("breakdown"):
        raise click.UsageError("--sweep takes neither --scenario nor --breakdown")
    options.pop("prompt_tokens")
    if sweep == "auto":
        return None
    return _numbers("--sweep", sweep, 1, sweep)


def _numbers(option: str, text: str, least: int, sweep: str | None) -> list[int]:
    """The number of an option, or, with --sweep, the list of them."""
    words = [word.strip() for word in text.split(",")]
    good = all(word.isdecimal() and len(word) < 10 and int(word) >= least for word in words)
    if not good or (sweep is None and len(words) > 1):
        what = f"a whole number from {least}" + (" or a list of them, such as 16,256,1024" if sweep else "")
        raise click.BadParameter(f"{text!r} is not {what}", param_hint=option)
    return [int(word) for word in words]


def _more(result: dict[str, Any]) -> list[Table]:
    """Tables of what was asked for beyond the plain benchmark."""
    from rich.table import Table

    tables = []
    if "scenario" in result:
        table = Table(title=f"scenario {result['scenario']}", title_justify="left", show_header=False, box=None)
        times = ", ".join(f"{name} {value:,.2f}" for name, value in result["query_ms"].items())
        table.add_row("queries", f"{result['queries']}, {result['queries_per_s']:,.3g} a second")
        table.add_row("a query", f"{times} ms")
        table.add_row("output", f"{result['output_tokens_per_s']:,.1f} tokens/s")
        table.add_row("", result["scenario_note"])
        tables.append(table)
    for phase, what in (("prefill", "the prompt"), ("decode", "a new token")):
        if "breakdown" in result:
            found = result["breakdown"]
            title = f"{what}, by operation: {found[f'{phase}_ms']:,.3g} ms with the profiler on"
            table = Table("operation", title=title, title_justify="left")
            for name in ("nodes", "ms", "share"):
                table.add_column(name, justify="right")
            for row in _shown(found[phase]):
                nodes = f"{row['nodes']:,.0f}" if row["nodes"] else ""
                table.add_row(row["op"], nodes, f"{row['ms']:,.3g}", f"{100 * row['share']:.1f}%")
            tables.append(table)
    return tables


def _shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The operations that take a hundredth or more, and the others together."""
    large = [row for row in rows if row["share"] >= 0.01]
    small = [row for row in rows if row["share"] < 0.01]
    if len(small) > 1:
        sums = {key: sum(row[key] for row in small) for key in ("nodes", "ms", "share")}
        return [*large, {"op": f"{len(small)} others", **sums}]
    return list(rows)


def _sweep_table(results: Sequence[dict[str, Any]]) -> Table:
    """A row a case; 80 columns hold it."""
    from rich import box
    from rich.table import Table

    from .report import number, percent

    first = results[0]
    title = f"{first['model']} {first['weights']} on {first['device']} ({first['profile']}), {first['threads']} threads"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    counts = ("batch", "context", "prompt")
    ttft, itl = ([f"{time}\n{name}, ms" for name in ("p50", "p99")] for time in ("TTFT", "ITL"))
    headings = (*ttft, "prefill\ntokens/s", *itl, "decode\ntokens/s")
    for name in (*counts, *headings, "of\nlimit"):
        table.add_column(name, justify="right", no_wrap=True)
    for result in results:
        times = [number(result[key][name]) for key in ("ttft_ms", "itl_ms") for name in ("p50", "p99")]
        prefill, decode = (f"{result[f'{kind}_tokens_per_s']:,.0f}" for kind in ("prefill", "decode"))
        cells = (str(result[key]) for key in ("batch", "context_tokens", "prompt_tokens"))
        share = percent(result["fraction_of_limit"])
        table.add_row(*cells, *times[:2], prefill, *times[2:], decode, share)
    return table


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
