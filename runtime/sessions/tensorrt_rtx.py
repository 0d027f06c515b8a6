"""Backend `tensorrt_rtx`: engines built by TensorRT for RTX."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ...errors import require
from . import Findings, SessionOptions
from ._plans import check_plans, find_missing, installed_version, list_plans, open_plans

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo
    from ._trt_session import TensorrtSession

OWN_WEIGHTS = True  # plans hold them: the bundle's weights.bin may have stayed where they were built


def version() -> str | None:
    """The installed tensorrt_rtx's version."""
    return installed_version("tensorrt_rtx")


def loads(info: EngineInfo) -> list[str]:
    """The plan of each range of layers."""
    return list_plans(info)


def check(folder: Path, info: EngineInfo) -> Findings:
    """Ask TensorRT-RTX whether each plan's header is well-formed; it needs no GPU for that."""
    install = "tensorrt_rtx is not installed: pip install 'moedge[rtx]'"
    return check_plans(folder, info, _load if version() else None, install)


def cannot_run(info: EngineInfo) -> str | None:
    """What is not installed; whether there is a GPU is the preflight's affair."""
    return find_missing("tensorrt_rtx", "rtx")


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> TensorrtSession:
    """Raises EngineError where the device refuses the engine."""
    return open_plans(bundle, info, options, require("tensorrt_rtx", purpose="run a TensorRT engine"))


def _load() -> ModuleType:
    return require("tensorrt_rtx", purpose="check a TensorRT-RTX engine")
