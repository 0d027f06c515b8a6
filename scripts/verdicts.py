"""What the scripts that judge have in common."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

FLAT = 0.05  # growth of memory that counts as none


class Verdict(NamedTuple):
    """A bar, and whether it was met."""

    bar: str
    found: str
    met: bool


def show(verdicts: Sequence[Verdict]) -> None:
    """A line for each."""
    for verdict in verdicts:
        print(f"{'met' if verdict.met else 'MISSED':8}{verdict.bar}: {verdict.found}", flush=True)


def leave(verdicts: Sequence[Verdict]) -> NoReturn:
    """Exit code 0 where every bar was met, and there was one."""
    sys.exit(0 if verdicts and all(verdict.met for verdict in verdicts) else 1)
