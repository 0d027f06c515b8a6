"""LoRA adapters (Hu et al. 2021, arXiv:2106.09685) in PEFT's folder layout, merged as the weights are read.

`W + scale * B A`, with A [rank, in] and B [out, rank] of each module; the merged matrix is never held whole.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import read_json
from ..errors import CheckpointError
from .checkpoint import Array, Checkpoint, read_header
from .quantization import check_finite
from .quantization._packed import FloatMatrix
from .weights import Piece, Weight, read_piece

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")


def bind_adapter(
    checkpoint: Checkpoint, plan: list[Weight], folder: str | os.PathLike[str]
) -> tuple[list[Weight], list[str]]:
    """The plan with the adapter's modules merged into their pieces, and a note that says so.

    Raises:
        CheckpointError: the folder is no LoRA adapter that can be merged, or does not fit the checkpoint.
    """
    adapter = _Adapter.open(Path(folder))
    merged: dict[str, Piece] = {}

    def bind(piece: Piece) -> Piece:
        if piece.source.removesuffix(".weight") not in adapter.modules:
            return piece
        if piece.source not in merged:
            merged[piece.source] = adapter.merge(checkpoint, piece)
        return dataclasses.replace(piece, packed=merged[piece.source].packed)

    bound = [
        dataclasses.replace(weight, units=tuple(tuple(bind(piece) for piece in unit) for unit in weight.units))
        for weight in plan
    ]
    lost = sorted(adapter.modules - {source.removesuffix(".weight") for source in merged})
    if lost:
        raise CheckpointError(
            f"{folder}: {len(lost)} of {len(adapter.modules)} modules of the adapter are not in this checkpoint, first "
            f"{lost[0]!r}; name the adapter that was trained on it"
        )
    return bound, [f"adapter {Path(folder).resolve().name} merged into {len(merged)} matrices"]


class _Adapter:
    def __init__(self, path: Path, settings: dict[str, Any], tensors: Checkpoint, modules: set[str]) -> None:
        self.path, self.settings, self.tensors, self.modules = path, settings, tensors, modules

    @classmethod
    def open(cls, path: Path) -> _Adapter:
        for name in (CONFIG, TENSORS):
            if not (path / name).is_file():
                raise CheckpointError(f"{path} has no {name}; name a folder that PEFT saved an adapter in")
        settings = read_json(path / CONFIG, CheckpointError)
        _check_settings(settings, str(path / CONFIG))
        tensors = Checkpoint(path, {}, read_header(path / TENSORS))
        modules = set()
        for name in tensors.entries:
            part = next((part for part in _PARTS if name.endswith(part)), None)
            if part is None or not name.startswith(_PREFIX):
                raise CheckpointError(
                    f"{path / TENSORS}: tensor {name!r} is no part of a plain LoRA ({' and '.join(_PARTS)}); merge the "
                    "adapter with PEFT first"
                )
            modules.add(name[len(_PREFIX) : -len(part)])
        if not modules:
            raise CheckpointError(f"{path / TENSORS}: holds no tensors; save the adapter again")
        return cls(path, settings, tensors, modules)

    def merge(self, checkpoint: Checkpoint, piece: Piece) -> Piece:
        """The piece with its adapter, read row by row like any other."""
        module = piece.source.removesuffix(".weight")
        first, second = (f"{_PREFIX}{module}{part}" for part in _PARTS)
        shapes = []
        for name in (first, second):
            if name not in self.tensors:
                raise CheckpointError(f"{self.path / TENSORS}: tensor {name!r} is missing; save the adapter again")
            shapes.append(self.tensors.entries[name].shape)
        rank = shapes[0][0] if shapes[0] else 0
        if len(piece.shape) != 2 or not rank or shapes != [(rank, piece.shape[1]), (piece.shape[0], rank)]:
            raise CheckpointError(
                f"{self.path / TENSORS}: module {module!r} has A {list(shapes[0])} and B {list(shapes[1])} for a "
                f"matrix {list(piece.shape)}; name the adapter that was trained on this checkpoint"
            )
        scale = np.float32(self._scale(module, rank))
        base = Piece(piece.source, piece.shape, packed=piece.packed)

        def read(start: int, stop: int) -> Array:
            values = read_piece(checkpoint, base, start, stop)
            values += scale * (self._read(second, start, stop) @ self._read(first, 0, rank))
            return values

        origin = "" if piece.packed is None else f"{piece.packed.origin}, with an adapter"
        return dataclasses.replace(piece, packed=FloatMatrix(piece.names, piece.shape, origin, read))

    def _read(self, name: str, start: int, stop: int) -> Array:
        values = self.tensors.read(name, start, stop).astype(np.float32)
        check_finite(self.tensors, name, values, start)
        return values

    def _scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) of rank-stabilized LoRA; `alpha_pattern` names modules by their ends."""
        alpha = self.settings.get("lora_alpha", 8)
        for pattern, own in (self.settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
                alpha = own
                break
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.path / CONFIG}: lora_alpha is {alpha!r}, a number was expected")
        return alpha / (math.sqrt(rank) if self.settings.get("use_rslora") else rank)


def _check_settings(settings: dict[str, Any], where: str) -> None:
    """Only what `W + scale * B A` expresses."""
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type {kind!r} cannot be merged here; can be: LORA")
    if settings.get("bias", "none") != "none":
        raise CheckpointError(f"{where}: bias {settings['bias']!r} cannot be merged here; merge the adapter with PEFT")
    for key in ("use_dora", "fan_in_fan_out", "modules_to_save", "lora_bias", "target_parameters"):
        if settings.get(key):
            raise CheckpointError(f"{where}: {key} cannot be merged here; merge the adapter with PEFT first")
    patterns = settings.get("alpha_pattern") or {}
    try:
        for pattern in patterns:
            re.compile(pattern)
    except (re.error, TypeError):
        raise CheckpointError(f"{where}: alpha_pattern {patterns!r} is not readable; save the adapter again") from None
    if not isinstance(patterns, dict):
        raise CheckpointError(f"{where}: alpha_pattern {patterns!r} is not readable; save the adapter again")
