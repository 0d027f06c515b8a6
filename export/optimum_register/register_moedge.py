"""What optimum-cli finds: installed as optimum/commands/register/register_moedge.py, into optimum's own namespace."""

from optimum.commands.export.base import ExportCommand

from moedge.export.optimum_command import MoedgeExportCommand

REGISTER_COMMANDS = [(MoedgeExportCommand, ExportCommand)]
