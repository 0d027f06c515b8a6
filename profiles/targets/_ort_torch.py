"""Target `onnxruntime` for a user's own torch graph: its gates, experts and linear layers by onnxruntime's kernels.

The rest stays as torch wrote it. There is no KV cache: a step computes the text so far anew (backend
`onnxruntime_prefix`), and logits only where they are asked for. S = tokens of the text, R = rows asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle import MODEL
from ...errors import require
from ...export.gating import list_gates
from . import BuildRequest
from ._canonical import (
    SIX_BITS,
    SIX_BITS_BEFORE,
    attributes_of,
    find_calls,
    find_linears,
    finish_model,
    gate_of,
    linear_matrix,
    load_torch_graph,
    replace_each,
)
from ._ort_attention import MS
from ._ort_products import StockProducts
from .onnxruntime import ACCURACY_LEVEL, _Lowering, has_router_weights

# Between the head's product and the logits: what works on rows whatever their number.
_BY_ROW = ("Add", "Mul", "Div", "Cast", "Tanh", "Identity")


def build_torch(request: BuildRequest, folder: Path) -> dict[str, Any]:
    """Write model.onnx into `folder`; see `Target.build`."""
    ort = require("onnxruntime", purpose="build an engine for it")
    model = load_torch_graph(request.bundle)
    fused = has_router_weights()
    lower(model, fused_experts=fused)
    (folder / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
    quantization = request.bundle.manifest["quantization"]
    return {
        "backend": "onnxruntime_prefix",
        "backend_version": ort.__version__,
        "compute_capability": None,
        "precision": f"{quantization['weights']} weights, fp32 activations",
        "status": "ready",
        "max_batch": 1,
        "max_seq_len": request.max_seq_len,
        "cache": [],
        "session": {"moe_layers": list(request.bundle.config["moe"]["layers"]), "fused_experts": fused},
    }


def lower(model: ir.Model, *, accuracy_level: int = ACCURACY_LEVEL, fused_experts: bool = True) -> None:
    """Rewrite a torch model's canonical graph in place.

    Afterwards: inputs input_ids int64 [1, S], rows int64 [R]; outputs logits float32 [R, vocab], experts.LAYER int64
    and weights.LAYER float32 [S, k].
    """
    lowering = _Lowering(model)
    rewriter = lowering.rewriter
    products = StockProducts(rewriter, accuracy_level, fused_experts)
    calls = find_calls(model, "Experts")
    chosen = [attributes_of(gate_of(call.inputs[1]))["top_k"] for call in calls]
    for kind, gate in list_gates().items():
        for call in find_calls(model, kind):
            rewriter.replace(call, list(gate.lower(rewriter, call.inputs, attributes_of(call))))
    for layer, (call, top_k) in enumerate(zip(calls, chosen, strict=True)):
        _give_routes(lowering, call, layer, top_k)
    replace_each(rewriter, calls, products.lower_experts)
    replace_each(rewriter, [node for node in find_linears(model) if _is_coded(node)], products.lower_linear)
    _pick_rows(lowering)
    finish_model(model, {MS: 1})


def _is_coded(node: ir.Node) -> bool:
    """Whether the transposed matrix is stored as codes; a user's graph also multiplies by transposed activations."""
    transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
    source = transpose.inputs[0].producer() if transpose is not None and transpose.inputs[0] is not None else None
    if source is None or source.op_type != "DequantizeLinear" or source.inputs[0] is None:
        return False
    codes = source.inputs[0].producer()
    stored = source.inputs[0].is_initializer() or (codes is not None and codes.op_type in (SIX_BITS, SIX_BITS_BEFORE))
    return stored and bool(linear_matrix(node).bits)


def _give_routes(lowering: _Lowering, call: ir.Node, layer: int, top_k: int) -> None:
    """The experts and weights of a call become outputs of the graph."""
    kinds = {"experts": ir.DataType.INT64, "weights": ir.DataType.FLOAT}
    for value, (name, dtype) in zip(call.inputs[1:3], kinds.items(), strict=True):
        assert value is not None
        value.shape = ir.Shape(["S", top_k])
        route = lowering.rewriter.op("Identity", [value], name=f"{name}.{layer}")
        route.dtype, route.shape = dtype, value.shape
        lowering.graph.outputs.append(route)
    lowering.rewriter.insert_before(call)


def _pick_rows(lowering: _Lowering) -> None:
    """The head runs for the rows that are asked for; where it is not found, all logits are made and rows picked."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    rows = ir.val("rows", ir.DataType.INT64, ["R"])
    lowering.graph.inputs.append(rows)
    logits = lowering.graph.outputs[0]
    head = _find_head(logits)
    if head is not None:
        head.replace_input_with(0, op("Gather", [head.inputs[0], rows], axis=1))
        lowering.rewriter.insert_before(head)
        picked = logits
    else:
        picked = op("Gather", [logits, rows], axis=1)
    assert logits.shape is not None and logits.name is not None
    vocab = logits.shape[2]
    logits.name = f"{logits.name}.batch"
    flat = op("Reshape", [picked, ints(-1, int(vocab))], name="logits")  # type: ignore[arg-type]
    flat.dtype, flat.shape = ir.DataType.FLOAT, ir.Shape(["R", vocab])
    logits.shape = None
    for node in lowering.rewriter._take():
        lowering.graph.append(node)
    lowering.graph.outputs[0] = flat


def _find_head(logits: ir.Value) -> ir.Node | None:
    """The product with the head's matrix, if only elementwise ops lie between it and the logits."""
    node = logits.producer()
    while node is not None and node.op_type in _BY_ROW:
        computed = [value for value in node.inputs if value is not None and value.producer() is not None]
        node = computed[0].producer() if len(computed) == 1 else None
    if node is None or node.op_type not in ("MatMul", "MatMulNBits") or len(node.outputs[0].uses()) > 1:
        return None
    x = node.inputs[0]
    weights = node.inputs[1]
    of_matrix = weights is not None and (weights.is_initializer() or weights.shape is None or len(weights.shape) == 2)
    return node if x is not None and x.shape is not None and len(x.shape) == 3 and of_matrix else None
