"""Target `onnxruntime`: the canonical graph lowered to what onnxruntime's CPU kernels do fast.

Sequences are single (batch 1) and flat: S = new tokens, P = tokens in the cache, n = heads, r = kv_lora_rank,
w = r + rope. The weights stay in the bundle's weights.bin; the lowered graph points at the same offsets.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ...bundle import MODEL, Progress
from ...errors import BuildError, require
from ...export.gating import list_gates
from ...runtime import kernels
from ..shape import STOCK_KV_CACHE, default_kv_cache
from . import BuildRequest
from ._canonical import (
    Array,
    Rewriter,
    attributes_of,
    check_one_sequence,
    describe_load,
    find_calls,
    find_linears,
    finish_model,
    holds_torch_graph,
    is_load_aware,
    keep_asked_rows,
    load_canonical,
    refuse_chunks,
    replace_each,
    take_loads,
)
from ._ort_attention import MS, AttentionLowering, layer_of
from ._ort_calibration import find_scales
from ._ort_kv import CacheEntry
from ._ort_own_attention import OwnAttentionLowering
from ._ort_products import OwnProducts, StockProducts
from ._ort_rows import split_rows
from ._ort_steps import fuse_steps, lower_router
from ._routes import trace_session

ON_GPU = "onnxruntime_cuda"  # the target in this one's place for a device that is a GPU
# int8 activations inside the product: three times the rate of the default for one token (docs/decisions.md).
ACCURACY_LEVEL = 4
LANES_MODEL = "model.lanes.onnx"
# Sequences stepped together unless more are asked for: the graph is small, and whoever serves has it at once.
LANES = 8
OWN_LANES = 32  # with our own ops, where a lane more costs no node
# Of these a token's result depends on the others in the run: onnxruntime's products round by the number of rows, and
# some angles follow the longest position.
_SEE_THE_RUN = {"MatMul", "Gemm", "FusedMatMul", "MatMulNBits", "QMoE", "Einsum"}
_SEE_THE_RUN |= {"DynamicRotaryAngles", "LongRotaryAngles"}

TAKES_TORCH_GRAPHS = True  # of a user's own model, whose config says nothing of its layers

trace_routes = trace_session


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write the lowered graph into `folder`; the engine is this graph over the bundle's own weights.

    Beside it lies one with the ops of runtime/kernels; whoever loads the engine takes what it can run.
    """
    ort = require("onnxruntime", purpose="build an engine for it")
    if holds_torch_graph(request.bundle):
        from ._ort_torch import build_torch

        if request.max_batch != 1:
            raise BuildError(f"max_batch {request.max_batch}: a torch graph runs one sequence; use --max-batch 1")
        return build_torch(request, folder)
    refuse_chunks(request)
    from ._genai import write_genai

    fused, lanes, scales = has_router_weights(), count_lanes(request), _find_scales(request, progress)
    own_kind = request.kv_cache or default_kv_cache(request.bundle.manifest)
    kinds = {True: own_kind, False: request.kv_cache or STOCK_KV_CACHE}
    caches: dict[bool, list[CacheEntry]] = {}
    graphs = {MODEL: 1, **({LANES_MODEL: lanes} if lanes > 1 else {})}
    wanted = [(name, count, False) for name, count in graphs.items()]
    wanted += [(name, max(count, OWN_LANES) if count > 1 else 1, True) for name, count in graphs.items()]
    for place, (name, count, ours) in enumerate(wanted):
        if progress is not None:
            progress("lowering to onnxruntime", place, len(wanted))
        model, config = load_canonical(request.bundle)
        products: dict[str, Any] = {"accuracy_level": ACCURACY_LEVEL, "fused_experts": fused, "own_kernels": ours}
        sizes: dict[str, Any] = {"max_seq_len": request.max_seq_len, "lanes": count}
        caches[ours] = lower(model, kv_cache=kinds[ours], scales=scales, **products, **sizes)
        (folder / (kernels.own_name(name) if ours else name)).write_bytes(ir.to_proto(model).SerializeToString())
    write_genai(request, folder, fused_experts=fused)
    if progress is not None:
        progress("lowering to onnxruntime", len(wanted), len(wanted))
    return {
        "backend": "onnxruntime",
        "backend_version": ort.__version__,
        "compute_capability": None,
        "status": "ready",
        "max_batch": request.max_batch,
        "max_seq_len": request.max_seq_len,
        **_describe_cache(request, kinds[True], caches[True]),
        # Sessions take these where our own kernels are not at hand.
        **({"stock": _describe_cache(request, kinds[False], caches[False])} if caches[False] != caches[True] else {}),
        "session": {
            "moe_layers": list(config.moe.layers),
            "fused_experts": fused,
            "lanes": lanes,
            "own_kernels": True,
            **describe_load(config),
        },
    }


