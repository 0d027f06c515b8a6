"""Attention in TensorRT, its cache in place: latent attention by plain products, grouped attention by its own kernels.

S = lanes, T = new tokens, t = T / S of each lane, L = slots of the cache, n = query heads, g = key and value heads, d =
head size, r = kv_lora_rank.
TENSORRT.md (Q5) says what TensorRT makes of each op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...export.functions import DOMAIN
from ._canonical import attributes_of, find_matrix
from ._trt_inputs import mask_by_head, visible_slots

if TYPE_CHECKING:
    from .tensorrt_network import Lowering

# A function belongs to one domain, and TensorRT's importer heeds the name alone: so two bodies can have one name.
MASKED_DOMAIN = "moedge.masked"

# TensorRT's importer takes an op of this name, of any domain, for its in-place cache layer; others run the body.
# cache [S, g, L, d], update [S, g, t, d], start int64 [S] -> present [S, g, L, d]
TENSOR_SCATTER = f"""
<domain: "{DOMAIN}", opset_import: ["" : 23]>
TensorScatter <axis> (cache, update, start) => (present)
{{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    rows = Transpose <perm = [0, 2, 1, 3]> (cache)
    new = Transpose <perm = [0, 2, 1, 3]> (update)
    lanes_and_tokens = Shape <start = 0, end = 2> (new)
    lanes_1d = Shape <start = 0, end = 1> (new)
    lanes = Squeeze (lanes_1d, first)
    tokens_1d = Shape <start = 1, end = 2> (new)
    tokens = Squeeze (tokens_1d, first)
    steps = Range (zero, tokens, one)
    starts = Unsqueeze (start, second)
    places = Add (starts, steps)
    lane_ids = Range (zero, lanes, one)
    lane_column = Unsqueeze (lane_ids, second)
    all_lanes = Expand (lane_column, lanes_and_tokens)
    pair = Constant <value_ints = [2]> ()
    lane_of = Unsqueeze (all_lanes, pair)
    place_of = Unsqueeze (places, pair)
    indices = Concat <axis = 2> (lane_of, place_of)
    written = ScatterND (rows, indices, new)
    present = Transpose <perm = [0, 2, 1, 3]> (written)
}}
"""

# Likewise for its attention layer, which does not scale. q [S, n, t, d], k and v [S, g, L, d] -> y [S, n, t, d]
_ATTENTION = """
<domain: "{domain}", opset_import: ["" : 23]>
TRT_Attention <causal_kind> (q, k, v, mask, query_lengths, kv_lengths) => (y)
{{
    third = Constant <value_ints = [2]> ()
    second = Constant <value_ints = [1]> ()
    never = Constant <value_float = -1e30> ()
    lanes = Shape <start = 0, end = 1> (q)
    heads = Shape <start = 1, end = 2> (q)
    tokens_and_dim = Shape <start = 2, end = 4> (q)
    groups = Shape <start = 1, end = 2> (k)
    shared_by = Div (heads, groups)
    grouped_shape = Concat <axis = 0> (lanes, groups, shared_by, tokens_and_dim)
    query = Reshape <allowzero = 1> (q, grouped_shape)
    key = Unsqueeze (k, third)
    value = Unsqueeze (v, third)
    turned = Transpose <perm = [0, 1, 2, 4, 3]> (key)
    products = MatMul (query, turned)
    scores = Cast <to = 1> (products)
    {mask}
    allowed = Where (visible, scores, never)
    shares = Softmax <axis = -1> (allowed)
    half_shares = CastLike (shares, v)
    mixed = MatMul (half_shares, value)
    y_shape = Shape (q)
    y = Reshape <allowzero = 1> (mixed, y_shape)
}}
"""
_BY_LENGTH = """
    zero = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    slots_1d = Shape <start = 2, end = 3> (k)
    slots = Squeeze (slots_1d, first)
    places = Range (zero, slots, step)
    lengths = Cast <to = 7> (kv_lengths)
    axes = Constant <value_ints = [1, 2, 3, 4]> ()
    length = Unsqueeze (lengths, axes)
    visible = Less (places, length)
"""
# mask bool [S, 1, t, L]
_BY_MASK = """
    visible = Unsqueeze (mask, second)
