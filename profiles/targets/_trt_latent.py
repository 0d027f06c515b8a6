"""Latent attention (MLA) in TensorRT, in either of its forms.

Absorbed: queries move to the latent's space and the cache holds latents, (r + rope) numbers a token; plain products
over all slots, as no attention kernel of TensorRT has heads so wide. Expanded: keys and values are made from the latent
once and cached by head, 2 n d numbers a token; the attention kernels of grouped attention, which stop at the length.
S = lanes, T = new tokens, t = T / S of each lane, L = slots of the cache, n = heads, r = kv_lora_rank, d = head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ._canonical import attributes_of, find_matrix
from ._trt_attention import attend, layer_of, scale_of, side_by_side
from ._trt_form import head_size
from ._trt_inputs import visible_slots

if TYPE_CHECKING:
    from .tensorrt_network import Lowering


def lower_latent_attention(lowering: Lowering, call: ir.Node) -> None:
    if lowering.expanded:
        _lower_expanded(lowering, call)
    else:
        _lower_absorbed(lowering, call)


def _rotated(lowering: Lowering, call: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Scaled queries without [S, n, t, nope] and with rotation [S, n, t, rope]; rotated keys [S, 1, t, rope]."""
    op, ops, ints, by_lane = lowering.rewriter.op, lowering.rewriter.ops, lowering.rewriter.ints, lowering.by_lane
    q, _, k_rope, cos, sin = call.inputs[:5]
    a = attributes_of(call)
    heads, nope, rope = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"]
    by_token = op("Reshape", [op("Mul", [q, scale_of(lowering, a["scale"])]), by_lane(-1, heads, nope + rope)])
    q_nope, q_rope = ops("Split", [op("Transpose", [by_token], perm=[0, 2, 1, 3]), ints(nope, rope)], 2, axis=3)
    keys = op("Reshape", [k_rope, by_lane(1, -1, rope)])
    q_rope, keys = (op("RotaryEmbedding", [x, cos, sin], interleaved=a["interleaved"]) for x in (q_rope, keys))
    return q_nope, q_rope, keys


def _lower_expanded(lowering: Lowering, call: ir.Node) -> None:
    """arXiv:2405.04434, eq. 9-19, with values padded by zeros to the keys' size, which is cut off again behind."""
    op, ops, ints = lowering.rewriter.op, lowering.rewriter.ops, lowering.rewriter.ints
    latent, (k_up, v_up) = call.inputs[1], call.inputs[5:7]
    a, layer = attributes_of(call), layer_of(call)
    heads, nope, rope, value = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["v_head_dim"]
    size = head_size(nope, rope, value)
    q_nope, q_rope, k_rope = _rotated(lowering, call)
    # One product for both: of two with one input TensorRT would make one in one profile only, and store both forms.
    up = lowering.weights.head_rows(f"layers.{layer}.attn.kv_up", [find_matrix(k_up), find_matrix(v_up)])
    both = lowering.product(lowering.half(latent), op("Transpose", [lowering.put(up)], perm=[1, 0]))
    k_rows, v_rows = ops("Split", [both, ints(heads * nope, heads * value)], 2, axis=1)

    def by_head(rows: ir.Value, width: int) -> ir.Value:
        return op("Transpose", [op("Reshape", [rows, lowering.by_lane(-1, heads, width)])], perm=[0, 2, 1, 3])

    def padded(x: ir.Value, width: int) -> ir.Value:
        return x if width == size else op("Pad", [x, ints(0, 0, 0, 0, 0, 0, 0, size - width)])

    k_nope = by_head(k_rows, nope)
    shape = op("Concat", [op("Shape", [k_nope], start=0, end=3), ints(rope)], axis=0)
    key = padded(op("Concat", [k_nope, op("Expand", [k_rope, shape])], axis=3), nope + rope)
    query = lowering.half(padded(op("Concat", [q_nope, q_rope], axis=3), nope + rope))
    keys = lowering.update_cache(f"key.{layer}", key, heads, size)
    values = lowering.update_cache(f"value.{layer}", padded(by_head(v_rows, value), value), heads, size)
    attended = attend(lowering, query, keys, values, 0)
    attended = op("Slice", [attended, ints(0), ints(value), ints(3)])
    lowering.rewriter.replace(call, [side_by_side(lowering, attended, heads * value)])


