"""The errors a user can cause or meet, and the optional dependencies that a user can lack.

Every one derives from `MoedgeError`; the command line catches that class once and prints one line. Anything else that
is raised is a bug and keeps its traceback. A message says what was wrong, what was available and what fixes it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

# What a missing module is installed with: import name -> extra of this package.
EXTRAS = {
    "onnxruntime": "cpu",
    "onnx": "export",
    "onnx_ir": "export",
    "safetensors": "export",
    "ml_dtypes": "export",
    "torch": "torch",
    "tensorrt_rtx": "rtx",
    "tensorrt": "tensorrt",
    "optimum": "optimum",
    "matplotlib": "report",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}


class MoedgeError(Exception):
    """Something the user can put right; its text is one line."""


class CheckpointError(MoedgeError):
    """The checkpoint cannot be read, or is not what its config says."""


class BundleError(MoedgeError):
    """The bundle is missing, damaged, or its place is taken."""


class BuildError(MoedgeError):
    """An engine cannot be built for the device or by the backend."""


class EngineError(MoedgeError):
    """An engine cannot run here, or was asked for what it cannot do."""


class ProfileError(MoedgeError):
    """A device profile is unknown or wrong."""


class ParityError(MoedgeError):
    """An exported model differs from its checkpoint."""


class ReportError(MoedgeError):
    """A bench result cannot be read, or a report cannot be written."""


class UsageError(MoedgeError, ValueError):
    """An argument out of its range (top_p, max_new_tokens, ...)."""


class DependencyError(MoedgeError, ImportError):
    """A package that only some of the work needs is not installed."""


def shorten(value: Any) -> str:
    """A value as a message shows it: one line, whatever it is."""
    if isinstance(value, int) and not -(10**20) < value < 10**20:
        return "a number of more than 20 digits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def require(module: str, extra: str | None = None, purpose: str = "") -> ModuleType:
    """Imports and returns `module`, an optional dependency (`purpose`: "run a cpu engine").

    Raises DependencyError with the pip command of `extra` (default: the one EXTRAS names) where it is not installed. A
    module that is there and fails to import raises its own error.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise missing_dependency(module, extra, purpose) from error


def missing_dependency(module: str, extra: str | None = None, purpose: str = "") -> DependencyError:
    """The DependencyError for a module that is not installed; KeyError where no extra is known to bring it."""
    root = module.split(".")[0]
    extra = extra or EXTRAS[root]
    reason = f" (needed to {purpose})" if purpose else ""
    other = " (or 'moedge[gpu]' on CUDA)" if extra == "cpu" else ""
    fix = f"pip install 'moedge[{extra}]'{other}"
    return DependencyError(f"{root} is not installed{reason}; install it: {fix}", name=root)


def dependency_error_from(error: ModuleNotFoundError, extras: Mapping[str, str] = EXTRAS) -> DependencyError | None:
    """What to tell the user about an import that failed: None where the module is no optional dependency (a bug)."""
    root = (error.name or "").split(".")[0]
    return missing_dependency(root, extras[root]) if root in extras else None