"""
ATTENTION_BY_LENGTH = _ATTENTION.format(domain=DOMAIN, mask=_BY_LENGTH)
ATTENTION_BY_MASK = _ATTENTION.format(domain=MASKED_DOMAIN, mask=_BY_MASK)


def lower_grouped_attention(lowering: Lowering, call: ir.Node) -> None:
    """`TRT_Attention` over caches by heads. One token reads the cache up to its length; a chunk, and whatever has a
    window, goes by mask: what a causal kind means beside a length cannot be told without a GPU."""
    op = lowering.rewriter.op
    query, keys, values = _heads_and_caches(lowering, call)
    window = attributes_of(call)["window"]
    step = lowering.inputs.step
    mask = mask_by_head(lowering, visible_slots(lowering, window))
    few = [lowering.first_rows(query, step, axis=2), keys, values]
    if window:
        attended = _attend_by_mask(lowering, few, lowering.first_rows(mask, step, axis=2))
    else:
        attended = op("TRT_Attention", [*few, None, None, lowering.inputs.length], domain=DOMAIN, causal_kind="none")
    many = [lowering.other_rows(query, step, axis=2), keys, values]
    rest = _attend_by_mask(lowering, many, lowering.other_rows(mask, step, axis=2))
    attended = op("Concat", [attended, rest], axis=2)
    lowering.rewriter.replace(call, [_side_by_side(lowering, call, attended)])


def lower_sink_attention(lowering: Lowering, call: ir.Node) -> None:
    """By plain products: no attention kernel of TensorRT has sinks. They take their share of the softmax's sum."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    a, slots = attributes_of(call), lowering.slot_count
    heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
    query, keys, values = _heads_and_caches(lowering, call)
    keys, values = op("Reshape", [keys, ints(-1, slots, dim)]), op("Reshape", [values, ints(-1, slots, dim)])
    query = op("Reshape", [query, lowering.by_lane_and(groups, -1, dim)])
    scores = lowering.product(query, op("Transpose", [keys], perm=[0, 2, 1]))
    never = lowering.rewriter.constant("float.never", np.array(-1e30, np.float32))
    mask = mask_by_head(lowering, visible_slots(lowering, a["window"]))
    scores = op("Where", [mask, op("Reshape", [scores, lowering.by_lane(heads, -1, slots)]), never])
    sinks = op("Reshape", [call.inputs[5], ints(1, heads, 1, 1)])
    most = op("Max", [op("ReduceMax", [scores, ints(3)], keepdims=1), sinks])
    terms = op("Exp", [op("Sub", [scores, most])])
    total = op("Add", [op("ReduceSum", [terms, ints(3)], keepdims=1), op("Exp", [op("Sub", [sinks, most])])])
    shares = lowering.half(op("Reshape", [op("Div", [terms, total]), lowering.by_lane_and(groups, -1, slots)]))
    attended = op("Reshape", [op("MatMul", [shares, values]), lowering.by_lane(heads, -1, dim)])
    lowering.rewriter.replace(call, [_side_by_side(lowering, call, attended)])


def _heads_and_caches(lowering: Lowering, call: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Rotated and scaled queries [S, n, t, d]; keys and values [S, g, L, d] with the new tokens in them."""
    op = lowering.rewriter.op
    q, k, v, cos, sin = call.inputs[:5]
    a, layer = attributes_of(call), layer_of(call)
    groups, dim = a["num_key_value_heads"], a["head_dim"]

    def by_head(rows: ir.Value | None, count: int) -> ir.Value:
        return op("Transpose", [op("Reshape", [rows, lowering.by_lane(-1, count, dim)])], perm=[0, 2, 1, 3])

    def rotated(rows: ir.Value | None, count: int) -> ir.Value:
        return op("RotaryEmbedding", [by_head(rows, count), cos, sin], interleaved=a["interleaved"])

    query = lowering.half(rotated(op("Mul", [q, scale_of(lowering, a["scale"])]), a["num_heads"]))
    keys = lowering.update_cache(f"key.{layer}", rotated(k, groups), groups, dim)
    values = lowering.update_cache(f"value.{layer}", by_head(v, groups), groups, dim)
    return query, keys, values


def _side_by_side(lowering: Lowering, call: ir.Node, attended: ir.Value) -> ir.Value:
    """[S, n, t, d] -> float32 [T, n*d]."""
    op, a = lowering.rewriter.op, attributes_of(call)
    rows = op("Transpose", [lowering.full(attended)], perm=[0, 2, 1, 3])
    return op("Reshape", [rows, lowering.rewriter.ints(-1, a["num_heads"] * a["head_dim"])])


def _attend_by_mask(lowering: Lowering, inputs: list[ir.Value], mask: ir.Value) -> ir.Value:
    op, length = lowering.rewriter.op, lowering.inputs.length
    return op("TRT_Attention", [*inputs, mask, None, length], domain=MASKED_DOMAIN, causal_kind="none")


def scale_of(lowering: Lowering, scale: float) -> ir.Value:
    """The scale, for the queries: half precision could not hold unscaled scores."""
    return lowering.rewriter.constant(f"scale.{scale!r}", np.array(scale, np.float32))


def lower_latent_attention(lowering: Lowering, call: ir.Node) -> None:
    """Absorbed form (arXiv:2405.04434, section 2.1.2): queries move to the latent's space, the cache is read as is.

    Two caches and plain 2-D products: no attention kernel of TensorRT takes heads of r + rope channels. TensorRT
    copies each cache once a step for it; one joint cache, or products in 4-D, cost transposes of all of it as well.
    """
    op, ops, ints = lowering.rewriter.op, lowering.rewriter.ops, lowering.rewriter.ints
    q, latent, k_rope, cos, sin, k_up, v_up = call.inputs
    a, layer, slots = attributes_of(call), layer_of(call), lowering.slot_count
    heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
    rotary = {"interleaved": a["interleaved"]}
    by_token = op("Reshape", [op("Mul", [q, scale_of(lowering, a["scale"])]), lowering.by_lane(-1, heads, nope + rope)])
    by_head = op("Transpose", [by_token], perm=[0, 2, 1, 3])
    q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
    q_rope = lowering.half(_rows_of_lanes(lowering, op("RotaryEmbedding", [q_rope, cos, sin], **rotary), rope))
    k_rope = op("RotaryEmbedding", [op("Reshape", [k_rope, lowering.by_lane(1, -1, rope)]), cos, sin], **rotary)
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
    mask = mask_by_head(lowering, visible_slots(lowering, 0))
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


def layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
