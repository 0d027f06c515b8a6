"""What every result of an engine says of itself: which model, on what, with which versions, when."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from . import machine

if TYPE_CHECKING:
    from .engine import Engine


def describe_run(engine: Engine, kind: str, schema: int) -> dict[str, Any]:
    """The first keys of a result document of `kind`."""
    from .. import __version__

    manifest = engine.bundle.manifest
    quantization = manifest["quantization"]
    return {
        "schema": schema,
        "kind": kind,
        "model": str(manifest["model"]["name"]),
        "profile": engine.profile,
        "backend": engine.info.backend,
        "device": machine.name_of(engine.info.compute_capability),
        "weights": quantization.get("weights"),
        "group_size": quantization.get("group_size"),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"moedge": __version__, "backend": engine.info.backend_version},
    }
