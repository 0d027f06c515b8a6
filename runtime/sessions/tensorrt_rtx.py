"""Backend `tensorrt_rtx`: engines built by TensorRT for RTX. Built and checked here; this version does not run them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

from ...errors import EngineError, require
from . import Findings, SessionOptions
from ._plans import NOT_EXECUTED, check_plans, installed_version

if TYPE_CHECKING:
    from ...bundle import Bundle
    from ..preflight import EngineInfo


def version() -> str | None:
    """The installed tensorrt_rtx's version."""
    return installed_version("tensorrt_rtx")


def check(folder: Path, info: EngineInfo) -> Findings:
    """Ask TensorRT-RTX whether each plan's header is well-formed; it needs no GPU for that."""
    install = "tensorrt_rtx is not installed: pip install 'moedge[rtx]'"
    return check_plans(folder, info, _load if version() else None, install)


def cannot_run(info: EngineInfo) -> str | None:
    """Why not: execution is still to come."""
    return NOT_EXECUTED


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> NoReturn:
    """Always refuses."""
    raise EngineError(f"engine '{info.profile}' cannot be loaded: {NOT_EXECUTED}")


def _load() -> ModuleType:
    return require("tensorrt_rtx", purpose="check a TensorRT-RTX engine")
