"""Attention on onnxruntime's CUDA kernels, in half precision: positions behind a cache, each layer's attention over it.

Sequences are single (batch 1) and flat: S = new tokens, P = tokens in the cache, n = heads, r = kv_lora_rank,
w = r + rope. What differs from the CPU's (`_ort_attention`): half precision inside, no attention bias, which only
CUDA's slowest kernel takes, and the cache's length as an input of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from ._canonical import Rewriter, attributes_of, find_calls, values_of
from ._ort_attention import MS, layer_of

_GROUPED = ("GroupedAttention", "SinkAttention")
_HEAD_STEP = 8  # `GroupQueryAttention` takes head sizes in multiples of it


@dataclass(frozen=True)
class CudaCache:
    """A tensor of the KV cache, `width` elements a token: by row where `heads` is 0, else by head in one buffer."""

    name: str
    width: int
    heads: int
    real: ir.DataType

    def to_json(self) -> dict[str, Any]:
        dtype = "float16" if self.real == ir.DataType.FLOAT16 else "float32"
        return {"name": self.name, "width": self.width, "dtype": dtype, "heads": self.heads}


class CudaAttention:
    """Replaces positions and attention of one model; `cache` then says what is kept of each layer."""

    def __init__(self, rewriter: Rewriter, real: ir.DataType, max_seq_len: int) -> None:
        self.rewriter = rewriter
        self.model = rewriter.model
        self.graph = rewriter.model.graph
        self.real = real
        self.max_seq_len = max_seq_len
        self.cache: list[CudaCache] = []
        self.mask: ir.Value | None = None  # [S, S], for latent attention
        self.split_sizes: ir.Value | None = None
        self.total: ir.Value | None = None  # int32 [1]
        self.last: ir.Value | None = None

    def lower(self) -> None:
        """All of it; the graph's first input becomes flat, and the cache's inputs and outputs are added."""
        self._lower_positions()
        for call in find_calls(self.model, "LatentAttention"):
            self._lower_latent(call)
        for kind in _GROUPED:
            for call in find_calls(self.model, kind):
                self._lower_grouped(call)

    def half(self, x: ir.Value | None) -> ir.Value:
        assert x is not None
        return x if self.real == ir.DataType.FLOAT else self.rewriter.op("Cast", [x], to=int(self.real))

    def full(self, x: ir.Value) -> ir.Value:
        return x if self.real == ir.DataType.FLOAT else self.rewriter.op("Cast", [x], to=int(ir.DataType.FLOAT))

    def _lower_positions(self) -> None:
        op, ints, constant = self.rewriter.op, self.rewriter.ints, self.rewriter.constant
        tokens, length = ir.val("input_ids", ir.DataType.INT64, ["S"]), ir.val("length", ir.DataType.INT64, [1])
        self.graph.inputs[0].replace_all_uses_with(tokens)
        self.graph.inputs[:] = [tokens, length]
        (call,) = find_calls(self.model, "Positions")
        new = op("Shape", [tokens])
        zero, one = (constant(f"int.{number}", np.array(number, np.int64)) for number in (0, 1))
        steps = op("Range", [zero, op("Squeeze", [new, ints(0)]), one])
        positions = op("Unsqueeze", [op("Add", [steps, length]), ints(0)])
        self.total = op("Cast", [op("Add", [length, new])], to=int(ir.DataType.INT32), name="total")
        self.last = op("Sub", [self.total, constant("int32.1", np.array([1], np.int32))], name="last")
        ahead = op("Less", [op("Unsqueeze", [steps, ints(1)]), op("Unsqueeze", [steps, ints(0)])])
        allowed = constant("float.0", np.array(0, np.float32))
        never = constant("float.never", np.array(-np.inf, np.float32))
        self.mask = op("Where", [ahead, never, allowed], name="causal_mask")
        self.split_sizes = op("Concat", [length, new], axis=0, name="past_and_new")
        self.rewriter.replace(call, [positions])

    def _add_past(self, name: str, shape: list[int | str], width: int, heads: int = 0) -> ir.Value:
        past = ir.val(f"past.{name}", self.real, shape)
        self.graph.inputs.append(past)
        self.cache.append(CudaCache(name, width, heads, self.real))
        return past

    def _add_new(self, value: ir.Value, name: str, shape: list[int | str]) -> None:
        value.name, value.dtype, value.shape = f"new.{name}", self.real, ir.Shape(shape)
        self.graph.outputs.append(value)

    def _lower_grouped(self, call: ir.Node) -> None:
        """`GroupQueryAttention`, its cache in place: the buffer goes in as the past and comes out as the present."""
        op, ints = self.rewriter.op, self.rewriter.ints
        q, k, v, cos, sin, *sinks = call.inputs
        a, layer = attributes_of(call), layer_of(call)
        heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
        room = -(-dim // _HEAD_STEP) * _HEAD_STEP
        rows = []
        for value, count in ((q, heads), (k, groups), (v, groups)):
            row = op("Reshape", [value, ints(1, -1, count * dim)])
            if value is not v:
                row = op("RotaryEmbedding", [row, cos, sin], interleaved=a["interleaved"], num_heads=count)
            if room != dim:  # zeros behind each head change no product
                padded = op("Pad", [op("Reshape", [row, ints(1, -1, count, dim)]), ints(0, room - dim), None, ints(3)])
                row = op("Reshape", [padded, ints(1, -1, count * room)])
            rows.append(self.half(row))
        shape: list[int | str] = [1, groups, "capacity", room]
        names = (f"key.{layer}", f"value.{layer}")
        pasts = [self._add_past(name, shape, groups * room, groups) for name in names]
        window = a["window"] if 0 < a["window"] < self.max_seq_len else -1
        optional: list[ir.Value | None] = [None] * 4  # rotation of its own, positions, an attention bias
        attended, *presents = self.rewriter.ops(
            "GroupQueryAttention",
            [*rows, *pasts, self.last, op("Squeeze", [self.total, ints(0)]), *optional, *map(self.half, sinks)],
            3,
            domain=MS,
            num_heads=heads,
            kv_num_heads=groups,
            scale=float(a["scale"]),
            local_window_size=window,
        )
        for present, name in zip(presents, names, strict=True):
            self._add_new(present, name, shape)
        if room != dim:
            by_head = op("Reshape", [attended, ints(1, -1, heads, room)])
            attended = op("Slice", [by_head, ints(0), ints(dim), ints(3)])
        self.rewriter.replace(call, [self.full(op("Reshape", [attended, ints(-1, heads * dim)]))])

    def _lower_latent(self, call: ir.Node) -> None:
        """Absorbed form (arXiv:2405.04434, section 2.1.2): queries go to the latent's space, the cache stays.

        Scores of past and new tokens are computed apart and only the scores are joined, so that the past stays a view.
        """
        op, ops, ints = self.rewriter.op, self.rewriter.ops, self.rewriter.ints
        q, latent, k_rope, cos, sin = call.inputs[:5]
        k_up, v_up = (values_of(self.rewriter, value) for value in call.inputs[5:])
        a, name = attributes_of(call), f"latent.{layer_of(call)}"
        heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
        past = self._add_past(name, ["P", rank + rope], rank + rope)
        rotary = {"interleaved": a["interleaved"]}
        by_head = op("Transpose", [op("Reshape", [q, ints(1, -1, heads, nope + rope)])], perm=[0, 2, 1, 3])
        q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
        q_rope = self.half(op("RotaryEmbedding", [q_rope, cos, sin], **rotary))
        query = op("Concat", [op("MatMul", [self.half(q_nope), self.half(k_up)]), q_rope], axis=3)
        query = op("Reshape", [query, ints(heads, -1, rank + rope)])
        k_heads = op("Reshape", [k_rope, ints(1, 1, -1, rope)])
        k_rope = op("Reshape", [op("RotaryEmbedding", [k_heads, cos, sin], **rotary), ints(-1, rope)])
        new = self.half(op("Concat", [latent, k_rope], axis=1))
        if self.real == ir.DataType.FLOAT:
            new = op("Identity", [new])  # an output of its own, whatever made it
        self._add_new(new, name, ["S", rank + rope])
        product: dict[str, Any] = {"domain": MS, "transB": 1, "alpha": float(a["scale"])}
        past_scores = self.full(op("FusedMatMul", [query, past], **product))
        new_scores = op("Add", [self.full(op("FusedMatMul", [query, new], **product)), self.mask])
        scores = op("Softmax", [op("Concat", [past_scores, new_scores], axis=2)], axis=2)
        past_share, new_share = ops("Split", [self.half(scores), self.split_sizes], 2, axis=2)
        mixed = op("Add", [op("MatMul", [past_share, past]), op("MatMul", [new_share, new])])
        mixed = op("Slice", [mixed, ints(0), ints(rank), ints(2)])
        values = op("FusedMatMul", [mixed, self.half(v_up)], domain=MS, transB=1)
        values = op("Transpose", [values], perm=[1, 0, 2])
        y = op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])
        self.rewriter.replace(call, [self.full(y)])
