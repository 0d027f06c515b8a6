"""Attention in TensorRT over a cache in place: grouped attention by TensorRT's kernels, that with sinks by products.

S = lanes, T = new tokens, t = T / S of each lane, L = slots of the cache, n = query heads, g = key and value heads, d =
head size.
TENSORRT.md (Q5) says what TensorRT makes of each op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...export.functions import DOMAIN
from ._canonical import attributes_of
from ._trt_inputs import visible_slots

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
    attended = attend(lowering, *_heads_and_caches(lowering, call), attributes_of(call)["window"])
    lowering.rewriter.replace(call, [side_by_side(lowering, attended, _width_of(call))])


def attend(lowering: Lowering, query: ir.Value, keys: ir.Value, values: ir.Value, window: int) -> ir.Value:
    """[S, n, t, d] of queries [S, n, t, d], scaled, and caches [S, g, L, d]."""
    op, step = lowering.rewriter.op, lowering.inputs.step
    mask = visible_slots(lowering, window)
    few = [lowering.first_rows(query, step, axis=2), keys, values]
    if window:
        attended = _attend_by_mask(lowering, few, lowering.first_rows(mask, step, axis=2))
    else:
        attended = op("TRT_Attention", [*few, None, None, lowering.inputs.length], domain=DOMAIN, causal_kind="none")
    many = [lowering.other_rows(query, step, axis=2), keys, values]
    rest = _attend_by_mask(lowering, many, lowering.other_rows(mask, step, axis=2))
    return op("Concat", [attended, rest], axis=2)


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
    mask = visible_slots(lowering, a["window"])
    scores = op("Where", [mask, op("Reshape", [scores, lowering.by_lane(heads, -1, slots)]), never])
    sinks = op("Reshape", [call.inputs[5], ints(1, heads, 1, 1)])
    most = op("Max", [op("ReduceMax", [scores, ints(3)], keepdims=1), sinks])
    terms = op("Exp", [op("Sub", [scores, most])])
    total = op("Add", [op("ReduceSum", [terms, ints(3)], keepdims=1), op("Exp", [op("Sub", [sinks, most])])])
    shares = lowering.half(op("Reshape", [op("Div", [terms, total]), lowering.by_lane_and(groups, -1, slots)]))
    attended = op("Reshape", [op("MatMul", [shares, values]), lowering.by_lane(heads, -1, dim)])
    lowering.rewriter.replace(call, [side_by_side(lowering, attended, _width_of(call))])


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


def _width_of(call: ir.Node) -> int:
    a = attributes_of(call)
    return int(a["num_heads"] * a["head_dim"])


def side_by_side(lowering: Lowering, attended: ir.Value, width: int) -> ir.Value:
    """[S, n, t, d] -> float32 [T, n*d]."""
    rows = lowering.rewriter.op("Transpose", [lowering.full(attended)], perm=[0, 2, 1, 3])
    return lowering.rewriter.op("Reshape", [rows, lowering.rewriter.ints(-1, width)])


def _attend_by_mask(lowering: Lowering, inputs: list[ir.Value], mask: ir.Value) -> ir.Value:
    op, length = lowering.rewriter.op, lowering.inputs.length
    return op("TRT_Attention", [*inputs, mask, None, length], domain=MASKED_DOMAIN, causal_kind="none")


def scale_of(lowering: Lowering, scale: float) -> ir.Value:
    """The scale, for the queries: half precision could not hold unscaled scores."""
    return lowering.rewriter.constant(f"scale.{scale!r}", np.array(scale, np.float32))


def layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
