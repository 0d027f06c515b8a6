"""What onnxruntime-genai needs beside an onnxruntime engine: a graph with its names and shapes, and genai_config.json.

The graph is lowered from the canonical one as the engine's own is, over the same weights.bin, but takes a batch, a mask
and a key and a value cache for each layer, which genai allocates. B = batch, S = new tokens, P = tokens in the cache,
C = room of the cache, n = heads, r = kv_lora_rank, w = r + rope.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...bundle import Bundle, read_json, write_json
from ...export.config import MoEConfig
from . import BuildRequest
from ._canonical import attributes_of, find_calls, find_linears, finish_model, load_canonical, replace_each, values_of
from ._ort_attention import MS, kernel_head_size, layer_of
from ._ort_products import StockProducts
from .onnxruntime import ACCURACY_LEVEL, _Lowering

GRAPH, CONFIG = "genai.onnx", "genai_config.json"
_PAST, _PRESENT = "past_key_values.{}.{}", "present.{}.{}"
_GROUPED = ("GroupedAttention", "SinkAttention")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# From an engine's folder to its bundle's; genai resolves it against its config's folder.
_WEIGHTS_FOLDER = "../.."
_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def write_genai(request: BuildRequest, folder: Path, *, fused_experts: bool) -> None:
    """Write genai.onnx, genai_config.json and the tokenizer's files into an engine's `folder`.

    Nothing for gates that carry a load from step to step: genai has caches of keys and values alone.
    """
    model, config = load_canonical(request.bundle)
    if find_calls(model, "LoadAwareGate"):
        return
    head_size, kv_heads = lower(model, fused_experts=fused_experts, max_seq_len=request.max_seq_len)
    (folder / GRAPH).write_bytes(ir.to_proto(model).SerializeToString())
    write_json(folder / CONFIG, _make_config(request.bundle, config, head_size, kv_heads, request.max_seq_len))
    for name in _TOKENIZER_FILES:
        if request.bundle.file(name).is_file():
            shutil.copyfile(request.bundle.file(name), folder / name)


def lower(
    model: ir.Model,
    *,
    accuracy_level: int = ACCURACY_LEVEL,
    fused_experts: bool = True,
    max_seq_len: int | None = None,
) -> tuple[int, int]:
    """Rewrite a canonical model in place; returns the cache's head size and number of heads.

    Afterwards: inputs input_ids, position_ids int64 [B, S], attention_mask int64 [B, P + S], past_key_values.LAYER.key
    and .value float32 [B, heads, C, head size]; outputs logits float32 [B, 1, vocab], after each row's last token, and
    present.LAYER.key and .value, which may be the same buffers.
    """
    lowering = _Lowering(model)
    products = StockProducts(lowering.rewriter, accuracy_level, fused_experts)
    attention = _Attention(lowering, max_seq_len)
    attention.lower()
    lowering.lower_gates()
    for kind in ("Experts", "BiasedExperts"):
        replace_each(lowering.rewriter, find_calls(model, kind), products.lower_experts)
    replace_each(lowering.rewriter, find_linears(model), products.lower_linear)
    attention.lower_head()
    model.graph.outputs[:] = [model.graph.outputs[0], *attention.presents]  # genai has no use for the routes
    finish_model(model, {MS: 1})
    return attention.head_size, attention.kv_heads


class _Attention:
    """Positions, masks and caches as genai gives them; every layer is a `GroupQueryAttention`."""

    def __init__(self, lowering: _Lowering, max_seq_len: int | None) -> None:
        self.rewriter, self.model, self.graph = lowering.rewriter, lowering.model, lowering.graph
        self.max_seq_len = max_seq_len
        self.head_size = self.kv_heads = 0
        self.presents: list[ir.Value] = []
        self.windows: dict[int, ir.Value] = {}

    def lower(self) -> None:
        """All layers; the graph's inputs become genai's."""
        op, ints = self.rewriter.op, self.rewriter.ints
        (tokens,) = self.graph.inputs
        positions = ir.val("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.graph.inputs.extend([positions, mask])
        self.batch_sequence = op("Shape", [tokens], name="batch_sequence")
        last = op("Sub", [op("ReduceSum", [mask, ints(1)], keepdims=0), ints(1)], name="last_position")
        self.last = last
        self.seqlens = op("Cast", [last], to=int(ir.DataType.INT32))
        total = op("Squeeze", [op("Shape", [mask], start=1, end=2), ints(0)])
        self.total = op("Cast", [total], to=int(ir.DataType.INT32))
        self._make_windows(positions, total)
        (call,) = find_calls(self.model, "Positions")
        self.rewriter.replace(call, [op("Identity", [positions])])
        for call in find_calls(self.model, "LatentAttention"):
            self._lower_latent(call)
        for kind in _GROUPED:
            for call in find_calls(self.model, kind):
                self._lower_grouped(call)

    def lower_head(self) -> None:
        """Logits after each row's last token alone: genai pads on the right, and samples from no other."""
        op, ints = self.rewriter.op, self.rewriter.ints
        norm = next(iter(self.graph.initializers["final_norm.weight"].uses())).node
        batch = op("Squeeze", [op("Slice", [self.batch_sequence, ints(0), ints(1)]), ints(0)])
        sequence = op("Slice", [self.batch_sequence, ints(1), ints(2)])
        zero, one = (self.rewriter.constant(f"int.{value}", np.array(value, np.int64)) for value in (0, 1))
        starts = op("Mul", [op("Range", [zero, batch, one]), sequence])
        inside = op("Min", [self.last, op("Sub", [sequence, ints(1)])])  # a token behind a cache is the only one
        norm.replace_input_with(0, op("Gather", [norm.inputs[0], op("Add", [starts, inside])], axis=0))
        self.rewriter.insert_before(norm)
        reshape = self.graph.outputs[0].producer()
        assert reshape is not None and reshape.op_type == "Reshape"
        vocab = self.graph.outputs[0].shape[2]  # type: ignore[index]
        logits = op("Unsqueeze", [reshape.inputs[0], ints(1)])
        self.rewriter.replace(reshape, [logits])
        logits.dtype, logits.shape = ir.DataType.FLOAT, ir.Shape(["batch", 1, vocab])

    def _make_windows(self, positions: ir.Value, total: ir.Value) -> None:
        """For each sliding window what scores get added, [B, 1, S, P + S]: minus infinity behind the window."""
        op, ints = self.rewriter.op, self.rewriter.ints
        zero, one = (self.rewriter.constant(f"int.{value}", np.array(value, np.int64)) for value in (0, 1))
        calls = [call for kind in _GROUPED for call in find_calls(self.model, kind)]
        for window in sorted({attributes_of(call)["window"] for call in calls} - {0}):
            if self.max_seq_len is not None and window >= self.max_seq_len:
                continue
            distance = op("Sub", [op("Unsqueeze", [positions, ints(1, 3)]), op("Range", [zero, total, one])])
            open_, closed = (self.rewriter.constant(f"float.{x}", np.array(x, np.float32)) for x in (0, -np.inf))
            limit = self.rewriter.constant(f"window.{window}", np.array(window, np.int64))
            behind = op("GreaterOrEqual", [distance, limit])
            self.windows[window] = op("Where", [behind, closed, open_], name=f"window_mask.{window}")

    def _rows(self, value: ir.Value | None, *sizes: int) -> ir.Value:
        """[T, ...] as [B, S, sizes]."""
        shape = self.rewriter.op("Concat", [self.batch_sequence, self.rewriter.ints(*sizes)], axis=0)
        return self.rewriter.op("Reshape", [value, shape])

    def _lower_grouped(self, call: ir.Node) -> None:
        op, ints = self.rewriter.op, self.rewriter.ints
        q, k, v, cos, sin, *sinks = call.inputs
        a = attributes_of(call)
        heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
        room = kernel_head_size(dim)
        rows = []
        for value, count in ((q, heads), (k, groups), (v, groups)):
            row = self._rows(value, count * dim)
            if value is not v:
                row = op("RotaryEmbedding", [row, cos, sin], interleaved=a["interleaved"], num_heads=count)
            if room != dim:
                by_head = op("Pad", [self._rows(row, count, dim), ints(0, room - dim), None, ints(3)])
                row = self._rows(by_head, count * room)
            rows.append(row)
        attended = self._attend(call, rows, heads, groups, room, self.windows.get(a["window"]), sinks)
        if room != dim:
            attended = op("Slice", [self._rows(attended, heads, room), ints(0), ints(dim), ints(3)])
        self.rewriter.replace(call, [op("Reshape", [attended, ints(-1, heads * dim)])])

    def _lower_latent(self, call: ir.Node) -> None:
        """Absorbed form (arXiv:2405.04434, section 2.1.2): one head of keys [latent; rotated key], which are the values
        too. genai keeps both, so the cache takes twice the memory of the engine's own."""
        op, ops, ints = self.rewriter.op, self.rewriter.ops, self.rewriter.ints
        q, latent, k_rope, cos, sin = call.inputs[:5]
        k_up, v_up = (values_of(self.rewriter, value) for value in call.inputs[5:])
        a = attributes_of(call)
        heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        width, room = rank + rope, kernel_head_size(rank + rope)
        by_head = op("Transpose", [self._rows(q, heads, nope + rope)], perm=[0, 2, 1, 3])
        q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
        q_rope = op("RotaryEmbedding", [q_rope, cos, sin], interleaved=a["interleaved"])
        query = op("Concat", [op("MatMul", [q_nope, k_up]), q_rope], axis=3)
        query = op("Transpose", [query], perm=[0, 2, 1, 3])
        k_rope = op(
            "RotaryEmbedding", [self._rows(k_rope, rope), cos, sin], interleaved=a["interleaved"], num_heads=1
        )
        key = op("Concat", [self._rows(latent, rank), k_rope], axis=2)
        if room != width:
            query = op("Pad", [query, ints(0, room - width), None, ints(3)])
            key = op("Pad", [key, ints(0, room - width), None, ints(2)])
        rows = [self._rows(query, heads * room), key, key]
        mixed = self._attend(call, rows, heads, 1, room, None, [])
        mixed = op("Slice", [op("Reshape", [mixed, ints(-1, heads, room)]), ints(0), ints(rank), ints(2)])
        values = op("FusedMatMul", [op("Transpose", [mixed], perm=[1, 0, 2]), v_up], domain=MS, transB=1)
        values = op("Transpose", [values], perm=[1, 0, 2])
        self.rewriter.replace(call, [op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])])

    def _attend(
        self,
        call: ir.Node,
        rows: list[ir.Value],
        heads: int,
        groups: int,
        room: int,
        bias: ir.Value | None,
        sinks: list[ir.Value | None],
    ) -> ir.Value:
        """rows: queries [B, S, heads * room], keys and values [B, S, groups * room] -> [B, S, heads * room]."""
        layer, a = layer_of(call), attributes_of(call)
        self.head_size, self.kv_heads = room, groups
        shape = ir.Shape(["batch", groups, "capacity", room])
        pasts = [ir.val(_PAST.format(layer, part), ir.DataType.FLOAT, shape) for part in ("key", "value")]
        self.graph.inputs.extend(pasts)
        rotation = [None] * 3  # its own, which takes a table of every position
        attended, *presents = self.rewriter.ops(
            "GroupQueryAttention",
            [*rows, *pasts, self.seqlens, self.total, *rotation, bias, *sinks],
            3,
            domain=MS,
            num_heads=heads,
            kv_num_heads=groups,
            scale=float(a["scale"]),
            local_window_size=a["window"] if bias is not None else -1,
        )
        for present, part in zip(presents, ("key", "value"), strict=True):
            present.name, present.dtype = _PRESENT.format(layer, part), ir.DataType.FLOAT
            present.shape = shape
        self.presents += presents
        return attended


