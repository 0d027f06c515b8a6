"""`gptq`: rounding that makes up for itself (Frantar et al. 2022, arXiv:2210.17323), by the inputs a matrix gets.

Columns are rounded one after the other, and what each loses is put on those that follow, weighted by the inverse of the
inputs' second moments. Scales and zero points are `hqq`'s, fitted when a group's turn comes.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..config import MoEConfig
from ..weights import Weight
from . import Algorithm, Array, Quantized, hqq
from .calibration import Calibration

ZERO_POINTS = hqq.ZERO_POINTS
# Root mean square of what a group may move, in its steps: columns move on purpose, beyond the nearest code. A row that
# would move further is quantized by hqq, so that the parity check can tell it from a wrong one.
MAX_ROUNDING = 2.5
MIN_TOKENS = 32  # an expert that saw fewer is quantized by hqq
SEQUENCES, LENGTH = 16, 512  # tokens of calibration
_DAMPING = 0.01  # of the mean second moment, added to all

_NEEDS_TEXT = (
    "algorithm 'gptq' needs a text to calibrate with; name one with --calibration FILE, or use --algorithm hqq"
)


def quantize(values: Array, bits: int, group_size: int, *, zero_points: bool = False) -> Quantized:
    """Only after `calibrate`."""
    raise CheckpointError(_NEEDS_TEXT)


def calibrate(checkpoint: Checkpoint, config: MoEConfig, plan: list[Weight], sequences: list[Array]) -> Gptq:
    """The algorithm, ready for the matrices of `plan`; `sequences`: token ids int64, each from position 0."""
    return Gptq(Calibration(checkpoint, config, plan, sequences))


def read_sequences(checkpoint: Checkpoint, text: str | os.PathLike[str] | None, config: MoEConfig) -> list[Array]:
    """Token ids of a text file, cut into up to `SEQUENCES` of `LENGTH`.

    Raises:
        CheckpointError: there is no file, it cannot be read, the checkpoint has no tokenizer, or the text is too short.
    """
    if text is None:
        raise CheckpointError(_NEEDS_TEXT)
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise CheckpointError(f"{text}: cannot be read as text ({cause}); name a UTF-8 file of text") from None
    tokenizer = checkpoint.path / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer} is missing, so no text can calibrate; use --algorithm hqq")
    from tokenizers import Tokenizer

    ids = np.array(Tokenizer.from_file(str(tokenizer)).encode(content).ids, np.int64)
    length = min(LENGTH, config.max_position_embeddings)
    if len(ids) < min(length, 2 * MIN_TOKENS) or ids.max() >= config.vocab_size:
        raise CheckpointError(
            f"{text}: {len(ids)} tokens of {config.vocab_size} known, at least {min(length, 2 * MIN_TOKENS)} are "
            "needed to calibrate; name a longer text"
        )
    return [ids[start : start + length] for start in range(0, min(len(ids), SEQUENCES * length), length)]


class Gptq:
    """An `Algorithm` that knows, for each matrix, the inputs it gets."""

    ZERO_POINTS = ZERO_POINTS
    MAX_ROUNDING = MAX_ROUNDING

    def __init__(self, calibration: Calibration) -> None:
        self.calibration = calibration
        self.seen: dict[str, list[int]] = {}  # by matrix: how many tokens each unit got
        self._place: tuple[str, int] | None = None
        self._factor: Array | None = None

    def quantize(self, values: Array, bits: int, group_size: int, *, zero_points: bool = False) -> Quantized:
        return hqq.quantize(values, bits, group_size, zero_points=zero_points)

    def at(self, weight: str, unit: int) -> Algorithm:
        """The algorithm for one unit of a tensor: itself for what the calibration does not reach."""
        if self._place != (weight, unit):
            self._place = (weight, unit)
            inputs = self.calibration.inputs(weight, unit)
            if inputs is not None:
                self.seen.setdefault(weight, []).append(len(inputs))
            self._factor = None if inputs is None or len(inputs) < MIN_TOKENS else factorize(inputs)
        return self if self._factor is None else _Fitted(self._factor)

    def notes(self) -> list[str]:
        """How many tokens calibrated, and which experts got too few."""
        tokens = sum(len(sequence) for sequence in self.calibration.sequences)
        few = [
            f"expert {expert} of {weight.split('.experts.')[0]} ({count} tokens)"
            for weight, counts in self.seen.items()
            if weight.endswith(".experts.gate_up.weight")
            for expert, count in enumerate(counts)
            if count < MIN_TOKENS
        ]
        notes = [f"gptq calibrated with {tokens} tokens"]
        if few:
            more = f" and {len(few) - 8} more" if len(few) > 8 else ""
            notes.append(
                f"{len(few)} experts got fewer than {MIN_TOKENS} tokens and were quantized by hqq: "
                f"{', '.join(few[:8])}{more}; calibrate with more text"
            )
        return notes


class _Fitted:
    ZERO_POINTS = ZERO_POINTS

    def __init__(self, factor: Array) -> None:
        self.factor = factor

    def quantize(self, values: Array, bits: int, group_size: int, *, zero_points: bool = False) -> Quantized:
        fitted = fit_codes(values, self.factor, bits, group_size, zero_points=zero_points)
        moved = (fitted.dequantize() - values).reshape(len(values), -1, group_size) / fitted.scales[..., None]
        far = np.sqrt(np.square(moved).mean(axis=-1)).max(axis=-1) > MAX_ROUNDING
        if far.any():
            plain = hqq.quantize(values[far], bits, group_size, zero_points=zero_points)
            fitted.codes[far], fitted.scales[far] = plain.codes, plain.scales
            if fitted.zero_points is not None:
                fitted.zero_points[far] = plain.zero_points
        return fitted


def factorize(inputs: Array) -> Array:
    """float32 [in, in]: the upper Cholesky factor of the inverse of the inputs' damped second moments."""
    moments = (inputs.T @ inputs).astype(np.float64)
    diagonal = np.diagonal(moments)
    mean = float(diagonal.mean()) or 1.0
    moments[np.diag_indices_from(moments)] += _DAMPING * mean
    return np.linalg.cholesky(np.linalg.inv(moments)).T.astype(np.float32)


def fit_codes(values: Array, factor: Array, bits: int, group_size: int, *, zero_points: bool) -> Quantized:
    """Codes of values float32 [rows, in] that keep the products with the inputs behind `factor`."""
    rows, width = values.shape
    left = np.ascontiguousarray(values.T, np.float32)  # [in, rows]: a column at a time is a row here
    codes = np.empty((width, rows), np.uint8)
    groups = width // group_size
    scales, zeros = np.empty((groups, rows), np.float32), np.empty((groups, rows), np.uint8)
    for group in range(groups):
        part = slice(group * group_size, (group + 1) * group_size)
        scale, zero = hqq.fit_grid(np.ascontiguousarray(left[part].T), bits, zero_points=zero_points)
        scales[group], zeros[group] = scale, zero
        lost = np.empty((group_size, rows), np.float32)
        for column in range(group_size):
            place = part.start + column
            value = left[place]
            code = np.clip(np.rint(value / scale) + zero, 0, (1 << bits) - 1)
            codes[place] = code
            lost[column] = (value - (code - zero) * scale) / factor[place, place]
            left[place + 1 : part.stop] -= factor[place, place + 1 : part.stop, None] * lost[column]
        left[part.stop :] -= factor[part, part.stop :].T @ lost
    own = np.ascontiguousarray(zeros.T) if zero_points else None
    return Quantized(np.ascontiguousarray(codes.T), np.ascontiguousarray(scales.T), own, bits, group_size)