def _describe_cache(request: BuildRequest, kind: str, cache: list[CacheEntry]) -> dict[str, Any]:
    weights = request.bundle.manifest["quantization"]["weights"]
    return {
        "precision": f"{weights} weights, fp32 activations, {kind} KV cache",
        "kv_cache": kind,
        "cache_bytes_per_token": sum(entry.bytes for entry in cache),
        "cache": [entry.to_json() for entry in cache],
    }


def _find_scales(request: BuildRequest, progress: Progress | None) -> dict[str, Array] | None:
    """What onnxruntime's own int8 cache of keys and values is scaled by; None where nobody asks for it."""
    if request.kv_cache != "int8" or request.bundle.config["attention"]["kind"] != "gqa":
        return None
    if progress is not None:
        progress("scales of the KV cache", 0, 1)
    model, config = load_canonical(request.bundle)
    cache = lower(model, fused_experts=has_router_weights(), max_seq_len=request.max_seq_len)
    return find_scales(request, model, config, cache)


def count_lanes(request: BuildRequest) -> int:
    """Sequences that the second stock graph steps together; 1 where there is none."""
    if is_load_aware(request.bundle):
        check_one_sequence(request.max_batch)
        return 1
    if (request.bundle.config.get("rope") or {}).get("kind", "fixed") != "fixed":
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
    own_kernels: bool = False,
    max_seq_len: int | None = None,
    lanes: int = 1,
    kv_cache: str = "fp32",
    scales: Mapping[str, Array] | None = None,
) -> list[CacheEntry]:
    """Rewrite a canonical model in place; returns its cache tensors. `max_seq_len`: wider windows are no windows.

    Afterwards: inputs input_ids int64 [S], rows int64 [R], cache.NAME float32 [T, width] (a view, the run's own rows at
    its end); outputs logits float32 [R, vocab], new.NAME float32 [S, width] (to be bound to that end), experts.LAYER
    int64 and weights.LAYER float32 [S, k]. A cache by heads has past.NAME and new.NAME float32
    [1, heads, capacity, width / heads], one buffer, and an input length int64 [1], the rows before the run.
    `kv_cache` gives the caches another type (_ort_kv.py); stock int8 keys and values have `scales`, found before.
    With more than one lane each has tensors of its own (cache.NAME.LANE ...), and `Lanes` says what else goes in.
    A load-aware gate has an input load.LAYER float32 [E]. `own_kernels`: every cache is an input past.NAME, whole, that
    the graph changes (_ort_own_attention.py), and nothing of it comes out.
    """
    loads = take_loads(model)
    lowering = _Lowering(model)
    form = OwnAttentionLowering if own_kernels else AttentionLowering
    attention = form(lowering.rewriter, max_seq_len, lanes, kv_cache, scales)
    attention.lower()
    lowering.lower_gates(own_kernels)
    products = (OwnProducts if own_kernels else StockProducts)(lowering.rewriter, accuracy_level, fused_experts)
    for kind in ("Experts", "BiasedExperts"):
        replace_each(lowering.rewriter, find_calls(model, kind), products.lower_experts)
    replace_each(lowering.rewriter, find_linears(model), products.lower_linear)
    if lanes > 1:
        split_rows(lowering.rewriter, attention.lanes.pieces)
    lowering.lower_head()
    if own_kernels:
        fuse_steps(lowering.rewriter)
    model.graph.inputs.extend(loads)
    # This kernel takes rows in pairs, and rounds the last of an odd number otherwise: sessions are told.
    if any(node.op_type == "MatMulNBits" for node in model.graph):
        model.metadata_props["moedge.pairs"] = "1"
    finish_model(model, {MS: 1, **({kernels.DOMAIN: 1} if own_kernels else {})})
    # A load-aware gate has room for a run's tokens, however many they are.
    if own_kernels and not loads and not any(node.op_type in _SEE_THE_RUN for node in model.graph.all_nodes()):
        model.metadata_props[kernels.CUTS_ALIKE] = "1"
    return attention.cache


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.graph = model.graph
        self.rewriter = Rewriter(model)

    def lower_gates(self, own_kernels: bool = False) -> None:
        """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
        for kind, gate in list_gates().items():
            for call in find_calls(self.model, kind):
                layer = layer_of(call)
                routed = lower_router(self.rewriter, call) if own_kernels else None
                experts, weights, *state = routed or gate.lower(self.rewriter, call.inputs, attributes_of(call))
                choices = attributes_of(call)["top_k"]
                experts.dtype, experts.shape = ir.DataType.INT64, ir.Shape(["S", choices])
                weights.dtype, weights.shape = ir.DataType.FLOAT, ir.Shape(["S", choices])
                self.rewriter.replace(call, [experts, weights, *state])
                # After the replacement, which hands on the names of what it replaces.
                experts.name, weights.name = f"experts.{layer}", f"weights.{layer}"
                self.graph.outputs.extend([experts, weights])

    def lower_head(self) -> None:
        keep_asked_rows(self.rewriter)