def _make_config(
    bundle: Bundle, config: MoEConfig, head_size: int, kv_heads: int, max_seq_len: int
) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):  # the second has the last word
        if bundle.file(name).is_file():
            given |= {key: value for key, value in read_json(bundle.file(name)).items() if value is not None}
    ends = given.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    model: dict[str, Any] = {
        "type": "decoder",  # genai's word for any model of this interface
        "context_length": max_seq_len,
        "vocab_size": config.vocab_size,
        "eos_token_id": ends,
        # Where a model has no end token, genai takes the pad token for it.
        "pad_token_id": given.get("pad_token_id", ends[0] if ends else 0),
        "decoder": {
            "filename": GRAPH,
            "session_options": {
                "log_id": "onnxruntime-genai",
                "enable_mem_pattern": False,  # a plan is kept for every shape, and each step has a new one
                "session.model_external_initializers_file_folder_path": _WEIGHTS_FOLDER,
                "provider_options": [],
            },
            "head_size": head_size,
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.attention.num_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": kv_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "position_ids": "position_ids",
                "past_key_names": _PAST.format("%d", "key"),
                "past_value_names": _PAST.format("%d", "value"),
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": _PRESENT.format("%d", "key"),
                "present_value_names": _PRESENT.format("%d", "value"),
            },
        },
    }
    if isinstance(given.get("bos_token_id"), int):
        model["bos_token_id"] = given["bos_token_id"]
    search = {key: given.get(key, default) for key, default in _SEARCH.items()}
    return {"model": model, "search": {**search, "max_length": max_seq_len, "past_present_share_buffer": True}}
