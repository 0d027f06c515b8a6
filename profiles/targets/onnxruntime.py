"""Target `onnxruntime`: the canonical graph lowered to what onnxruntime's CPU kernels do fast.

Sequences are single (batch 1) and flat: S = new tokens, P = tokens in the cache, n = heads, r = kv_lora_rank,
w = r + rope. The weights stay in the bundle's weights.bin; the lowered graph points at the same offsets.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    linear_matrix,
    load_canonical,
    replace_each,
)

MS = "com.microsoft"
_GROUPED = ("GroupedAttention", "SinkAttention")
# int8 activations inside the product: three times the rate of the default for one token (docs/decisions.md).
ACCURACY_LEVEL = 4


def build(request: BuildRequest, folder: Path, progress: Progress | None) -> dict[str, Any]:
    """Write model.onnx into `folder`; the engine is this graph over the bundle's own weights."""
    ort = require("onnxruntime", purpose="build an engine for it")
    if request.max_batch != 1:
        raise BuildError(f"max_batch {request.max_batch}: the onnxruntime engine runs one sequence; use --max-batch 1")
    if progress is not None:
        progress("lowering to onnxruntime", 0, 1)
    model, config = load_canonical(request.bundle)
    fused = has_router_weights()
    cache = lower(model, accuracy_level=ACCURACY_LEVEL, fused_experts=fused, max_seq_len=request.max_seq_len)
    (folder / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
    if progress is not None:
        progress("lowering to onnxruntime", 1, 1)
    quantization = request.bundle.manifest["quantization"]
    return {
        "backend": "onnxruntime",
        "backend_version": ort.__version__,
        "compute_capability": None,
        "precision": f"{quantization['weights']} weights, fp32 activations",
        "status": "ready",
        "max_batch": 1,
        "max_seq_len": request.max_seq_len,
        "cache": [entry.to_json() for entry in cache],
        "session": {"moe_layers": list(config.moe.layers), "fused_experts": fused},
    }


@dataclass(frozen=True)
class CacheEntry:
    """A tensor of the KV cache: a row of `width` elements a token.

    Without `heads` the graph takes the past rows as a view and gives the new ones, to be put behind. With `heads` it
    takes and gives the whole buffer [1, heads, capacity, width / heads], updated in place.
    """

    name: str
    width: int
    heads: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "width": self.width, "dtype": "float32", "heads": self.heads}


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
) -> list[CacheEntry]:
    """Rewrite a canonical model in place; returns its cache tensors. `max_seq_len`: wider windows are no windows.

    Afterwards: inputs input_ids int64 [S], rows int64 [R], past.NAME float32 [P, width]; outputs logits float32
    [R, vocab], new.NAME float32 [S, width], experts.LAYER int64 and weights.LAYER float32 [S, k]. A cache by heads has
    past.NAME and new.NAME float32 [1, heads, capacity, width / heads], one buffer, and an input length int64 [1]: P.
    """
    lowering = _Lowering(model, accuracy_level, fused_experts, max_seq_len)
    lowering.lower_positions()
    for call in find_calls(model, "LatentAttention"):
        lowering.lower_latent_attention(call)
    for kind in _GROUPED:
        for call in find_calls(model, kind):
            lowering.lower_grouped_attention(call)
    lowering.lower_gates()
    for kind in ("Experts", "BiasedExperts"):
        replace_each(lowering.rewriter, find_calls(model, kind), lowering.lower_experts)
    replace_each(lowering.rewriter, find_linears(model), lowering.lower_linear)
    lowering.lower_head()
    finish_model(model, {MS: 1})
    return lowering.cache


