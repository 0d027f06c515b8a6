"""Target `onnxruntime_cuda`: the canonical graph lowered to what onnxruntime's CUDA kernels take, on any NVIDIA GPU.

What `--backend onnxruntime` means for a profile with a GPU. Matrix products and attention are in half precision, the
router, norms, rotation and residual in float32. The weights stay in the bundle's weights.bin: `QMoE` lays the raw codes
out for its kernel when the engine is loaded (`weights_prepacked` 0, onnxruntime 1.28 and later).
S = new tokens, P = tokens in the cache, E = experts, k = experts a token, r = kv_lora_rank, w = r + rope.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import MODEL, Bundle, Progress
from ...errors import BuildError, require
from ...export.gating import list_gates
from ...runtime import machine
from ...runtime.preflight import EngineInfo
from ...runtime.sessions import onnxruntime_cuda as backend
from . import BuildRequest
from ._canonical import (
    Array,
    Rewriter,
    as_float,
    attributes_of,
    describe_load,
    find_calls,
    find_linears,
    find_matrix,
    finish_model,
    holds_torch_graph,
    keep_asked_rows,
    linear_matrix,
    load_canonical,
    refuse_chunks,
    replace_each,
    take_loads,
)
from ._ort_attention import MS, layer_of
from ._ort_codes import find_experts, mix_experts, multiply_codes
from ._ort_cuda_attention import CudaAttention
from ._routes import CPU, Traced, trace_session

BACKEND = "onnxruntime_cuda"
# What `QMoE`'s integer kernels take below SM90 (onnxruntime, docs/contrib_ops/cuda/moe_qmoe.md, 6.6), and above.
EXPERT_BLOCKS = (64, 128)
# A logit of an expert that was not chosen: its softmax is 0, and half precision holds it.
_NEVER = -10_000.0
_SMALLEST_WEIGHT = 1e-30


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write model.onnx into `folder`; the engine is this graph over the bundle's own weights.

    Raises:
        BuildError: sizes or a precision that the kernels do not take, or an onnxruntime that is too old.
        DependencyError: onnxruntime is not installed.
    """
    ort = require("onnxruntime", purpose="build an engine for it")
    capability = request.device.compute_capability
    if capability is None:
        raise BuildError(f"{request.device.name} has no compute capability, so no CUDA: use --backend onnxruntime")
    if request.max_batch != 1:
        raise BuildError(
            f"max_batch {request.max_batch}: the onnxruntime engine for a GPU runs one sequence; use --max-batch 1"
        )
    refuse_chunks(request)
    _check_kernel(str(ort.__version__))
    if progress is not None:
        progress("lowering to onnxruntime on CUDA", 0, 1)
    if holds_torch_graph(request.bundle):
        raise BuildError(
            "a user's own torch graph has engines for the CPU only: its attention is unknown; use --profile cpu"
        )
    model, config = load_canonical(request.bundle)
    check_blocks(model)
    cache = lower(model, max_seq_len=request.max_seq_len)
    (folder / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
    if progress is not None:
        progress("lowering to onnxruntime on CUDA", 1, 1)
    return {
        "backend": BACKEND,
        "backend_version": ort.__version__,
        "compute_capability": list(capability),
        "precision": f"{request.bundle.manifest['quantization']['weights']} weights, fp16 products and attention, fp32 "
        "router, norms and residual",
        "status": "ready",
        "max_batch": 1,
        "max_seq_len": request.max_seq_len,
        "cache": [entry.to_json() for entry in cache],
        "session": {
            "moe_layers": list(config.moe.layers),
            "provider": "CUDAExecutionProvider",
            **describe_load(config),
        },
    }


def trace_routes(bundle: Bundle, info: EngineInfo, tokens: Array, layers: int) -> Traced:
    """By the engine's own session on its GPU; without one, the same graph on the CPU."""
    if machine.gpus() and backend.cannot_run(info) is None:
        return trace_session(bundle, info, tokens, layers)
    on_cpu = dataclasses.replace(info, session=info.session | {"provider": CPU})
    return dataclasses.replace(trace_session(bundle, on_cpu, tokens, layers), how="its graph on the CPU")


def _check_kernel(version: str) -> None:
    """The operator's schema, which is the same in every build of a version, has what the CUDA kernel needs."""
    state = require("onnxruntime.capi.onnxruntime_pybind11_state", "gpu")
    for schema in state.get_all_operator_schema():
        if schema.name == "QMoE" and schema.domain == MS and "weights_prepacked" in schema.attributes:
            return
    raise BuildError(
        f"onnxruntime {version} lays no experts out for its CUDA kernel (QMoE has no weights_prepacked); install a "
        "newer one: pip install --upgrade 'moedge[gpu]', or build with TensorRT: leave --backend away"
    )


def check_blocks(model: ir.Model) -> None:
    """Raises BuildError where experts are not quantized in blocks that the CUDA kernel takes."""
    for call in (call for kind in ("Experts", "BiasedExperts") for call in find_calls(model, kind)):
        for value in call.inputs[3:]:
            matrix = find_matrix(value)
            if matrix.bits and matrix.block_size not in EXPERT_BLOCKS:
                raise BuildError(
                    f"experts are quantized in groups of {matrix.block_size}, and onnxruntime's CUDA kernel takes 64 "
                    "or 128: export again with --group-size 128 (or 64), or build with TensorRT: leave --backend away"
                )


def lower(model: ir.Model, *, max_seq_len: int, real: ir.DataType = ir.DataType.FLOAT16) -> list[Any]:
    """Rewrite a canonical model in place; returns its cache tensors (`CudaCache`).

    Afterwards: inputs input_ids int64 [S], rows int64 [R], length int64 [1] (P) and past.NAME; outputs logits float32
    [R, vocab], new.NAME, experts.LAYER int64 and weights.LAYER float32 [S, k]. A cache without heads is [P, width] in
    and the new rows [S, width] out; one with heads is one buffer [1, heads, capacity, width / heads] in and out. A
    load-aware gate has an input load.LAYER float32 [E].
    With `real` FLOAT the very same graph runs on the CPU, which is how its numerics are checked.
    """
    loads = take_loads(model)
    lowering = _Lowering(model, real)
    attention = CudaAttention(lowering.rewriter, real, max_seq_len)
    attention.lower()
    lowering.lower_gates()
    for kind in ("Experts", "BiasedExperts"):
        replace_each(lowering.rewriter, find_calls(model, kind), lowering.lower_experts)
    replace_each(lowering.rewriter, find_linears(model), lowering.lower_linear)
    lowering.lower_embedding()
    lowering.lower_norms()
    lowering.lower_head()
    model.graph.inputs.extend(loads)
    finish_model(model, {MS: 1})
    return attention.cache


class _Lowering:
    def __init__(self, model: ir.Model, real: ir.DataType) -> None:
        self.graph = model.graph
        self.model = model
        self.real = real
        self.rewriter = Rewriter(model)

    def half(self, x: ir.Value | None) -> ir.Value:
        """x as what a kernel takes; of a constant, once for all uses (onnxruntime folds it when it loads)."""
        assert x is not None
        return x if x.dtype == self.real else self.rewriter.op("Cast", [x], to=int(self.real))

    def scales(self, x: ir.Value | None) -> ir.Value:
        """As `half`, of scales as they are stored."""
        return self.half(as_float(self.rewriter, x) if x is not None and x.dtype == ir.DataType.UINT8 else x)

    def full(self, x: ir.Value) -> ir.Value:
        return x if self.real == ir.DataType.FLOAT else self.rewriter.op("Cast", [x], to=int(ir.DataType.FLOAT))

    def lower_gates(self) -> None:
        """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
        for kind, gate in list_gates().items():
            for call in find_calls(self.model, kind):
                layer, choices = layer_of(call), attributes_of(call)["top_k"]
                experts, weights, *state = gate.lower(self.rewriter, call.inputs, attributes_of(call))
                self.rewriter.replace(call, [experts, weights, *state])
                experts.name, weights.name = f"experts.{layer}", f"weights.{layer}"
                experts.dtype, weights.dtype = ir.DataType.INT64, ir.DataType.FLOAT
                experts.shape = weights.shape = ir.Shape(["S", choices])
                self.graph.outputs.extend([experts, weights])

    def lower_experts(self, call: ir.Node) -> list[ir.Value]:
        """`QMoE` for quantized experts; the function's own body, in float32, otherwise."""
        x, experts, weights = call.inputs[:3]
        gate_up, down, _ = find_experts(call)
        # A kernel's outputs are as wide as its inputs, which zeros widen where gate and up order them differently.
        if not gate_up.bits or gate_up.shape[2] != down.shape[1]:
            return [self.rewriter.op(call.op_type, call.inputs, domain=call.domain, **attributes_of(call))]
        assert experts is not None and weights is not None
        logits, total = self.encode_routing(experts, weights, gate_up.shape[0])
        own: dict[str, Any] = {"normalize_routing_weights": 1, "weights_prepacked": 0}
        mixed = mix_experts(self.rewriter, call, self.half(x), self.half(logits), self.scales, **own)
        return [self.rewriter.op("Mul", [self.full(mixed), total])]

    def encode_routing(self, experts: ir.Value, weights: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
        """Logits [S, E] whose softmax over the k largest is the weights' shares, and the weights' sum [S, 1].

        The kernel routes by itself (a softmax of logits, the k largest), and CUDA's ignores `router_weights`: the
        logarithm of each chosen weight gives any gate's answer on every kernel. Less the largest logarithm, so that
        half precision is finest where weights are large.
        """
        op, constant = self.rewriter.op, self.rewriter.constant
        least = constant("weight.least", np.array(_SMALLEST_WEIGHT, np.float32))
        logs = op("Log", [op("Max", [weights, least])])
        axis = self.rewriter.ints(1)
        shares = op("Sub", [logs, op("ReduceMax", [logs, axis], keepdims=1)])
        shape = op("Concat", [op("Shape", [experts], start=0, end=1), self.rewriter.ints(count)], axis=0)
        never = op("ConstantOfShape", [shape], value=ir.tensor(np.array([_NEVER], np.float32)))
        logits = op("ScatterElements", [never, experts, shares], axis=1)
        return logits, op("ReduceSum", [weights, axis], keepdims=1)

    def lower_linear(self, node: ir.Node) -> list[ir.Value]:
        """`MatMulNBits` for codes, a product in half precision otherwise; the router's stays in float32."""
        x, matrix = node.inputs[0], linear_matrix(node)
        op = self.rewriter.op
        if not matrix.bits:
            if str(matrix.data.name).endswith(".router.weight"):
                return [op("Gemm", [x, as_float(self.rewriter, matrix.data)], transB=1)]
            return [self.full(op("Gemm", [self.half(x), self.half(matrix.data)], transB=1))]
        return [self.full(multiply_codes(self.rewriter, self.half(x), matrix, self.scales(matrix.scales)))]

    def lower_embedding(self) -> None:
        """Rows of an 8-bit table by plain arithmetic: CUDA's `DequantizeLinear` takes no blocks."""
        op, ints = self.rewriter.op, self.rewriter.ints
        node = next(value for each in self.graph for value in each.outputs if value.name == "embed.output").producer()
        if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return
        if node.inputs[0].producer().inputs[0].dtype != ir.DataType.UINT8:  # type: ignore[union-attr]
            return
        block = node.attributes["block_size"].as_int()
        float32 = int(ir.DataType.FLOAT)
        codes = op("Cast", [op("Reshape", [node.inputs[0], ints(0, -1, block)])], to=float32)
        scales, points = (op("Unsqueeze", [value, ints(2)]) for value in node.inputs[1:3])
        rows = op("Mul", [op("Sub", [codes, op("Cast", [points], to=float32)]), scales])
        self.rewriter.replace(node, [op("Reshape", [rows, ints(0, -1)])])

    def lower_norms(self) -> None:
        """CUDA has no kernel of its own for `RMSNormalization`; the contrib operator of the same formula has one."""
        for node in [node for node in self.graph if node.op_type == "RMSNormalization" and node.domain == ""]:
            attributes = {"axis": -1, "epsilon": attributes_of(node).get("epsilon", 1e-5), "stash_type": 1}
            self.rewriter.replace(node, [self.rewriter.op("SimplifiedLayerNormalization", node.inputs, **attributes)])

    def lower_head(self) -> None:
        keep_asked_rows(self.rewriter)
