"""What goes into each matrix when the model reads text: the reference decoder runs on the checkpoint's own weights, one
layer at a time, and its matrices write down what they are multiplied with.

In memory at once: the hidden states of all tokens, the inputs recorded in one layer, and a part of one matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import reference
from ..checkpoint import Array, Checkpoint
from ..config import MoEConfig
from ..weights import Weight, read_rows, read_unit

_CHUNK_BYTES = 4 << 20


class Calibration:
    """Inputs of every matrix, layer by layer in order; `sequences`: token ids int64 [n], each from position 0."""

    def __init__(self, checkpoint: Checkpoint, config: MoEConfig, plan: list[Weight], sequences: list[Array]) -> None:
        self.checkpoint, self.config, self.sequences = checkpoint, config, sequences
        self.plan = {weight.name: weight for weight in plan}
        self.layer = -1
        self.hidden: list[Array] = []
        self.recorded: dict[tuple[str, int], list[Array]] = {}

    def inputs(self, name: str, unit: int) -> Array | None:
        """float32 [tokens, in], none for an expert that no token chose; None for what is in no layer and no head.

        Layers must be asked for in order: those passed are forgotten.
        """
        weight = self.plan[name]
        if not name.startswith(("layers.", "head.")) or weight.precision != "linear":
            return None
        layer = int(name.split(".")[1]) if name.startswith("layers.") else self.config.num_hidden_layers
        assert layer >= self.layer, f"{name} is asked for after layer {self.layer}"
        while self.layer < layer:
            self._run_next()
        recorded = self.recorded.get((name, unit), [])
        return np.concatenate(recorded) if recorded else np.zeros((0, weight.shape[-1]), np.float32)

    def _run_next(self) -> None:
        if self.layer < 0:
            self.hidden = [reference.embed_tokens(self._open, tokens) for tokens in self.sequences]
        self.layer += 1
        self.recorded = {}
        if self.layer == self.config.num_hidden_layers:
            # Not multiplied: the logits of all tokens are large, and nothing comes after them.
            normed = [reference.norm(self.config, self._open, "final_norm", x) for x in self.hidden]
            self.recorded["head.weight", 0] = normed
            return
        self.hidden = [reference.run_layer(self.config, self._open, self.layer, x) for x in self.hidden]

    def _open(self, name: str) -> Any:
        weight = self.plan[name]
        if weight.precision in ("keep", "wide") or len(weight.shape) < 2:
            return read_unit(self.checkpoint, weight, 0)
        return _Recording(self, weight)


class _Recording:
    """A matrix, or a stack of them, as far as the reference decoder uses it: entries, rows, products.

    `first_row`: of the unit, where an entry of the stack is a part of one, as each head of a latent's is.
    """

    __array_ufunc__ = None  # so that `array @ matrix.T` asks the matrix

    def __init__(
        self, calibration: Calibration, weight: Weight, unit: int | None = None, first_row: int = 0
    ) -> None:
        self.calibration, self.weight, self.first_row = calibration, weight, first_row
        self.unit = 0 if unit is None and len(weight.shape) == 2 else unit

    def __len__(self) -> int:
        return self.weight.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """An entry of a stack by its number, or rows [n, in] by an array of theirs."""
        if self.unit is None and len(self.weight.units) == 1:
            return _Recording(self.calibration, self.weight, 0, int(index) * self.weight.shape[-2])
        if self.unit is None:
            return _Recording(self.calibration, self.weight, int(index))
        checkpoint = self.calibration.checkpoint
        rows = [read_rows(checkpoint, self.weight, self.unit, int(row), int(row) + 1) for row in index]
        return np.concatenate(rows)

    @property
    def T(self) -> _Recording:
        return self

    def __rmatmul__(self, x: Array) -> Array:
        """x float32 [n, in] times the transpose, read some rows at a time."""
        assert self.unit is not None
        order = self.weight.order
        if order is not None:
            x = x[:, order if order.ndim == 1 else order[self.unit]]
        if self.first_row == 0:  # heads have all the same input
            self.calibration.recorded.setdefault((self.weight.name, self.unit), []).append(x)
        rows, width = self.weight.shape[-2:]
        product = np.empty((len(x), rows), np.float32)
        step = max(2, _CHUNK_BYTES // (4 * width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            first, last = self.first_row + start, self.first_row + stop
            product[:, start:stop] = x @ read_rows(self.calibration.checkpoint, self.weight, self.unit, first, last).T
        return product
