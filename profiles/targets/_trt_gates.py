"""Gates in TensorRT, which has no use for a loop: its shapes do not go through one, and one token has no need of it.

So a gate's rounds stand one behind the other, as many as nearly every chunk is done with. Where a chunk is not, its
experts come out of the network as UNSETTLED, and whoever runs it runs it again in two halves: of one token there is
nothing to settle.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from ...export.gating import LoopBody, list_gates
from ._canonical import attributes_of, find_calls
from ._trt_attention import layer_of

if TYPE_CHECKING:
    from .tensorrt_network import Lowering

# Enough for most chunks (docs/decisions.md); each costs some kernels a layer, in the profile of chunks alone.
ROUNDS = 8
UNSETTLED = -1


class _GateNodes:
    """The network's own builder, with rounds written out."""

    def __init__(self, lowering: Lowering) -> None:
        self.lowering, rewriter = lowering, lowering.rewriter
        self.op, self.ops, self.constant, self.ints = rewriter.op, rewriter.ops, rewriter.constant, rewriter.ints
        self.unsettled: ir.Value | None = None  # bool []: the last round was not enough

    def part_rows(self, values: Sequence[ir.Value]) -> tuple[list[ir.Value], list[ir.Value]]:
        first, other = self.lowering.first_rows, self.lowering.other_rows
        return [first(value) for value in values], [other(value) for value in values]

    def loop(self, most: Any, go: Any, carried: Sequence[Any], body: LoopBody) -> list[Any]:
        current = list(carried)
        for _ in range(ROUNDS):
            self.unsettled, current = body(self, current)
        return current


def lower_gates(lowering: Lowering) -> None:
    """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
    rewriter = lowering.rewriter
    for kind, gate in list_gates().items():
        for call in find_calls(lowering.model, kind):
            layer, attributes = layer_of(call), attributes_of(call)
            build = _GateNodes(lowering)
            experts, weights, *state = gate.lower(build, call.inputs, attributes)
            chosen = experts
            if build.unsettled is not None:
                nobody = rewriter.constant(f"int.{UNSETTLED}", np.array(UNSETTLED, np.int64))
                chosen = rewriter.op("Where", [build.unsettled, nobody, experts])
            rewriter.replace(call, [experts, weights, *state])
            chosen.name, weights.name = f"experts.{layer}", f"weights.{layer}"
            chosen.dtype, weights.dtype = ir.DataType.INT64, ir.DataType.FLOAT
            chosen.shape = weights.shape = ir.Shape(["T", attributes["top_k"]])
            lowering.more_outputs += [chosen, weights]
