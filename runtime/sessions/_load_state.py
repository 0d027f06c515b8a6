"""The running load of a sequence's experts: what a load-aware gate takes beside its scores.

It is a function of the routes taken so far, and those are kept, a row for each token and layer as the cache has them.
So it is right after whatever a session does to a sequence: truncated to any length, continued from rows of another, or
saved and read again, it is the same number to the last bit. It is summed in float64, token by token, however the text
was cut into steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..preflight import EngineInfo

_GRAIN = 64  # tokens between the loads that are remembered, so that truncating costs no more than these


class LoadState:
    """`routes` uint16 [layers, capacity, k], the experts of each token; `load` float32 [layers, experts], what they and
    the load before the first token sum to when each counts `decay` times as much with every token after it."""

    def __init__(self, info: EngineInfo, capacity: int) -> None:
        shape = (len(info.moe_layers), info.num_experts)
        self.decay = float(info.session["load_decay"])
        self.load = np.zeros(shape, np.float32)
        self.routes = np.zeros((shape[0], capacity, info.num_experts_per_tok), np.uint16)
        self._length = 0
        self._sums = np.full(shape, info.session["load_start"], np.float64)
        self.load[:] = self._sums
        self._kept = np.zeros((capacity // _GRAIN + 1, *shape), np.float64)
        self._layers = np.arange(shape[0])[:, None]

    def append(self, experts: NDArray[np.int64]) -> None:
        """Take on the next tokens' experts [layers, tokens, k]."""
        stop = self._length + experts.shape[1]
        self.routes[:, self._length : stop] = experts
        self.move_to(stop)

    def move_to(self, length: int) -> None:
        """The load behind the first `length` tokens, whose routes are there."""
        if length < self._length:
            self._length = length // _GRAIN * _GRAIN
            self._sums[:] = self._kept[length // _GRAIN]
        while self._length < length:
            if self._length % _GRAIN == 0:
                self._kept[self._length // _GRAIN] = self._sums
            self._sums *= self.decay
            self._sums[self._layers, self.routes[:, self._length]] += 1
            self._length += 1
        self.load[:] = self._sums


def load_state_of(info: EngineInfo, capacity: int) -> LoadState | None:
    """None for an engine whose gates have no state."""
    return LoadState(info, capacity) if "load_decay" in info.session else None
