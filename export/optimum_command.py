"""`optimum-cli export moedge --model DIR OUT`: `moedge export DIR -o OUT`, with its options.

optimum-cli imports this at every call, whatever the command: so nothing of moedge that takes time is imported here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

if TYPE_CHECKING:
    from argparse import ArgumentParser

    import click


class MoedgeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]
    """The subcommand of `optimum-cli export`; optimum has no types."""

    COMMAND = CommandInfo(name="moedge", help="Export a Mixture-of-Experts checkpoint to a moedge bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.add_argument("-m", "--model", required=True, metavar="DIR", help="Hugging Face checkpoint folder.")
        parser.add_argument("output", metavar="OUT", help="The bundle's folder.")
        for option in _options():
            for names, settings in _arguments_from_option(option):
                parser.add_argument(*names, **settings)

    def run(self) -> None:
        """Exits as `moedge export` does: 0, or 1 with one line."""
        from ..cli import run

        assert self.args is not None
        words = ["export", self.args.model, "--output", self.args.output]
        for option in _options():
            for names, settings in _arguments_from_option(option):
                value = getattr(self.args, settings["dest"])
                if value is True:
                    words.append(names[0])
                elif value not in (None, False):
                    words += [names[0], value]
        run(words)


def _options() -> list[click.Option]:
    """`moedge export`'s own, but for the output, which is an argument here."""
    import click

    from .commands import export_command

    found = [each for each in export_command.params if isinstance(each, click.Option)]
    return [each for each in found if each.name not in ("output", "help")]


def _arguments_from_option(option: click.Option) -> list[tuple[list[str], dict[str, Any]]]:
    """The names and settings of argparse for one of click's; `--this/--that` are two."""
    import click

    shown: dict[str, Any] = {"help": (option.help or "").replace("%", "%%"), "default": None}
    if option.is_flag:
        each = [*option.opts, *option.secondary_opts]
        return [([name], {**shown, "action": "store_true", "dest": name[2:].replace("-", "_")}) for name in each]
    if isinstance(option.type, click.Choice):
        shown["choices"] = [str(choice) for choice in option.type.choices]
    else:
        shown["metavar"] = option.metavar
    return [([*option.opts], {**shown, "dest": str(option.name)})]
