"""Attention on onnxruntime's CPU kernels: positions behind a cache, and each layer's attention over it.

Sequences are single (batch 1) and flat: S = new tokens, P = tokens in the cache, n = heads, r = kv_lora_rank,
w = r + rope.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ._canonical import Rewriter, attributes_of, find_calls

MS = "com.microsoft"
_GROUPED = ("GroupedAttention", "SinkAttention")


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


class AttentionLowering:
    """Replaces positions and attention of one model; `cache` then says what is kept of each layer.

    `max_seq_len`: wider windows are no windows.
    """

    def __init__(self, rewriter: Rewriter, max_seq_len: int | None) -> None:
        self.rewriter = rewriter
        self.model = rewriter.model
        self.graph = rewriter.model.graph
        self.max_seq_len = max_seq_len
        self.windows: dict[int, ir.Value] = {}
        self.cache: list[CacheEntry] = []
        self.mask: ir.Value | None = None
        self.total: ir.Value | None = None
        self.split_sizes: ir.Value | None = None

    def lower(self) -> None:
        """All of it; the graph's first input becomes flat, and the cache's inputs and outputs are added."""
        self._lower_positions()
        for call in find_calls(self.model, "LatentAttention"):
            self._lower_latent(call)
        for kind in _GROUPED:
            for call in find_calls(self.model, kind):
                self._lower_grouped(call)

    def _lower_positions(self) -> None:
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
        layer = layer_of(call)
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

    def _lower_grouped(self, call: ir.Node) -> None:
        """`GroupQueryAttention`, its cache in place: the buffer goes in as the past and comes out as the present."""
        op, ints = self.rewriter.op, self.rewriter.ints
        q, k, v, cos, sin, *sinks = call.inputs
        a, layer = attributes_of(call), layer_of(call)
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

    def _lower_latent(self, call: ir.Node) -> None:
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
        new = op("Concat", [latent, k_rope], axis=1, name=f"new.latent.{layer_of(call)}")
        new.dtype, new.shape = ir.DataType.FLOAT, ir.Shape(["S", rank + rope])
        self.graph.outputs.append(new)
        product: dict[str, Any] = {"domain": MS, "transB": 1, "alpha": float(a["scale"])}
        past_scores = op("FusedMatMul", [query, past], **product)
        new_scores = op("Add", [op("FusedMatMul", [query, new], **product), self.mask])
        joined = op("Concat", [past_scores, new_scores], axis=2)
        scores = op("Softmax", [joined], axis=2, name=f"attention.{layer_of(call)}")  # the name `moedge trace` knows
        past_share, new_share = ops("Split", [scores, self.split_sizes], 2, axis=2)
        mixed = op("Add", [op("MatMul", [past_share, past]), op("MatMul", [new_share, new])])
        mixed = op("Slice", [mixed, ints(0), ints(rank), ints(2)])
        values = op("FusedMatMul", [mixed, v_up], domain=MS, transB=1)
        values = op("Transpose", [values], perm=[1, 0, 2])
        y = op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])
        self.rewriter.replace(call, [y])


def _kernel_head_size(dim: int) -> int:
    """`GroupQueryAttention` takes multiples of 8."""
    return -(-dim // 8) * 8


def layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
