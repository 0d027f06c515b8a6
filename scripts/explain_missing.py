"""Imported by scripts before anything optional: what is not installed is then told in one line, as `moedge` does."""

from __future__ import annotations

import sys
from types import TracebackType

# What scripts need beside what errors.py knows, or by another extra: import name -> extra.
EXTRAS = {"torch": "eval", "transformers": "eval", "httpx": "dev", "hypothesis": "dev", "schemathesis": "dev"}


def need(*modules: str) -> None:
    """Raises DependencyError for the first that is missing: before minutes of work, not after."""
    from moedge.errors import require

    for module in modules:
        require(module, EXTRAS.get(module))


def message(error: BaseException) -> str | None:
    """What to tell of an error that the user can mend; None for a bug."""
    try:
        from moedge import errors
    except ModuleNotFoundError:
        place = f"moedge is not installed for {sys.executable}"
        how = "run the script with .venv/bin/python, which `make demo` makes"
        return f"{place}; {how}" if isinstance(error, ModuleNotFoundError) else None
    if isinstance(error, errors.MoedgeError):
        return " ".join(str(error).splitlines())
    if not isinstance(error, ModuleNotFoundError):
        return None
    told = errors.dependency_error_from(error, {**errors.EXTRAS, **EXTRAS})
    return None if told is None else str(told)


def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As sys.excepthook; Python exits with 1 after it."""
    text = message(error)
    if text is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"error: {text}", file=sys.stderr)


sys.excepthook = tell
