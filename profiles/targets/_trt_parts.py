"""A network by ranges of layers: an engine for each, built one after the other in a memory that holds no more.

TensorRT's builder takes several times a network's weights in memory, and nobody bounds it. A range is a network of its
own: the first takes tokens, the others the hidden state [T, H] of the range before; the last gives the logits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from ...errors import BuildError
from ...export import memory
from ...runtime import machine
from ..fit import size
from ._trt_weights import LoweredWeights

# Resident memory of a build with two optimization profiles: the libraries, and this many times the network's weights.
# tensorrt_rtx 1.7.1 took, for INT4, 392 MiB for 26 MiB of weights, 587 for 53, 2519 for 740 and 4.8 GB for 1.13 GiB;
# for INT8, 646 MiB for 102 MiB and 7.9 GB for 2.5 GiB (docs/devices.md). A part that takes more is cut again.
BUILDER_BYTES = 400 << 20
BUILDER_TIMES = 4.0
# What this process holds more when the builders run than before it checked the network: onnxruntime's library, and what
# the allocator keeps (measured: 20 to 40 MiB).
CALLER_BYTES = 64 << 20
_ROUND = 8 << 20  # so that the figure of a refusal works although two runs differ by a little


@dataclass(frozen=True)
class Part:
    """Layers `start` to `stop - 1` of `total`, and the names of the files it is made in."""

    start: int
    stop: int
    total: int

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.stop == self.total

    @property
    def suffix(self) -> str:
        return "" if self.is_first and self.is_last else f".{self.start}-{self.stop - 1}"

    @property
    def model(self) -> str:
        return f"model{self.suffix}.onnx"

    @property
    def weights(self) -> str:
        return f"model{self.suffix}.weights"

    @property
    def plan(self) -> str:
        return f"engine{self.suffix}.plan"

    @property
    def log(self) -> str:
        return f"build{self.suffix}.log"

    def halves(self) -> list[Part]:
        middle = (self.start + self.stop) // 2
        return [Part(self.start, middle, self.total), Part(middle, self.stop, self.total)]

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [self.start, self.stop],
            "model": self.model,
            "weights": self.weights,
            "engine": self.plan,
            "log": self.log,
        }


def whole(layers: int) -> list[Part]:
    return [Part(0, layers, layers)]


def cut_part(model: ir.Model, part: Part, hidden_size: int) -> None:
    """Keep a part of a canonical model; its input is then `hidden` where it is not the first, its output the last
    layer's where it is not the last."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    ends = {value.name: value for node in model.graph for value in node.outputs}
    if not part.is_last:
        model.graph.outputs[:] = [ends[f"layers.{part.stop - 1}.output"]]
    if not part.is_first:
        hidden = ir.val("hidden", ir.DataType.FLOAT, ["T", hidden_size])
        ends[f"layers.{part.start - 1}.output"].replace_all_uses_with(hidden)
        model.graph.inputs.append(hidden)
    RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class NetworkSizes:
    """Bytes of a lowered network's weights: each layer's, and what comes before the first and behind the last."""

    layers: tuple[int, ...]
    before: int
    behind: int

    def of(self, part: Part) -> int:
        ends = (self.before if part.is_first else 0) + (self.behind if part.is_last else 0)
        return sum(self.layers[part.start : part.stop]) + ends


def measure_sizes(weights: LoweredWeights, layers: int) -> NetworkSizes:
    """`weights` of the whole network, planned and not yet written. A tied table counts at both ends."""
    by_layer, before, behind = [0] * layers, 0, 0
    tied = not any(str(tensor.value.name).startswith("head.weight") for tensor in weights.tensors)
    for tensor in weights.tensors:
        name = str(tensor.value.name)
        if name.startswith("layers."):
            by_layer[int(name.split(".")[1])] += tensor.nbytes
        elif name.startswith("embed."):
            before += tensor.nbytes
            behind += tensor.nbytes if tied else 0
        else:
            behind += tensor.nbytes
    return NetworkSizes(tuple(by_layer), before, behind)


def estimate_build_bytes(weights_bytes: int) -> int:
    """What a builder is expected to take for a network of so many bytes."""
    return BUILDER_BYTES + math.ceil(BUILDER_TIMES * weights_bytes)


def caller_bytes() -> int:
    """What the process that starts the builders is expected to hold beside them."""
    machine.release_memory()
    return memory.resident_bytes() + CALLER_BYTES


def plan_parts(sizes: NetworkSizes, bound: int | None, beside: int = 0) -> list[Part]:
    """As few parts as the bound allows, about alike; one where there is no bound.

    `beside`: bytes that the process that starts the builders holds meanwhile.

    Raises:
        BuildError: a single layer needs more; says the smallest bound that is enough.
    """
    total = len(sizes.layers)
    if bound is None:
        return whole(total)
    singles = [Part(layer, layer + 1, total) for layer in range(total)]
    least = max(estimate_build_bytes(sizes.of(part)) for part in singles) + beside
    if least > bound:
        raise too_small(bound, least, beside)
    for count in range(1, total + 1):
        parts = _cut_evenly(sizes, count)
        if all(estimate_build_bytes(sizes.of(part)) + beside <= bound for part in parts):
            return parts
    return singles


def _cut_evenly(sizes: NetworkSizes, count: int) -> list[Part]:
    """`count` parts, each cut where the bytes so far come nearest to its share."""
    total = len(sizes.layers)
    sums = [sizes.before]
    for layer in sizes.layers:
        sums.append(sums[-1] + layer)
    whole_bytes = sums[-1] + sizes.behind
    cuts = [0]
    for index in range(1, count):
        allowed = range(cuts[-1] + 1, total - (count - index) + 1)
        cuts.append(min(allowed, key=lambda cut: abs(sums[cut] - whole_bytes * index / count)))
    cuts.append(total)
    return [Part(start, stop, total) for start, stop in zip(cuts, cuts[1:], strict=False)]


def too_small(bound: int, least: int, beside: int) -> BuildError:
    mib = -(-(least + _ROUND) // (1 << 20))
    return BuildError(
        f"--max-memory {size(bound)}: building one layer's engine takes about {size(least)}, {size(beside)} of it this "
        f"process; use --max-memory {mib}MiB or more, or export with fewer bits (--weights int4)"
    )
