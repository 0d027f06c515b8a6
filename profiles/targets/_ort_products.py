"""Products with quantized weights for onnxruntime's CPU: by its own kernels, or by ours (runtime/kernels)."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from ...runtime.kernels import DOMAIN
from ._canonical import Matrix, Rewriter, attributes_of, find_matrix, linear_matrix
from ._ort_attention import MS


class StockProducts:
    """`QMoE` and `MatMulNBits`. `fused_experts`: whether this onnxruntime's `QMoE` can be used."""

    def __init__(self, rewriter: Rewriter, accuracy_level: int, fused_experts: bool) -> None:
        self.rewriter = rewriter
        self.graph = rewriter.model.graph
        self.accuracy_level = accuracy_level
        self.fused_experts = fused_experts

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        """`QMoE` for quantized experts where it is there; the function's own body otherwise."""
        x, experts, weights, *operands = call.inputs
        biased = call.op_type == "BiasedExperts"
        gate_up, down = (find_matrix(value) for value in (operands[::2] if biased else operands))
        op, attributes = self.rewriter.op, attributes_of(call)
        # A kernel's outputs are as wide as its inputs, which zeros widen where gate and up order them differently.
        if not gate_up.bits or not self.fused_experts or gate_up.shape[2] != down.shape[1]:
            inputs = [x, experts, weights, *operands]
            return [op(call.op_type, inputs, domain=call.domain, **attributes)]
        # Zero elsewhere: the chosen experts are the k largest; one of weight 0 adds nothing, whoever is picked.
        count = self.rewriter.ints(gate_up.shape[0])
        shape = op("Concat", [op("Shape", [experts], start=0, end=1), count], axis=0)
        nowhere = op("ConstantOfShape", [shape], value=ir.tensor(np.zeros(1, np.float32)))
        routing = op("ScatterElements", [nowhere, experts, weights], axis=1)
        inputs = [None] * 15
        inputs[:4] = [x, routing, self._bytes(gate_up), gate_up.scales]
        inputs[5], inputs[6], inputs[14] = self._bytes(down), down.scales, routing
        activation: dict[str, Any] = {"activation_alpha": 1.0, "activation_beta": 0.0}
        if biased:
            inputs[4], inputs[7] = operands[1::2]
            limits = {"swiglu_limit": float(attributes["limit"])}
            activation = {"activation_alpha": float(attributes["alpha"]), "activation_beta": 1.0, **limits}
        if not (gate_up.symmetric and down.symmetric):
            inputs[11], inputs[12] = self._zero_points(gate_up), self._zero_points(down)
        assert experts is not None and experts.shape is not None
        return [
            op(
                "QMoE",
                inputs,
                domain=MS,
                k=int(experts.shape[1]),  # type: ignore[arg-type]
                activation_type="swiglu",
                swiglu_fusion=1,
                expert_weight_bits=gate_up.bits,
                block_size=gate_up.block_size,
                use_sparse_mixer=0,
                normalize_routing_weights=0,
                accuracy_level=self.accuracy_level,
                **activation,
            )
        ]

    def lower_linear(self, node: ir.Node) -> list[ir.Value]:
        """`MatMulNBits` for codes, `Gemm` on the transposed matrix otherwise."""
        x, matrix = node.inputs[0], linear_matrix(node)
        op = self.rewriter.op
        if not matrix.bits:
            data = matrix.data
            if data.dtype == ir.DataType.FLOAT16:
                data = op("Cast", [data], to=int(ir.DataType.FLOAT))
            return [op("Gemm", [x, data], transB=1)]
        rows, width = matrix.shape
        blocks, block = width // matrix.block_size, matrix.block_size
        codes = self._view(matrix.data, ir.DataType.UINT8, [rows, blocks, block * matrix.bits // 8])
        inputs = [x, codes, matrix.scales]
        if not matrix.symmetric:
            inputs.append(self._zero_points(matrix))
        attributes: dict[str, Any] = {"K": width, "N": rows, "bits": matrix.bits, "block_size": block}
        return [op("MatMulNBits", inputs, domain=MS, accuracy_level=self.accuracy_level, **attributes)]

    def _bytes(self, matrix: Matrix) -> ir.Value:
        """Codes [E, out, in] as the bytes [E, out, in * bits / 8] that `QMoE` takes."""
        *lead, width = matrix.shape
        return self._view(matrix.data, ir.DataType.UINT8, [*lead, width * matrix.bits // 8])

    def _zero_points(self, matrix: Matrix) -> ir.Value:
        """Zero points packed along the last axis, as bytes."""
        assert matrix.zero_points is not None
        *lead, width = matrix.shape
        packed = -(-(width // matrix.block_size) * matrix.bits // 8)
        return self._view(matrix.zero_points, ir.DataType.UINT8, [*lead, packed])

    def _view(self, value: ir.Value, dtype: ir.DataType, shape: list[int]) -> ir.Value:
        """The same bytes of weights.bin under another type and shape."""
        tensor = value.const_value
        assert isinstance(tensor, ir.ExternalTensor) and value.name is not None
        name = f"{value.name}.bytes"
        existing = self.graph.initializers.get(name)
        if existing is not None:
            return existing
        view = ir.ExternalTensor(
            tensor.location,
            tensor.offset,
            tensor.length,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=tensor.base_dir,
        )
        new = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=view)
        self.graph.register_initializer(new)
        return new


class OwnProducts(StockProducts):
    """The ops of `moedge.cpu`, which read codes, scales and zero points as they lie; the stock ones where none are."""

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        x, experts, weights, *operands = call.inputs
        biased = call.op_type == "BiasedExperts"
        gate_up, down = (find_matrix(value) for value in (operands[::2] if biased else operands))
        if not gate_up.bits or gate_up.shape[2] != down.shape[1]:
            return super().lower_experts(call)
        inputs = [x, experts, weights, self._bytes(gate_up), gate_up.scales, self._bytes(down), down.scales]
        symmetric = gate_up.symmetric and down.symmetric
        inputs += [None, None] if symmetric else [self._zero_points(gate_up), self._zero_points(down)]
        attributes: dict[str, Any] = {"bits": gate_up.bits}
        if biased:
            inputs += operands[1::2]
            attributes |= {name: float(attributes_of(call)[name]) for name in ("alpha", "limit")} | {"offset": 1.0}
        return [self.rewriter.op("Experts", inputs, domain=DOMAIN, **attributes)]

    def lower_linear(self, node: ir.Node) -> list[ir.Value]:
        matrix = linear_matrix(node)
        if not matrix.bits:
            return super().lower_linear(node)
        inputs = [node.inputs[0], self._bytes(matrix), matrix.scales]
        if not matrix.symmetric:
            inputs.append(self._zero_points(matrix))
        return [self.rewriter.op("Linear", inputs, domain=DOMAIN, bits=matrix.bits)]
