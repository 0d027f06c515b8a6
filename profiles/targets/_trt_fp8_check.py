"""A canonical graph with the weights that a network lowered to FP8 has, so that the two can be compared."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ._canonical import Rewriter, find_calls, find_linears, find_matrix, linear_matrix
from ._trt_fp8 import LARGEST
from ._trt_moe import find_shared


def round_canonical(model: ir.Model) -> None:
    """Round each matrix that lowering rounds, by ops put behind it; nothing is read. Rows of the experts' last product
    have one scale over all experts, and over the shared ones that ride along with them."""
    from onnx_ir.passes.common import TopologicalSortPass

    rewriter = Rewriter(model)
    linears = {id(linear_matrix(node).data): node for node in find_linears(model)}
    for call in (*find_calls(model, "Experts"), *find_calls(model, "BiasedExperts")):
        last = 4 if call.op_type == "Experts" else 5
        gate_up, down = find_matrix(call.inputs[3]), find_matrix(call.inputs[last])
        shared = find_shared(call, gate_up, down) if call.op_type == "Experts" else None
        _replace(rewriter, call, 3, _largest(rewriter, call.inputs[3], 2))
        most = _largest(rewriter, call.inputs[last], 0, 2)
        if shared is not None:
            turned = _transpose_of(linears.pop(id(shared.down.data)))
            row = rewriter.op("Unsqueeze", [_largest(rewriter, turned.inputs[0], 1), rewriter.ints(0)])
            most = rewriter.op("Max", [most, row])
            _replace(rewriter, turned, 0, rewriter.op("Squeeze", [most, rewriter.ints(0)]))
        _replace(rewriter, call, last, most)
    for linear in linears.values():
        if not _stays(linear_matrix(linear).data):
            turned = _transpose_of(linear)
            _replace(rewriter, turned, 0, _largest(rewriter, turned.inputs[0], 1))
    TopologicalSortPass()(model)


def _stays(data: ir.Value) -> bool:
    """Whether lowering leaves a matrix as it is: embedding, head, router, and those of a single row."""
    name = str(data.name)
    single = data.shape is not None and data.shape[0] == 1
    return name.startswith(("embed.", "head.")) or name.endswith(".router.weight") or single


def _transpose_of(linear: ir.Node) -> ir.Node:
    assert linear.inputs[1] is not None
    node = linear.inputs[1].producer()
    assert node is not None
    return node


def _largest(rewriter: Rewriter, matrix: ir.Value | None, *axes: int) -> ir.Value:
    return rewriter.op("ReduceMax", [rewriter.op("Abs", [matrix]), rewriter.ints(*axes)], keepdims=1)


def _replace(rewriter: Rewriter, node: ir.Node, index: int, most: ir.Value) -> None:
    """Put rounded numbers in the place of an input; `most`: the largest magnitude of each row."""
    op = rewriter.op
    largest, least = (
        rewriter.constant(f"fp8.{name}", np.array(value, np.float32))
        for name, value in (("largest", LARGEST), ("least", np.finfo(np.float16).smallest_subnormal))
    )
    scales = op("Max", [op("Div", [most, largest]), least])
    codes = op("Cast", [op("Div", [node.inputs[index], scales])], to=int(ir.DataType.FLOAT8E4M3FN))
    node.replace_input_with(index, op("Mul", [op("Cast", [codes], to=int(ir.DataType.FLOAT)), scales]))
    rewriter.insert_before(node)
