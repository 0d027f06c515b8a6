"""Quantized checkpoints: which format one is in, and how its tensors stand for the plain ones that families name.

Integers are kept bit for bit; float formats are dequantized as they are read and quantized to what was asked for.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..weights import Piece, Weight
from . import PackedMatrix

# quant_method: the module that reads it.
FORMATS = {
    "awq": "awq_format",
    "compressed-tensors": "compressed_tensors_format",
    "fp8": "fp8_block_format",
    "gptq": "gptq_format",
    "mxfp4": "mxfp4_format",
}


class SourceFormat(Protocol):
    """What a format's module offers."""

    def check_settings(self, settings: dict[str, Any], where: str) -> None:
        """Raises CheckpointError for a variant that is not read; `where` is the file the settings are in."""

    def find_packed(self, checkpoint: Checkpoint, settings: dict[str, Any], name: str) -> PackedMatrix | None:
        """What stands for the plain tensor `name`; None where it is stored plainly, as routers and norms are.

        Raises:
            CheckpointError: names the packed tensor that is missing, malformed or contradicts the others.
        """


class _Measured(Protocol):
    @property
    def relative(self) -> float: ...


def find_format(checkpoint: Checkpoint) -> tuple[SourceFormat, dict[str, Any]] | None:
    """The format and its settings; None for a plain checkpoint.

    Raises:
        CheckpointError: a method that is not known, with the known, or a variant that is not read.
    """
    where = str(checkpoint.path / "config.json")
    settings = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if not settings:
        return None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where}: quantization_config is {settings!r}, an object was expected")
    method = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None)
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"{where}: quantization_config has quant_method {method!r}, which is not known; known: "
            f"{', '.join(sorted(FORMATS))}; or export the unquantized checkpoint"
        )
    source_format: SourceFormat = importlib.import_module(f".{FORMATS[method]}", __package__)
    source_format.check_settings(settings, f"{where}: quantization_config")
    return source_format, settings


def bind_sources(checkpoint: Checkpoint, plan: list[Weight]) -> list[Weight]:
    """The plan with each piece that the checkpoint holds packed bound to what stands for it.

    Raises:
        CheckpointError: as `find_format`, and for a packed tensor that is missing or malformed.
    """
    found = find_format(checkpoint)
    if found is None:
        return plan
    source_format, settings = found
    known: dict[str, PackedMatrix | None] = {}

    def bind(piece: Piece) -> Piece:
        if piece.source not in known:
            known[piece.source] = source_format.find_packed(checkpoint, settings, piece.source)
        packed = known[piece.source]
        return piece if packed is None else dataclasses.replace(piece, packed=packed)

    return [
        dataclasses.replace(weight, units=tuple(tuple(bind(piece) for piece in unit) for unit in weight.units))
        for weight in plan
    ]


def describe_sources(plan: list[Weight], errors: Mapping[str, _Measured]) -> list[str]:
    """A note for each way that packed tensors came and what became of them; `errors` by role, as they were written."""
    kept: Counter[str] = Counter()
    again: dict[str, Counter[str]] = {}
    unpacked: Counter[str] = Counter()
    for weight in plan:
        for piece in weight.pieces():
            if piece.packed is None or not piece.packed.origin:
                continue
            if weight.precision == "keep" or weight.role not in errors:
                unpacked[piece.packed.origin] += 1
            elif piece.integers is not None:
                kept[piece.packed.origin] += 1
            elif errors[weight.role].relative == 0:  # into float32
                unpacked[piece.packed.origin] += 1
            else:
                again.setdefault(piece.packed.origin, Counter())[weight.role] += 1
    notes = [f"{count} matrices of {origin} keep their integers bit for bit" for origin, count in kept.items()]
    for origin, roles in again.items():
        figures = ", ".join(f"{role.replace('_', ' ')} {100 * errors[role].relative:.2f}%" for role in roles)
        said = f"{roles.total()} matrices of {origin} were quantized again"
        notes.append(f"{said}; weights' relative error by rounding: {figures}")
    notes += [f"{count} matrices of {origin} were unpacked to floating point" for origin, count in unpacked.items()]
    return notes
