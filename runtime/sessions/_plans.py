"""What the TensorRT backends share: engines that are plans, checked without a GPU and run with one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...errors import EngineError
from . import Findings, SessionOptions

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo
    from ._trt_session import TensorrtSession

_MALFORMED = 32  # tensorrt's EngineInvalidityDiagnostics.MALFORMED_ENGINE
_HEADER_BYTES = 64


def installed_version(package: str) -> str | None:
    """The installed version of a package, without its libraries being loaded."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_plans(info: EngineInfo) -> list[str]:
    """Names of the plans, by range of layers."""
    return [str(part["engine"]) for part in info.session.get("parts") or ()]


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


def find_missing(package: str, extra: str) -> str | None:
    """What running an engine needs and is not installed; None where all is there."""
    for module, name in ((package, package), ("cuda.bindings", "cuda-bindings")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            return f"{name} is not installed: pip install 'moedge[{extra}]'"
    return None


def open_plans(bundle: Bundle, info: EngineInfo, options: SessionOptions, trt: ModuleType) -> TensorrtSession:
    """A session on CUDA device 0.

    Raises:
        EngineError: the device refuses, in its own words, or has not enough memory.
    """
    from ._trt_cuda import CudaDevice
    from ._trt_session import TensorrtSession

    capacity = min(options.max_seq_len or info.max_seq_len, info.max_seq_len)
    if not info.session.get("parts"):
        raise EngineError(
            f"engine '{info.profile}' was built by an older version of moedge; build it again: moedge build "
            f"{bundle.path} --profile {info.profile}"
        )
    return TensorrtSession(CudaDevice(trt), bundle.engine_dir(info.profile), info, capacity, options.lanes)
