"""Quantized weights as onnxruntime's kernels take them: the bytes of weights.bin, under other types and shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from ...export.functions import DOMAIN
from ._canonical import Matrix, Rewriter, attributes_of, find_matrix
from ._ort_attention import MS


def bytes_of(rewriter: Rewriter, matrix: Matrix) -> ir.Value:
    """Codes [..., out, in] as the bytes [..., out, in * bits / 8] that `QMoE` takes; of 6 bits as they are."""
    if matrix.six_bits:
        return matrix.data
    *lead, width = matrix.shape
    return view_bytes(rewriter, matrix.data, [*lead, width * matrix.bits // 8])


def zero_points_of(rewriter: Rewriter, matrix: Matrix) -> ir.Value:
    """Zero points packed along the last axis, as bytes."""
    assert matrix.zero_points is not None
    *lead, width = matrix.shape
    return view_bytes(rewriter, matrix.zero_points, [*lead, -(-(width // matrix.block_size) * matrix.bits // 8)])


def view_bytes(rewriter: Rewriter, value: ir.Value, shape: list[int]) -> ir.Value:
    """The same bytes of weights.bin as UINT8 of another shape."""
    tensor, name, graph = value.const_value, f"{value.name}.bytes", rewriter.model.graph
    existing = graph.initializers.get(name)
    if existing is not None:
        return existing
    kind = ir.DataType.UINT8
    if isinstance(tensor, ir.ExternalTensor):
        place = (tensor.location, tensor.offset, tensor.length, kind)
        view: ir.TensorProtocol = ir.ExternalTensor(
            *place, shape=ir.Shape(shape), name=name, base_dir=tensor.base_dir
        )
    else:
        assert tensor is not None
        view = ir.Tensor(np.frombuffer(tensor.tobytes(), np.uint8).reshape(shape), name=name)
    new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(kind), const_value=view)
    graph.register_initializer(new)
    return new


def find_experts(call: ir.Node) -> tuple[Matrix, Matrix, list[ir.Value | None]]:
    """A mixture's two stacks of matrices, gate_up and down, and their biases, if it has any."""
    operands = list(call.inputs[3:])
    biased = call.op_type == "BiasedExperts"
    gate_up, down = (find_matrix(value) for value in (operands[::2] if biased else operands))
    return gate_up, down, operands[1::2] if biased else []


def mix_experts(
    rewriter: Rewriter,
    call: ir.Node,
    x: ir.Value | None,
    routing: ir.Value,
    convert: Callable[[ir.Value | None], ir.Value | None],
    router_weights: ir.Value | None = None,
    **attributes: Any,
) -> ir.Value:
    """`QMoE` in the place of a mixture with quantized experts; `convert`: scales and biases to the kernel's type.

    `routing` [S, E]: what the kernel chooses by. `attributes`: those in which kernels differ.
    """
    gate_up, down, biases = find_experts(call)
    inputs: list[ir.Value | None] = [None] * 15
    inputs[:4] = [x, routing, bytes_of(rewriter, gate_up), convert(gate_up.scales)]
    inputs[5], inputs[6], inputs[14] = bytes_of(rewriter, down), convert(down.scales), router_weights
    activation: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0}
    if biases:
        given = attributes_of(call)
        inputs[4], inputs[7] = (convert(value) for value in biases)
        limits = {"swiglu_limit": float(given["limit"])}
        activation = {"activation_alpha": float(given["alpha"]), "activation_beta": 1.0, **limits}
    if not (gate_up.symmetric and down.symmetric):
        inputs[11], inputs[12] = zero_points_of(rewriter, gate_up), zero_points_of(rewriter, down)
    experts = call.inputs[1]
    assert experts is not None and experts.shape is not None
    while inputs[-1] is None:
        inputs.pop()
    return rewriter.op(
        "QMoE",
        inputs,
        domain=MS,
        k=int(experts.shape[1]),  # type: ignore[arg-type]
        activation_type="swiglu",
        swiglu_fusion=1,
        expert_weight_bits=gate_up.bits,
        block_size=gate_up.block_size,
        use_sparse_mixer=0,
        **activation,
        **attributes,
    )


def multiply_codes(
    rewriter: Rewriter, x: ir.Value, matrix: Matrix, scales: ir.Value | None, **attributes: Any
) -> ir.Value:
    """`MatMulNBits` of x [S, in] with codes [out, in]. Codes of 6 bits become 8-bit ones when the graph is loaded."""
    rows, width = matrix.shape
    blocks, block, bits = width // matrix.block_size, matrix.block_size, matrix.bits
    if matrix.six_bits:
        bits, wide = 8, rewriter.op(matrix.six_bits, [matrix.data], domain=DOMAIN)
        codes = rewriter.op("Reshape", [wide, rewriter.ints(rows, blocks, block)])
    else:
        codes = view_bytes(rewriter, matrix.data, [rows, blocks, block * bits // 8])
    inputs = [x, codes, scales]
    if not matrix.symmetric:
        inputs.append(zero_points_of(rewriter, matrix))
    sizes: dict[str, Any] = {"K": width, "N": rows, "bits": bits, "block_size": block}
    return rewriter.op("MatMulNBits", inputs, domain=MS, **sizes, **attributes)
