"""`moedge generate` and `inspect`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..bundle import Bundle
from ..errors import MoedgeError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from .generation import Generation

_BUNDLE = click.argument("bundle", type=click.Path(path_type=Path))
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
_PROFILE = click.option("--profile", metavar="NAME", help="Engine. [default: the best that runs on this machine]")
_THREADS = click.option("--threads", type=click.IntRange(1), help="Threads that compute. [default: physical cores]")

NEW_TOKENS = 128
_SHOWN = "profile status backend backend_version compute_capability precision max_batch max_seq_len bytes".split()
_SHOWN += ["cache_bytes_per_token"]


@click.command("generate")
@_BUNDLE
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The prompt; - reads it from stdin.")
@_PROFILE
@click.option("-n", "--max-new-tokens", type=int, metavar="N", help=f"[default: {NEW_TOKENS}, or what has room]")
@click.option("--temperature", type=float, metavar="T", help="0 is greedy. [default: the model's own, else greedy]")
@click.option("--top-k", type=int, metavar="K", help="Only the K most likely tokens; 0 is off.")
@click.option("--top-p", type=float, metavar="P", help="Only the most likely tokens that together reach P.")
@click.option("--min-p", type=float, metavar="P", help="Only tokens at least P times as likely as the best.")
@click.option("--seed", type=int, metavar="N", help="Makes sampling repeat exactly.")
@click.option("--repetition-penalty", type=float, metavar="X", help="Above 1: less of what prompt and text have.")
@click.option("--presence-penalty", type=float, default=0.0, metavar="X", help="Taken from what the text has.")
@click.option("--frequency-penalty", type=float, default=0.0, metavar="X", help="Likewise, for each time it does.")
@click.option("--logprobs", type=int, metavar="N", help="With --json: how likely each token was, and N alternatives.")
@click.option("--slide", is_flag=True, help="At the context's end go on with the newer half of the text.")
@click.option("--stop", multiple=True, metavar="TEXT", help="Ends the text (and is left out); can be repeated.")
@click.option("--chat", is_flag=True, help="The prompt is a message: use the model's chat template.")
@_THREADS
@click.option("--max-seq-len", type=click.IntRange(1), metavar="N", help="Room in the context, below the engine's own.")
@_JSON
def generate_command(
    bundle: Path,
    prompt: str,
    profile: str | None,
    max_new_tokens: int | None,
    threads: int | None,
    max_seq_len: int | None,
    slide: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Text that goes on from a prompt, which it does not repeat."""
    from .engine import load

    if options["logprobs"] is not None and not as_json:
        raise UsageError("--logprobs is written with --json alone; add --json, or leave --logprobs out")
    text = _read_stdin() if prompt == "-" else prompt
    with load(bundle, profile, threads=threads, max_seq_len=max_seq_len) as engine:
        end = "slide" if slide else "error"
        generation = engine.generate(text, max_new_tokens=max_new_tokens, context_end=end, **options)
        if max_new_tokens is None:
            generation.limit = min(NEW_TOKENS, generation.room)
        if as_json:
            pieces = list(generation)
            click.echo(json.dumps(_generation_json(generation, "".join(pieces), engine.profile), ensure_ascii=False))
            return
        try:
            for piece in generation:
                click.echo(piece, nl=False)
        finally:
            click.echo()  # an error or a Ctrl-C begins on a line of its own


def _generation_json(generation: Generation, text: str, profile: str) -> dict[str, Any]:
    count = len(generation.tokens)
    decoding = generation.seconds - generation.prompt_seconds
    return {
        "text": text,
        "tokens": generation.tokens,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": count,
        "finish_reason": generation.finish_reason,
        "seed": None if generation.sampling.temperature == 0 else generation.seed,
        "temperature": generation.sampling.temperature,
        "profile": profile,
        "seconds": generation.seconds,
        "ttft_s": generation.prompt_seconds,
        "decode_tokens_per_s": (count - 1) / decoding if count > 1 and decoding > 0 else None,
        "reused_prompt_tokens": generation.reused_tokens,
        **({"logprobs": [found._asdict() for found in generation.logprobs]} if generation.logprobs else {}),
    }


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on stdin is not UTF-8 (byte {error.start}); convert it first") from None


@click.command("inspect")
@_BUNDLE
@_JSON
def inspect_command(bundle: Path, as_json: bool) -> None:
    """What is in a bundle: model, gating, quantization, sizes, engines, provenance."""
    opened = Bundle.open(bundle)
    document = _inspection(opened)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    from .tables import engines_table, model_table, sizes_table

    _print(model_table(document), sizes_table(document), engines_table(document))


def _inspection(bundle: Bundle) -> dict[str, Any]:
    from . import kernels
    from .preflight import cannot_run, find_strangers, read_engine

    engines = []
    for profile in bundle.engines():
        try:
            info = read_engine(bundle, profile)
            reason = cannot_run(bundle, info) or next(iter(find_strangers(bundle, info)), None)
        except MoedgeError as error:
            engines.append({"profile": profile, "status": "damaged", "runs_here": False, "reason": str(error)})
            continue
        engines.append(
            {
                **{name: getattr(info, name) for name in _SHOWN},
                "kernels": kernels.describe(info.session),
                "why_not_own_kernels": kernels.why_not() if info.session.get("own_kernels") else None,
                "runs_here": reason is None,
                "reason": reason,
            }
        )
    manifest = bundle.manifest
    keys = ("format", "model", "config", "gating", "quantization", "sizes", "cache", "provenance", "files")
    return {"bundle": str(bundle.path), **{key: manifest.get(key) for key in keys}, "engines": engines}


def _print(*tables: Table) -> None:
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
