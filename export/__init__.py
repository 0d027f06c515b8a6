"""Checkpoint to bundle. The package is callable: `moedge.export("checkpoint/", "bundle/", weights="int4")`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ..errors import dependency_error_from


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See `moedge.export.pipeline.export_checkpoint`."""
        try:
            from .pipeline import export_checkpoint
        except ModuleNotFoundError as error:
            explained = dependency_error_from(error)
            if explained is None:
                raise
            raise explained from error
        return export_checkpoint(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
