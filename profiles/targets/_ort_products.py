"""Products with quantized weights for onnxruntime's CPU: by its own kernels, or by ours (runtime/kernels)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.kernels import DOMAIN
from ._canonical import SIX_BITS_BEFORE, Rewriter, as_float, attributes_of, linear_matrix
from ._ort_codes import bytes_of, find_experts, mix_experts, multiply_codes, zero_points_of


class StockProducts:
    """`QMoE` and `MatMulNBits`. `fused_experts`: whether this onnxruntime's `QMoE` can be used."""

    def __init__(self, rewriter: Rewriter, accuracy_level: int, fused_experts: bool) -> None:
        self.rewriter = rewriter
        self.accuracy_level = accuracy_level
        self.fused_experts = fused_experts

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        """`QMoE` for quantized experts where it is there; the function's own body otherwise."""
        x, experts, weights = call.inputs[:3]
        gate_up, down, _ = find_experts(call)
        op = self.rewriter.op
        # A kernel's outputs are as wide as its inputs, which zeros widen where gate and up order them differently.
        if not gate_up.bits or not self.fused_experts or gate_up.shape[2] != down.shape[1]:
            return [op(call.op_type, call.inputs, domain=call.domain, **attributes_of(call))]
        # Zero elsewhere: the chosen experts are the k largest; one of weight 0 adds nothing, whoever is picked.
        count = self.rewriter.ints(gate_up.shape[0])
        shape = op("Concat", [op("Shape", [experts], start=0, end=1), count], axis=0)
        nowhere = op("ConstantOfShape", [shape], value=ir.tensor(np.zeros(1, np.float32)))
        routing = op("ScatterElements", [nowhere, experts, weights], axis=1)
        own: dict[str, Any] = {"normalize_routing_weights": 0, "accuracy_level": self.accuracy_level}
        return [mix_experts(self.rewriter, call, x, routing, partial(as_float, self.rewriter), routing, **own)]

    def lower_linear(self, node: ir.Node) -> list[ir.Value]:
        """`MatMulNBits` for codes, `Gemm` on the transposed matrix otherwise."""
        x, matrix = node.inputs[0], linear_matrix(node)
        op = self.rewriter.op
        if not matrix.bits:
            return [op("Gemm", [x, as_float(self.rewriter, matrix.data)], transB=1)]
        assert x is not None
        scales = as_float(self.rewriter, matrix.scales)
        return [multiply_codes(self.rewriter, x, matrix, scales, accuracy_level=self.accuracy_level)]


class OwnProducts(StockProducts):
    """The ops of `moedge.cpu`, which read codes, scales and zero points as they lie; the stock ones where none are."""

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        gate_up, down, biases = find_experts(call)
        if not gate_up.bits or gate_up.shape[2] != down.shape[1]:
            return super().lower_experts(call)
        codes = [(bytes_of(self.rewriter, matrix), matrix.scales) for matrix in (gate_up, down)]
        inputs = [*call.inputs[:3], *codes[0], *codes[1]]
        symmetric = gate_up.symmetric and down.symmetric
        inputs += [None if symmetric else zero_points_of(self.rewriter, matrix) for matrix in (gate_up, down)]
        attributes: dict[str, Any] = {"bits": gate_up.bits}
        if biases:
            inputs += biases
            attributes |= {name: float(attributes_of(call)[name]) for name in ("alpha", "limit")} | {"offset": 1.0}
        return [self.rewriter.op("Experts", inputs, domain=DOMAIN, **attributes)]

    def lower_linear(self, node: ir.Node) -> list[ir.Value]:
        matrix = linear_matrix(node)
        if not matrix.bits or matrix.six_bits == SIX_BITS_BEFORE:
            return super().lower_linear(node)
        inputs = [node.inputs[0], bytes_of(self.rewriter, matrix), matrix.scales]
        if not matrix.symmetric:
            inputs.append(zero_points_of(self.rewriter, matrix))
        return [self.rewriter.op("Linear", inputs, domain=DOMAIN, bits=matrix.bits)]
