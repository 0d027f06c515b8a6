"""One file per model family, named as its `model_type`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import MoEConfig
from ..weights import Weight


class Family(Protocol):
    """What a family's module offers."""

    def read_config(self, checkpoint: Checkpoint) -> MoEConfig:
        """Translate config.json; raises CheckpointError for what this family cannot express."""

    def plan_weights(self, config: MoEConfig) -> list[Weight]:
        """Every canonical tensor with the checkpoint tensors it is made from, in the order of the graph."""

    def ignored_tensors(self, config: MoEConfig) -> list[tuple[str, str]]:
        """(name prefix, why) of checkpoint tensors that are left out on purpose."""


def list_families() -> list[str]:
    """The model types that can be exported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def find_family(checkpoint: Checkpoint) -> Family:
    """The module for the checkpoint's `model_type`.

    Raises:
        CheckpointError: the type is missing or not known; the known are listed.
    """
    model_type = checkpoint.config.get("model_type")
    known = list_families()
    if model_type not in known:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: model_type {model_type!r} is not known; known: {', '.join(known)}"
        )
    family: Family = importlib.import_module(f".{model_type}", __name__)
    return family