def _lower_absorbed(lowering: Lowering, call: ir.Node) -> None:
    """arXiv:2405.04434, section 2.1.2: queries move to the latent's space, the cache is read as is.

    Two caches and plain 2-D products. TensorRT copies each cache once a step for it; one joint cache, or products in
    4-D, cost transposes of all of it as well.
    """
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    latent, (k_up, v_up) = call.inputs[1], call.inputs[5:7]
    a, layer, slots = attributes_of(call), layer_of(call), lowering.slot_count
    heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
    q_nope, q_rope, k_rope = _rotated(lowering, call)
    q_rope = lowering.half(_rows_of_lanes(lowering, q_rope, rope))
    latents = lowering.update_cache(f"latent.{layer}", op("Reshape", [latent, lowering.by_lane(1, -1, rank)]), 1, rank)
    ropes = lowering.update_cache(f"rope.{layer}", k_rope, 1, rope)
    latents, ropes = _matrix_of_lanes(lowering, latents, rank), _matrix_of_lanes(lowering, ropes, rope)
    # [heads, r, nope] read through a Transpose: the layout [N, K] that both profiles share.
    up = lowering.weights.heads(f"layers.{layer}.attn.k_up.turned", find_matrix(k_up), turned=True)
    up = op("Transpose", [lowering.put(up)], perm=[0, 2, 1])
    query = op("MatMul", [_heads_first(lowering, q_nope, heads, nope), up])
    query = _rows_of_lanes(lowering, _lanes_first(lowering, query, heads, rank), rank)
    scores = lowering.product(query, _turned(lowering, latents))
    scores = op("Add", [scores, lowering.product(q_rope, _turned(lowering, ropes))])
    never = lowering.rewriter.constant("float.never", np.array(-1e30, np.float32))
    mask = visible_slots(lowering, 0)
    scores = op("Where", [mask, op("Reshape", [scores, lowering.by_lane(heads, -1, slots)]), never])
    shares = lowering.half(_rows_of_lanes(lowering, op("Softmax", [scores], axis=-1), slots))
    mixed = op("Reshape", [op("MatMul", [shares, latents]), lowering.by_lane(heads, -1, rank)])
    down = lowering.weights.heads(f"layers.{layer}.attn.v_up", find_matrix(v_up), turned=False)
    down = op("Transpose", [lowering.put(down)], perm=[0, 2, 1])
    values = lowering.product(_heads_first(lowering, mixed, heads, rank), down)
    values = op("Transpose", [values], perm=[1, 0, 2])
    lowering.rewriter.replace(call, [op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])])


def _rows_of_lanes(lowering: Lowering, x: ir.Value, width: int) -> ir.Value:
    """[S, n, t, width] -> [S, n*t, width], or [n*t, width]: of one lane products are of two dimensions."""
    shape = lowering.rewriter.ints(-1, width) if lowering.lanes == 1 else lowering.by_lane(-1, width)
    return lowering.rewriter.op("Reshape", [x, shape])


def _matrix_of_lanes(lowering: Lowering, cache: ir.Value, width: int) -> ir.Value:
    """[S, 1, L, width] -> [S, L, width], or [L, width]."""
    shape = (lowering.slot_count, width) if lowering.lanes == 1 else (-1, lowering.slot_count, width)
    return lowering.rewriter.op("Reshape", [cache, lowering.rewriter.ints(*shape)])


def _turned(lowering: Lowering, matrix: ir.Value) -> ir.Value:
    return lowering.rewriter.op("Transpose", [matrix], perm=[1, 0] if lowering.lanes == 1 else [0, 2, 1])


def _heads_first(lowering: Lowering, x: ir.Value, heads: int, width: int) -> ir.Value:
    """[S, n, t, width] -> half precision [n, T, width]."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    if lowering.lanes == 1:
        return lowering.half(op("Squeeze", [x, ints(0)]))
    return lowering.half(op("Reshape", [op("Transpose", [x], perm=[1, 0, 2, 3]), ints(heads, -1, width)]))


def _lanes_first(lowering: Lowering, x: ir.Value, heads: int, width: int) -> ir.Value:
    """[n, T, width] -> [S, n, t, width], or as it is, [n, T, width]."""
    op, ints, lanes = lowering.rewriter.op, lowering.rewriter.ints, lowering.inputs.lane_count
    if lanes is None:
        return x
    by_lane = op("Reshape", [x, op("Concat", [ints(heads), lanes, ints(-1, width)], axis=0)])
    return op("Transpose", [by_lane], perm=[1, 0, 2, 3])
