"""`moedge trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..bundle import check_place
from ..progress import console_progress

_NAME_LENGTH = 40  # characters of a prompt that name it


@click.command("trace")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="Text; give two to compare them.")
@click.option(
    "--text", "files", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="The same, from a file."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="By suffix: .html, .json, .png.",
)
@click.option("--profile", metavar="NAME", help="Engine. [default: the best that runs on this machine]")
@click.option("--max-tokens", type=click.IntRange(1), default=2048, show_default=True, help="Of each text.")
@click.option(
    "--attention", "looks", multiple=True, metavar="LAYER[:HEAD,...]", help="Draw attention too; may be given again."
)
@click.option("--threads", type=click.IntRange(1), help="Threads that compute. [default: physical cores]")
def trace_command(
    bundle: Path,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    output: Path,
    profile: str | None,
    max_tokens: int,
    looks: tuple[str, ...],
    threads: int | None,
) -> None:
    """Which experts each token of a text took in each layer: heat map, load figures, coloured tokens.

    One text, or two to compare. The HTML needs no network; JSON has every expert and weight.
    """
    from .eval import read_text_file
    from .trace import check_suffix, trace, write_trace
    from .trace_attention import parse_choice

    if not 1 <= len(prompts) + len(files) <= 2:
        raise click.UsageError("give one text, or two to compare: -p TEXT or --text FILE")
    check_suffix(output)
    check_place(output)
    options: dict[str, Any] = {"max_tokens": max_tokens, "threads": threads, "attention": parse_choice(looks)}
    texts = [(_name(prompt), prompt) for prompt in prompts]
    texts += [(path.name, read_text_file(path)) for path in files]
    with console_progress() as progress:
        traced = trace(bundle, texts, profile, **options, progress=progress)
    write_trace(traced, output)
    for text in traced.texts:
        if len(text.ids) < text.total_tokens:
            told = f"{text.name}: traced the first {len(text.ids):,} of {text.total_tokens:,} tokens"
            click.echo(f"{told}; more with --max-tokens", err=True)
    click.echo(f"wrote {output}", err=True)


def _name(prompt: str) -> str:
    line = " ".join(prompt.split()) or "the prompt"
    return line if len(line) <= _NAME_LENGTH else line[: _NAME_LENGTH - 1] + "…"
