"""Backend `tensorrt`: engines of the TensorRT that JetPack and data centres have, built on the device."""

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
    """The installed tensorrt's version."""
    return installed_version("tensorrt")


def loads(info: EngineInfo) -> list[str]:
    """The plan of each range of layers."""
    return list_plans(info)


def check(folder: Path, info: EngineInfo) -> Findings:
    """Ask TensorRT whether each plan's header is well-formed."""
    install = "tensorrt is not installed: pip install 'moedge[tensorrt]', or JetPack's"
    return check_plans(folder, info, _load if version() else None, install)


def cannot_run(info: EngineInfo) -> str | None:
    """What is not installed; whether there is a GPU is the preflight's affair."""
    return find_missing("tensorrt", "tensorrt")


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> TensorrtSession:
    """Raises EngineError where the device refuses the engine."""
    return open_plans(bundle, info, options, require("tensorrt", purpose="run a TensorRT engine"))


def _load() -> ModuleType:
    return require("tensorrt", purpose="check a TensorRT engine")
