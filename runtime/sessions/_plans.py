"""What the TensorRT backends share: engines that are plans, built and checked here but not yet executed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import Findings

if TYPE_CHECKING:
    from ..preflight import EngineInfo

_MALFORMED = 32  # tensorrt's EngineInvalidityDiagnostics.MALFORMED_ENGINE
_HEADER_BYTES = 64

NOT_EXECUTED = "it is a TensorRT engine, which this version of moedge builds and checks but does not execute yet"


def installed_version(package: str) -> str | None:
    """The installed version of a package, without its libraries being loaded."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose(trt: ModuleType, header: bytes) -> int:
    """The bits that tensorrt's or tensorrt_rtx's own validity check gives for a plan's first bytes."""

    class Silence(trt.ILogger):  # type: ignore[misc,name-defined]
        """Without a GPU the check says so on stderr; its answer is all that matters here."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            pass

    logger = Silence()
    runtime = trt.Runtime(logger)
    if not hasattr(runtime, "get_engine_validity"):  # older versions of TensorRT
        return 0
    _, diagnostics = runtime.get_engine_validity(header)
    return int(diagnostics)


def check_plans(folder: Path, info: EngineInfo, load: Callable[[], ModuleType] | None, install: str) -> Findings:
    """Whether each plan's header is well-formed; `load` imports the package, and is None where it is not installed."""
    findings = Findings()
    if load is None:
        findings.unchecked.append(f"engine '{info.profile}': the plan's format ({install})")
        return findings
    trt = load()
    for name in sorted(name for name in info.files if name.endswith(".plan")):
        with (folder / name).open("rb") as stream:
            header = stream.read(_HEADER_BYTES)
        if diagnose(trt, header) & _MALFORMED:
            findings.faults.append(f"{folder / name} is no plan that {info.backend} {info.backend_version} would read")
    findings.unchecked.append(f"engine '{info.profile}': that it runs (it needs a GPU of its kind)")
    return findings
