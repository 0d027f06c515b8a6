"""Target `onnxruntime`: the canonical graph lowered to what onnxruntime's CPU kernels do fast.

Sequences are single (batch 1) and flat: S = new tokens, P = tokens in the cache, n = heads, r = kv_lora_rank,
w = r + rope. The weights stay in the bundle's weights.bin; the lowered graph points at the same offsets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import MODEL, Progress
from ...errors import BuildError, require
from ...export.gating import list_gates
from . import BuildRequest
from ._canonical import (
    Matrix,
    Rewriter,
    attributes_of,
    find_calls,
    find_linears,
    find_matrix,
    finish_model,
    holds_torch_graph,
    linear_matrix,
    load_canonical,
    replace_each,
)
from ._ort_attention import MS, AttentionLowering, CacheEntry, layer_of
from ._ort_rows import split_rows
from ._routes import trace_session

ON_GPU = "onnxruntime_cuda"  # the target in this one's place for a device that is a GPU
# int8 activations inside the product: three times the rate of the default for one token (docs/decisions.md).
ACCURACY_LEVEL = 4
LANES_MODEL = "model.lanes.onnx"
# Sequences stepped together unless more are asked for: the graph is small, and whoever serves has it at once.
LANES = 8

trace_routes = trace_session


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write model.onnx into `folder`; the engine is this graph over the bundle's own weights."""
    ort = require("onnxruntime", purpose="build an engine for it")
    if holds_torch_graph(request.bundle):
        from . import _ort_torch

        if request.max_batch != 1:
            raise BuildError(f"max_batch {request.max_batch}: a torch graph runs one sequence; use --max-batch 1")
        return _ort_torch.build(request, folder)
    fused = has_router_weights()
    lanes = count_lanes(request)
    for place, (name, count) in enumerate({MODEL: 1, LANES_MODEL: lanes}.items()):
        if progress is not None:
            progress("lowering to onnxruntime", place, 2)
        if place and lanes == 1:
            break
        model, config = load_canonical(request.bundle)
        cache = lower(
            model,
            accuracy_level=ACCURACY_LEVEL,
            fused_experts=fused,
            max_seq_len=request.max_seq_len,
            lanes=count,
        )
        (folder / name).write_bytes(ir.to_proto(model).SerializeToString())
    # This kernel takes rows in pairs, and rounds the last of an odd number otherwise.
    pairs = any(node.op_type == "MatMulNBits" for node in model.graph)
    if progress is not None:
        progress("lowering to onnxruntime", 2, 2)
    quantization = request.bundle.manifest["quantization"]
    return {
        "backend": "onnxruntime",
        "backend_version": ort.__version__,
        "compute_capability": None,
        "precision": f"{quantization['weights']} weights, fp32 activations",
        "status": "ready",
        "max_batch": request.max_batch,
        "max_seq_len": request.max_seq_len,
        "cache": [entry.to_json() for entry in cache],
        "session": {"moe_layers": list(config.moe.layers), "fused_experts": fused, "lanes": lanes, "pairs": pairs},
    }


def count_lanes(request: BuildRequest) -> int:
    """Sequences that the second graph steps together; 1 where there is none."""
    if request.bundle.config.get("rope", {}).get("kind", "fixed") != "fixed":
        # Its frequencies follow the longest position of a run, which must be one sequence's.
        if request.max_batch > 1:
            raise BuildError(
                f"max_batch {request.max_batch}: this model's rope depends on the length, so that a run takes one "
                "sequence; use --max-batch 1"
            )
        return 1
    return max(LANES, request.max_batch)


def has_router_weights() -> bool:
    """Whether the installed onnxruntime's `QMoE` takes the routing weights apart from the selection.

    Older ones (1.23 is the last for Python 3.10) do not, and are wrong for int4 in blocks of 64 and more: there the
    experts run as the function's own body, slower and right.
    """
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "cpu")
    schemas = [schema for schema in state.get_all_operator_schema() if schema.name == "QMoE" and schema.domain == MS]
    return any(value.name == "router_weights" for schema in schemas for value in schema.inputs)


def lower(
    model: ir.Model,
    *,
    accuracy_level: int = ACCURACY_LEVEL,
    fused_experts: bool = True,
    max_seq_len: int | None = None,
    lanes: int = 1,
) -> list[CacheEntry]:
    """Rewrite a canonical model in place; returns its cache tensors. `max_seq_len`: wider windows are no windows.

    Afterwards: inputs input_ids int64 [S], rows int64 [R], cache.NAME float32 [T, width] (a view, the run's own rows at
    its end); outputs logits float32 [R, vocab], new.NAME float32 [S, width] (to be bound to that end), experts.LAYER
    int64 and weights.LAYER float32 [S, k]. A cache by heads has past.NAME and new.NAME float32
    [1, heads, capacity, width / heads], one buffer, and an input length int64 [1], the rows before the run.
    With more than one lane each has tensors of its own (cache.NAME.LANE ...), and `Lanes` says what else goes in.
    """
    lowering = _Lowering(model, accuracy_level, fused_experts)
    attention = AttentionLowering(lowering.rewriter, max_seq_len, lanes)
    attention.lower()
    lowering.lower_gates()
    for kind in ("Experts", "BiasedExperts"):
        replace_each(lowering.rewriter, find_calls(model, kind), lowering.lower_experts)
    replace_each(lowering.rewriter, find_linears(model), lowering.lower_linear)
    if lanes > 1:
        split_rows(lowering.rewriter, attention.lanes.pieces)
    lowering.lower_head()
    finish_model(model, {MS: 1})
    return attention.cache


class _Lowering:
    def __init__(self, model: ir.Model, accuracy_level: int, fused_experts: bool) -> None:
        self.model = model
        self.graph = model.graph
        self.rewriter = Rewriter(model)
        self.accuracy_level = accuracy_level
        self.fused_experts = fused_experts

    def lower_gates(self) -> None:
        """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
        for kind, gate in list_gates().items():
            for call in find_calls(self.model, kind):
                layer = layer_of(call)
                experts, weights = gate.lower(self.rewriter, call.inputs, attributes_of(call))
                choices = attributes_of(call)["top_k"]
                experts.dtype, experts.shape = ir.DataType.INT64, ir.Shape(["S", choices])
                weights.dtype, weights.shape = ir.DataType.FLOAT, ir.Shape(["S", choices])
                self.rewriter.replace(call, [experts, weights])
                # After the replacement, which hands on the names of what it replaces.
                experts.name, weights.name = f"experts.{layer}", f"weights.{layer}"
                self.graph.outputs.extend([experts, weights])

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

    def lower_head(self) -> None:
        """Logits only for the rows that are asked for."""
        rows = ir.val("rows", ir.DataType.INT64, ["R"])
        self.graph.inputs.insert(1, rows)
        norm = next(iter(self.graph.initializers["final_norm.weight"].uses())).node
        norm.replace_input_with(0, self.rewriter.op("Gather", [norm.inputs[0], rows], axis=0))
        self.rewriter.insert_before(norm)
        reshape = self.graph.outputs[0].producer()
        assert reshape is not None and reshape.op_type == "Reshape" and reshape.inputs[0] is not None
        vocab = self.graph.outputs[0].shape[2]  # type: ignore[index]
        logits = reshape.inputs[0]
        self.graph.outputs[0] = logits
        self.graph.remove(reshape, safe=False)
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["R", vocab])

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
