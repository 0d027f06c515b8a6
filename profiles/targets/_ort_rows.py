"""Experts a row at a time, where a token's result must not depend on which others are in the run.

onnxruntime's `QMoE` takes the rows of an expert together and rounds by how many they are (tried with 1.31: 1e-6 of the
result for few rows, 1e-3 for many); the function of unquantized experts has two branches by the number of rows. A loop
over rows in the graph calls one kernel, which holds the weights once.
"""

from __future__ import annotations

import onnx_ir as ir

from ...export.functions import DOMAIN
from ._canonical import Rewriter
from ._ort_attention import MS

# How many of its first inputs have a row for each token, by domain and name.
_BY_ROW = {(MS, "QMoE"): 2, (DOMAIN, "Experts"): 3, (DOMAIN, "BiasedExperts"): 3}


def split_rows(rewriter: Rewriter, pieces: ir.Value) -> None:
    """Put mixtures of experts that round by the number of rows into loops over so many pieces of them."""
    for node in list(rewriter.model.graph):
        if (node.domain, node.op_type) in _BY_ROW:
            rewriter.replace(node, [_loop(rewriter, node, _BY_ROW[node.domain, node.op_type], pieces)])


def _loop(rewriter: Rewriter, node: ir.Node, by_row: int, pieces: ir.Value) -> ir.Value:
    """The node's output [S, H], by a `Scan` over pieces of its rows."""
    op, ints = rewriter.op, rewriter.ints
    inner, cut = {}, []
    for place, value in enumerate(node.inputs[:by_row]):
        assert value is not None
        inner[value] = ir.Value(name=f"piece.{place}", type=value.type or ir.TensorType(ir.DataType.FLOAT))
        width = op("Shape", [value], start=1, end=2)
        cut.append(op("Reshape", [value, op("Concat", [pieces, ints(-1), width], axis=0)]))
    call = ir.Node(
        node.domain,
        node.op_type,
        [inner.get(value, value) if value is not None else None for value in node.inputs],
        list(node.attributes.values()),
        num_outputs=1,
    )
    call.outputs[0].name = "piece"
    call.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph(list(inner.values()), call.outputs, nodes=[call], name="rows_of_experts")
    stacked = op("Scan", cut, body=body, num_scan_inputs=by_row)
    return op("Reshape", [stacked, op("Concat", [ints(-1), op("Shape", [stacked], start=2, end=3)], axis=0)])
