"""How evenly experts are used: counts of assignments by layer, and the figures that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sessions import Routing


@dataclass(frozen=True)
class Load:
    """The assignments of one MoE layer: `counts` int64 [experts], `weight` float64 [experts] the weights' sums."""

    layer: int
    counts: NDArray[np.int64]
    weight: NDArray[np.float64]

    @property
    def share(self) -> NDArray[np.float64]:
        """Each expert's share of the assignments; they sum to 1."""
        return self.counts / max(1, int(self.counts.sum()))

    @property
    def mean_over_max(self) -> float:
        """Utilization: the mean load over the largest, 1 when all experts are used alike, 1/E when one does it all."""
        return float(self.counts.mean() / max(1, int(self.counts.max())))

    @property
    def entropy(self) -> float:
        """Entropy of the shares over that of E equal ones, 0 to 1."""
        share = self.share[self.counts > 0]
        if len(self.counts) < 2:
            return 1.0
        return max(0.0, float(-(share * np.log(share)).sum() / np.log(len(self.counts))))

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation of the counts over their mean; 0 when all are alike."""
        mean = float(self.counts.mean())
        return float(self.counts.std() / mean) if mean else 0.0

    @property
    def unused(self) -> int:
        """Experts that no token took."""
        return int((self.counts == 0).sum())

    def to_json(self) -> dict[str, Any]:
        """Counts and every figure."""
        return {
            "layer": self.layer,
            "counts": [int(count) for count in self.counts],
            "share": [float(value) for value in self.share],
            "mean_over_max": self.mean_over_max,
            "entropy": self.entropy,
            "coefficient_of_variation": self.variation,
            "unused": self.unused,
        }


class LoadCounter:
    """Adds up routes; `layers` are the numbers of the MoE layers in the routes' order."""

    def __init__(self, layers: Sequence[int], experts: int) -> None:
        self._layers = tuple(layers)
        self._counts = np.zeros((len(self._layers), experts), np.int64)
        self._weight = np.zeros((len(self._layers), experts), np.float64)

    def add(self, routing: Routing) -> None:
        """Count the routes of some tokens, [layers, tokens, k] each."""
        experts = self._counts.shape[1]
        for index in range(len(self._layers)):
            taken = routing.experts[index].reshape(-1)
            weights = routing.weights[index].reshape(-1)
            self._counts[index] += np.bincount(taken, minlength=experts)
            self._weight[index] += np.bincount(taken, weights=weights, minlength=experts)

    def loads(self) -> list[Load]:
        """One for each layer."""
        return [
            Load(layer, self._counts[index].copy(), self._weight[index].copy())
            for index, layer in enumerate(self._layers)
        ]
