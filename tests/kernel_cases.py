"""Random quantized experts and linears, the ops of `moedge.cpu` over them, and the same in numpy."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moedge.export.quantization import pack_int6
from moedge.runtime import kernels

Array = NDArray[Any]
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Stack:
    """Matrices [E, rows, width]: codes as integers, scales and zero points [E, rows, groups], bias [E, rows]."""

    codes: Array
    scales: Float
    bits: int
    zero_points: Array | None = None
    bias: Float | None = None

    @property
    def group(self) -> int:
        return int(self.codes.shape[-1] // self.scales.shape[-1])

    def packed(self, values: Array) -> NDArray[np.uint8]:
        """As weights.bin has them: nibbles by twos, the low one first; 6 bits of one matrix in planes."""
        if self.bits == 8:
            return values
        if self.bits == 6:
            planes = np.concatenate([plane.reshape(-1) for plane in pack_int6(values)])
            return planes.reshape(1, 3, values.shape[1], -1)
        if values.shape[-1] % 2:
            values = np.concatenate([values, np.zeros_like(values[..., :1])], -1)
        return (values[..., ::2] | values[..., 1::2] << 4).astype(np.uint8)


def make_stack(
    generator: np.random.Generator,
    shape: tuple[int, int, int],
    group: int,
    bits: int,
    *,
    zero_points: bool = False,
    bias: bool = False,
) -> Stack:
    *lead, width = shape
    groups = (*lead, width // group)
    return Stack(
        codes=generator.integers(0, 2**bits, shape, np.uint8),
        scales=(generator.random(groups, np.float32) + 0.5) * np.float32(2.0**-bits / np.sqrt(width) * 4),
        bits=bits,
        zero_points=generator.integers(0, 2**bits, groups, np.uint8) if zero_points else None,
        bias=generator.standard_normal(lead, np.float32) if bias else None,
    )


def quantize(x: Float, group: int) -> tuple[Array, Float]:
    """Activations [T, width] as integers of at most 127 and scales, both [T, groups, ...]."""
    parts = x.reshape(len(x), -1, group)
    scales = np.abs(parts).max(-1) / np.float32(127)
    inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales > 0)
    return np.rint(parts * inverse[..., None]).astype(np.int64), scales


def multiply(x: Float, stack: Stack, expert: int) -> Float:
    """[T, rows]: integers summed within a group, groups added in order, each by one fused multiply-add."""
    codes, scales = quantize(x, stack.group)
    weights = stack.codes[expert].astype(np.int64).reshape(len(stack.codes[expert]), -1, stack.group)
    zero = 2 ** (stack.bits - 1) if stack.zero_points is None else stack.zero_points[expert][..., None].astype(np.int64)
    sums = np.einsum("tbg,rbg->btr", codes, weights - zero)
    total = np.zeros(sums.shape[1:], np.float32)
    for b, integers in enumerate(sums):
        scale = scales[:, b, None] * stack.scales[expert][None, :, b]
        total = (total + integers * scale.astype(np.float64)).astype(np.float32)
    return total if stack.bias is None else total + stack.bias[expert]


def run_reference(
    x: Float, chosen: Array, weights: Float, gate_up: Stack, down: Stack, *, alpha: float, limit: float, offset: float
) -> Float:
    """y [T, H] of a mixture."""
    y = np.zeros((len(x), down.codes.shape[1]), np.float32)
    for expert in np.unique(chosen):
        tokens, places = np.nonzero(chosen == expert)
        pairs = multiply(x[tokens], gate_up, expert)
        gate, up = np.minimum(pairs[:, ::2], limit), np.clip(pairs[:, 1::2], -limit, limit)
        with np.errstate(over="ignore"):
            inner = gate / (1 + np.exp(-alpha * gate.astype(np.float64))) * (up + offset)
        outputs = multiply(inner.astype(np.float32), down, expert)
        y[tokens] += weights[tokens, places][:, None] * outputs
    return y


def make_model(op: str, inputs: dict[str, int], constants: dict[str, Array | None], **attributes: Any) -> bytes:
    """A graph of one node: `inputs` by name with their ONNX types, then `constants`; None is an input left out."""
    names = [name if value is not None else "" for name, value in constants.items()]
    node = helper.make_node(op, [*inputs, *names], ["y"], domain=kernels.DOMAIN, **attributes)
    values = [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    held = [
        numpy_helper.from_array(np.ascontiguousarray(value), name)
        for name, value in constants.items()
        if value is not None
    ]
    graph = helper.make_graph([node], "one", values, [output], held)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(kernels.DOMAIN, 1)]
    proto: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return proto


def experts_model(gate_up: Stack, down: Stack, **attributes: Any) -> bytes:
    inputs = {"x": TensorProto.FLOAT, "experts": TensorProto.INT64, "weights": TensorProto.FLOAT}
    constants = {
        "gate_up": gate_up.packed(gate_up.codes),
        "gate_up_scales": gate_up.scales,
        "down": down.packed(down.codes),
        "down_scales": down.scales,
        "gate_up_zeros": None if gate_up.zero_points is None else gate_up.packed(gate_up.zero_points),
        "down_zeros": None if down.zero_points is None else down.packed(down.zero_points),
        "gate_up_bias": gate_up.bias,
        "down_bias": down.bias,
    }
    return make_model("Experts", inputs, constants, bits=gate_up.bits, **attributes)


def linear_model(matrix: Stack) -> bytes:
    """y = x W^T of a stack of one matrix."""
    constants = {
        "codes": matrix.packed(matrix.codes)[0],
        "scales": matrix.scales[0],
        "zeros": None if matrix.zero_points is None else matrix.packed(matrix.zero_points)[0],
        "bias": None if matrix.bias is None else matrix.bias[0],
    }
    return make_model("Linear", {"x": TensorProto.FLOAT}, constants, bits=matrix.bits)


def instruction_sets(library: Path) -> list[str]:
    """Those of this machine, the best first."""
    function = ctypes.CDLL(str(library)).moedge_kernels_available
    function.restype = ctypes.c_char_p
    return list(function().decode().split())


def open_model(model: bytes | onnx.ModelProto, library: Path, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