class _Lowering:
    def __init__(
        self, model: ir.Model, accuracy_level: int, fused_experts: bool, max_seq_len: int | None
    ) -> None:
        self.model = model
        self.graph = model.graph
        self.rewriter = Rewriter(model)
        self.accuracy_level = accuracy_level
        self.fused_experts = fused_experts
        self.max_seq_len = max_seq_len
        self.windows: dict[int, ir.Value] = {}
        self.cache: list[CacheEntry] = []
        self.mask: ir.Value | None = None
        self.total: ir.Value | None = None
        self.split_sizes: ir.Value | None = None

    def lower_positions(self) -> None:
        """Positions start behind the cache; causal mask and split of the scores are made once for all layers."""
        op, ints = self.rewriter.op, self.rewriter.ints
        tokens = ir.val("input_ids", ir.DataType.INT64, ["S"])
        old = self.graph.inputs[0]
        old.replace_all_uses_with(tokens)
        self.graph.inputs[0] = tokens
        (call,) = find_calls(self.model, "Positions")
        latent = find_calls(self.model, "LatentAttention")
        if latent:
            length = op("Shape", [self._past(latent[0])], start=0, end=1)
        else:
            length = ir.val("length", ir.DataType.INT64, [1])
            self.graph.inputs.append(length)
        new = op("Shape", [tokens])
        zero = self.rewriter.constant("int.0", np.array(0, np.int64))
        one = self.rewriter.constant("int.1", np.array(1, np.int64))
        steps = op("Range", [zero, op("Squeeze", [new, ints(0)]), one])
        positions = op("Unsqueeze", [op("Add", [steps, length]), ints(0)])
        if latent:
            self._make_mask(steps, length, new)
        else:
            total = op("Cast", [op("Add", [length, new])], to=int(ir.DataType.INT32))
            self.total = total
            self.last = op("Sub", [total, self.rewriter.constant("int32.1", np.array([1], np.int32))])
            self._make_windows(positions, zero, op("Squeeze", [op("Add", [length, new]), ints(0)]), one)
        self.rewriter.replace(call, [positions])

    def _make_windows(self, positions: ir.Value, zero: ir.Value, total: ir.Value, one: ir.Value) -> None:
        """For each sliding window what scores get added, [1, 1, S, P + S]: minus infinity behind the window.

        `local_window_size` alone spares the work and not the token just behind it: onnxruntime 1.23 attends to one more
        than later versions do.
        """
        op, ints = self.rewriter.op, self.rewriter.ints
        calls = [call for kind in _GROUPED for call in find_calls(self.model, kind)]
        windows = {attributes_of(call)["window"] for call in calls} - {0}
        for window in sorted(windows):
            if self.max_seq_len is not None and window >= self.max_seq_len:
                continue
            distance = op("Sub", [op("Unsqueeze", [positions, ints(1, 3)]), op("Range", [zero, total, one])])
            open_, closed = (self.rewriter.constant(f"float.{x}", np.array(x, np.float32)) for x in (0, -np.inf))
            limit = self.rewriter.constant(f"window.{window}", np.array(window, np.int64))
            behind = op("GreaterOrEqual", [distance, limit])
            self.windows[window] = op("Where", [behind, closed, open_], name=f"window_mask.{window}")

    def _make_mask(self, steps: ir.Value, length: ir.Value, new: ir.Value) -> None:
        """Causal mask [S, S] of the new tokens, and how scores split into past and new."""
        op, ints = self.rewriter.op, self.rewriter.ints
        ahead = op("Less", [op("Unsqueeze", [steps, ints(1)]), op("Unsqueeze", [steps, ints(0)])])
        allowed = self.rewriter.constant("float.0", np.array(0, np.float32))
        never = self.rewriter.constant("float.never", np.array(-np.inf, np.float32))
        self.mask = op("Where", [ahead, never, allowed], name="causal_mask")
        self.split_sizes = op("Concat", [length, new], axis=0, name="past_and_new")

    def _past(self, call: ir.Node) -> ir.Value:
        """The cache input [P, w] of an attention call, made when first asked for."""
        layer = _layer_of(call)
        attributes = attributes_of(call)
        width = attributes["kv_lora_rank"] + attributes["qk_rope_head_dim"]
        name = f"latent.{layer}"
        for value in self.graph.inputs:
            if value.name == f"past.{name}":
                return value
        past = ir.val(f"past.{name}", ir.DataType.FLOAT, ["P", width])
        self.graph.inputs.append(past)
        self.cache.append(CacheEntry(name, width))
        return past

    def lower_grouped_attention(self, call: ir.Node) -> None:
        """`GroupQueryAttention`, its cache in place: the buffer goes in as the past and comes out as the present."""
        op, ints = self.rewriter.op, self.rewriter.ints
        q, k, v, cos, sin, *sinks = call.inputs
        a, layer = attributes_of(call), _layer_of(call)
        heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
        rows = []
        for value, count in ((q, heads), (k, groups), (v, groups)):
            row = op("Reshape", [value, ints(1, -1, count * dim)])
            if value is not v:
                row = op("RotaryEmbedding", [row, cos, sin], interleaved=a["interleaved"], num_heads=count)
            rows.append(self._widen_heads(row, count, dim))
        room = _kernel_head_size(dim)
        pasts = []
        for name in (f"key.{layer}", f"value.{layer}"):
            pasts.append(ir.val(f"past.{name}", ir.DataType.FLOAT, [1, groups, "capacity", room]))
            self.cache.append(CacheEntry(name, groups * room, groups))
        self.graph.inputs.extend(pasts)
        total = op("Squeeze", [self.total, ints(0)])
        rotation = [None] * 3  # its own, which takes a table of every position
        attended, *presents = self.rewriter.ops(
            "GroupQueryAttention",
            [*rows, *pasts, self.last, total, *rotation, self.windows.get(a["window"]), *sinks],
            3,
            domain=MS,
            num_heads=heads,
            kv_num_heads=groups,
            scale=float(a["scale"]),
            local_window_size=a["window"] if a["window"] in self.windows else -1,
        )
        for present, name in zip(presents, (f"new.key.{layer}", f"new.value.{layer}"), strict=True):
            present.name, present.dtype = name, ir.DataType.FLOAT
            present.shape = ir.Shape([1, groups, "capacity", room])
        self.graph.outputs.extend(presents)
        if room != dim:
            by_head = op("Reshape", [attended, ints(1, -1, heads, room)])
            attended = op("Slice", [by_head, ints(0), ints(dim), ints(3)])
        self.rewriter.replace(call, [op("Reshape", [attended, ints(-1, heads * dim)])])

    def _widen_heads(self, row: ir.Value, count: int, dim: int) -> ir.Value:
        """[1, S, count * dim] with zeros behind each head, up to the size the kernel takes; they change no product."""
        op, ints, room = self.rewriter.op, self.rewriter.ints, _kernel_head_size(dim)
        if room == dim:
            return row
        by_head = op("Reshape", [row, ints(1, -1, count, dim)])
        padded = op("Pad", [by_head, ints(0, room - dim), None, ints(3)])
        return op("Reshape", [padded, ints(1, -1, count * room)])

    def lower_latent_attention(self, call: ir.Node) -> None:
        """Absorbed form (arXiv:2405.04434, section 2.1.2): queries go to the latent's space, the cache stays.

        Scores of past and new tokens are computed apart and only the scores are joined, so that the past stays a view.
        """
        op, ops, ints = self.rewriter.op, self.rewriter.ops, self.rewriter.ints
        q, latent, k_rope, cos, sin, k_up, v_up = call.inputs
        a = attributes_of(call)
        heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        past = self._past(call)
        rotary = {"interleaved": a["interleaved"]}
        rows = op("Reshape", [q, ints(1, -1, heads, nope + rope)])
        by_head = op("Transpose", [rows], perm=[0, 2, 1, 3])
        q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
        q_rope = op("RotaryEmbedding", [q_rope, cos, sin], **rotary)
        query = op("Concat", [op("MatMul", [q_nope, k_up]), q_rope], axis=3)
        query = op("Reshape", [query, ints(heads, -1, rank + rope)])
        k_heads = op("Reshape", [k_rope, ints(1, 1, -1, rope)])
        k_rope = op("Reshape", [op("RotaryEmbedding", [k_heads, cos, sin], **rotary), ints(-1, rope)])
        new = op("Concat", [latent, k_rope], axis=1, name=f"new.latent.{_layer_of(call)}")
        new.dtype, new.shape = ir.DataType.FLOAT, ir.Shape(["S", rank + rope])
        self.graph.outputs.append(new)
        product: dict[str, Any] = {"domain": MS, "transB": 1, "alpha": float(a["scale"])}
        past_scores = op("FusedMatMul", [query, past], **product)
        new_scores = op("Add", [op("FusedMatMul", [query, new], **product), self.mask])
        scores = op("Softmax", [op("Concat", [past_scores, new_scores], axis=2)], axis=2)
        past_share, new_share = ops("Split", [scores, self.split_sizes], 2, axis=2)
        mixed = op("Add", [op("MatMul", [past_share, past]), op("MatMul", [new_share, new])])
        mixed = op("Slice", [mixed, ints(0), ints(rank), ints(2)])
        values = op("FusedMatMul", [mixed, v_up], domain=MS, transB=1)
        values = op("Transpose", [values], perm=[1, 0, 2])
        y = op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])
        self.rewriter.replace(call, [y])

    def lower_gates(self) -> None:
        """Each gate in as few nodes as its attributes need; its choices become outputs of the graph."""
        for kind, gate in list_gates().items():
            for call in find_calls(self.model, kind):
                layer = _layer_of(call)
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
        if not gate_up.bits or not self.fused_experts:
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


def _kernel_head_size(dim: int) -> int:
    """`GroupQueryAttention` takes multiples of 8."""
    return -(-dim // 8) * 8


def _layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
