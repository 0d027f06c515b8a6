"""Checkpoint to bundle. The package is callable: `moedge.export("checkpoint/", "bundle/", weights="int4")`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `moedge.export.pipeline.export_checkpoint`."""
        from .pipeline import export_checkpoint

        return export_checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
