"""The command `moedge`: a group that imports a command's module only when that command is called.

`moedge --help` and a mistyped command cost no more than click itself. A command is one line in COMMANDS.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from typing import Any, NamedTuple, NoReturn

import click

from . import __version__
from .errors import MoedgeError, dependency_error_from

# What the operating system refuses and the user can mend; any other OSError that gets this far is a bug.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class Command(NamedTuple):
    """Where a command is (module, relative to this package; click object in it) and what its own help begins with."""

    module: str
    attribute: str
    summary: str


COMMANDS = {
    "export": Command(".export.commands", "export_command", "Checkpoint folder to bundle."),
    "build": Command(".profiles.commands", "build_command", "Bundle to an engine for each device profile."),
    "generate": Command(
        ".runtime.commands", "generate_command", "Text that goes on from a prompt, which it does not repeat."
    ),
    "bench": Command(
        ".runtime.bench_commands",
        "bench_command",
        "Measures one engine on this machine: latency, rates, memory, and the share of the memory bandwidth it uses.",
    ),
    "report": Command(
        ".runtime.report_commands",
        "report_command",
        "Latency report out of RESULTs: files that `moedge bench --json` and `moedge estimate --json` wrote.",
    ),
    "estimate": Command(
        ".profiles.device_commands",
        "estimate_command",
        "Fit and predicted latency of BUNDLE on devices that are not here.",
    ),
    "profiles": Command(
        ".profiles.device_commands",
        "profiles_command",
        "Lists device profiles, or shows one (a name, or a path that ends in .toml) with the sources of its figures.",
    ),
    "eval": Command(
        ".runtime.eval_commands",
        "eval_command",
        "Perplexity and bits per byte of a text, and agreement with a checkpoint or another bundle.",
    ),
    "trace": Command(
        ".runtime.trace_commands",
        "trace_command",
        "Which experts each token of a text took in each layer: heat map, load figures, coloured tokens.",
    ),
    "inspect": Command(
        ".runtime.commands",
        "inspect_command",
        "What is in a bundle: model, gating, quantization, sizes, engines, provenance.",
    ),
    "verify": Command(
        ".profiles.verify_commands",
        "verify_command",
        "Checks every checksum, every expert, and the engines' preflight on this machine.",
    ),
    "serve": Command(".runtime.serve_commands", "serve_command", "OpenAI-compatible HTTP server."),
    "demo": Command(".demo", "demo_command", "The whole path on the bundled sample model."),
}


class LazyGroup(click.Group):
    """A group over COMMANDS; the list of commands in its help comes from that table."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        entry = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(entry.module, __package__), entry.attribute)
        assert isinstance(command, click.Command), f"{entry.module}:{entry.attribute} is no click command"
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=2, cutoff=0.5)
            meant = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(COMMANDS)}."
            raise click.UsageError(f"{error.message} {meant}", ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="moedge")
def main() -> None:
    """Mixture-of-Experts language models on edge devices: checkpoint to bundle, bundle to engine, engine to tokens."""


def run(args: list[str] | None = None) -> NoReturn:
    """The console entry point: calls the command and exits with its code.

    A user error is one line on stderr and exit 1; Ctrl-C is `interrupted` and exit 130; a reader that closed the pipe
    is no error worth a word; bad usage is click's own text and exit 2; a bug keeps its traceback.
    """
    try:
        result = main.main(args, prog_name="moedge", standalone_mode=False)
        sys.stdout.flush()
    except MoedgeError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        explained = dependency_error_from(error)
        if explained is None:
            raise
        _fail(str(explained))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort as error:
        if isinstance(error.__cause__, EOFError):  # click means a prompt's end of input; here there are no prompts
            raise error.__cause__ from None
        _fail("interrupted", prefix="", code=130)
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    sys.exit(_exit_code(result))


def _exit_code(result: Any) -> int:
    """click hands back the code of `ctx.exit(code)` as a result, and a command's own return value likewise."""
    return result if isinstance(result, int) else 0


def _fail(message: str, prefix: str = "error: ", code: int = 1) -> NoReturn:
    sys.stdout.flush()
    print(prefix + " ".join(message.splitlines()), file=sys.stderr)
    sys.exit(code)
