"""Mixture-of-Experts language models on edge devices: checkpoint -> ONNX bundle -> engine -> tokens.

    moedge.export("checkpoint/", "bundle/", weights="int4")
    moedge.build("bundle/", profile="rtx4090")
    with moedge.load("bundle/") as engine: ...

Importing this module imports nothing heavy: each name below is looked up when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .errors import (
    BuildError,
    BundleError,
    CheckpointError,
    DependencyError,
    EngineError,
    MoedgeError,
    ParityError,
    ProfileError,
    ReportError,
    UsageError,
    dependency_error_from,
)

if TYPE_CHECKING:
    from .bundle import Bundle as Bundle
    from .export.pipeline import export_checkpoint as export  # what calling the subpackage calls
    from .profiles.build import build as build
    from .runtime.engine import load as load

# onnxruntime would otherwise keep files about its use in the user's home; who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = [
    "BuildError",
    "Bundle",
    "BundleError",
    "CheckpointError",
    "DependencyError",
    "EngineError",
    "MoedgeError",
    "ParityError",
    "ProfileError",
    "ReportError",
    "UsageError",
    "build",
    "export",
    "load",
]

# Public name -> (module, attribute). `export` is a subpackage that can be called.
_LAZY: dict[str, tuple[str, str | None]] = {
    "Bundle": (".bundle", "Bundle"),
    "build": (".profiles.build", "build"),
    "export": (".export", None),
    "load": (".runtime.engine", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    path, attribute = _LAZY[name]
    try:
        module = importlib.import_module(path, __name__)
    except ModuleNotFoundError as error:
        explained = dependency_error_from(error)
        if explained is None:
            raise
        raise explained from error
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
