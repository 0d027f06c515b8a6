"""Backend `tensorrt`: engines of the TensorRT that JetPack and data centres have, built on the device; not run here."""

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
    """The installed tensorrt's version."""
    return installed_version("tensorrt")


def check(folder: Path, info: EngineInfo) -> Findings:
    """Ask TensorRT whether each plan's header is well-formed."""
    install = "tensorrt is not installed: pip install 'moedge[tensorrt]', or JetPack's"
    return check_plans(folder, info, _load if version() else None, install)


def cannot_run(info: EngineInfo) -> str | None:
    """Why not: execution is still to come."""
    return NOT_EXECUTED


def open_session(bundle: Bundle, info: EngineInfo, options: SessionOptions) -> NoReturn:
    """Always refuses."""
    raise EngineError(f"engine '{info.profile}' cannot be loaded: {NOT_EXECUTED}")


def _load() -> ModuleType:
    return require("tensorrt", purpose="check a TensorRT engine")
