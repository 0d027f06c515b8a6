"""Attention in TensorRT, its cache in place: latent attention by plain products, grouped attention by its own kernels.

T = new tokens, L = slots of the cache, n = query heads, g = key and value heads, d = head size, r = kv_lora_rank.
TENSORRT.md (Q5) says what TensorRT makes of each op.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from ...export.functions import DOMAIN
from ._canonical import attributes_of, find_matrix

if TYPE_CHECKING:
    from .tensorrt_network import Lowering

# A function belongs to one domain, and TensorRT's importer heeds the name alone: so two bodies can have one name.
MASKED_DOMAIN = "moedge.masked"

# TensorRT's importer takes an op of this name, of any domain, for its in-place cache layer; others run the body.
# cache [1, g, L, d], update [1, g, T, d], start int64 [1] -> present [1, g, L, d]
TENSOR_SCATTER = f"""
<domain: "{DOMAIN}", opset_import: ["" : 23]>
TensorScatter <axis> (cache, update, start) => (present)
{{
    flat = Constant <value_ints = [-1]> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    rows = Transpose <perm = [2, 0, 1, 3]> (cache)
    new = Transpose <perm = [2, 0, 1, 3]> (update)
    count_1d = Shape <start = 0, end = 1> (new)
    count = Squeeze (count_1d, first)
    steps = Range (zero, count, one)
    places = Add (steps, start)
    column = Unsqueeze (places, flat)
    written = ScatterND (rows, column, new)
    present = Transpose <perm = [1, 2, 0, 3]> (written)
}}
"""

# Likewise for its attention layer, which does not scale. q [1, n, T, d], k and v [1, g, L, d] -> y [1, n, T, d]
_ATTENTION = """
<domain: "{domain}", opset_import: ["" : 23]>
TRT_Attention <causal_kind> (q, k, v, mask, query_lengths, kv_lengths) => (y)
{{
    third = Constant <value_ints = [2]> ()
    one = Constant <value_ints = [1]> ()
    never = Constant <value_float = -1e30> ()
    heads = Shape <start = 1, end = 2> (q)
    tokens_and_dim = Shape <start = 2, end = 4> (q)
    groups = Shape <start = 1, end = 2> (k)
    shared_by = Div (heads, groups)
    grouped_shape = Concat <axis = 0> (one, groups, shared_by, tokens_and_dim)
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
    length = Cast <to = 7> (kv_lengths)
    visible = Less (places, length)
"""
# mask bool [1, 1, T, L]
_BY_MASK = """
    visible = Unsqueeze (mask, one)
"""
ATTENTION_BY_LENGTH = _ATTENTION.format(domain=DOMAIN, mask=_BY_LENGTH)
ATTENTION_BY_MASK = _ATTENTION.format(domain=MASKED_DOMAIN, mask=_BY_MASK)


def lower_grouped_attention(lowering: Lowering, call: ir.Node) -> None:
    """`TRT_Attention` over caches by heads. One token reads the cache up to its length; a chunk, and whatever has a
    window, goes by mask: what a causal kind means beside a length cannot be told without a GPU."""
    op = lowering.rewriter.op
    query, keys, values = _heads_and_caches(lowering, call)
    window = attributes_of(call)["window"]
    mask = visible_slots(lowering, window)
    few = [lowering.first_rows(query, axis=2), keys, values]
    if window:
        attended = _attend_by_mask(lowering, few, lowering.first_rows(mask))
    else:
        attended = op("TRT_Attention", [*few, None, None, lowering.length], domain=DOMAIN, causal_kind="none")
    many = [lowering.other_rows(query, axis=2), keys, values]
    attended = op("Concat", [attended, _attend_by_mask(lowering, many, lowering.other_rows(mask))], axis=2)
    lowering.rewriter.replace(call, [_side_by_side(lowering, call, attended)])


def lower_sink_attention(lowering: Lowering, call: ir.Node) -> None:
    """By plain products: no attention kernel of TensorRT has sinks. They take their share of the softmax's sum."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    a, slots = attributes_of(call), lowering.max_seq_len
    heads, groups, dim = a["num_heads"], a["num_key_value_heads"], a["head_dim"]
    query, keys, values = _heads_and_caches(lowering, call)
    keys, values = op("Squeeze", [keys, ints(0)]), op("Squeeze", [values, ints(0)])
    query = op("Reshape", [query, ints(groups, -1, dim)])
    scores = lowering.product(query, op("Transpose", [keys], perm=[0, 2, 1]))
    never = lowering.rewriter.constant("float.never", np.array(-1e30, np.float32))
    mask = visible_slots(lowering, a["window"])
    scores = op("Where", [mask, op("Reshape", [scores, ints(heads, -1, slots)]), never])
    sinks = op("Reshape", [call.inputs[5], ints(heads, 1, 1)])
    most = op("Max", [op("ReduceMax", [scores, ints(2)], keepdims=1), sinks])
    terms = op("Exp", [op("Sub", [scores, most])])
    total = op("Add", [op("ReduceSum", [terms, ints(2)], keepdims=1), op("Exp", [op("Sub", [sinks, most])])])
    shares = lowering.half(op("Reshape", [op("Div", [terms, total]), ints(groups, -1, slots)]))
    attended = op("Reshape", [op("MatMul", [shares, values]), ints(1, heads, -1, dim)])
    lowering.rewriter.replace(call, [_side_by_side(lowering, call, attended)])


def _heads_and_caches(lowering: Lowering, call: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Rotated and scaled queries [1, n, T, d]; keys and values [1, g, L, d] with the new tokens in them."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    q, k, v, cos, sin = call.inputs[:5]
    a, layer = attributes_of(call), layer_of(call)
    groups, dim = a["num_key_value_heads"], a["head_dim"]

    def by_head(rows: ir.Value | None, count: int) -> ir.Value:
        return op("Transpose", [op("Reshape", [rows, ints(1, -1, count, dim)])], perm=[0, 2, 1, 3])

    def rotated(rows: ir.Value | None, count: int) -> ir.Value:
        return op("RotaryEmbedding", [by_head(rows, count), cos, sin], interleaved=a["interleaved"])

    query = lowering.half(rotated(op("Mul", [q, scale_of(lowering, a["scale"])]), a["num_heads"]))
    keys = lowering.update_cache(f"key.{layer}", rotated(k, groups), groups, dim)
    values = lowering.update_cache(f"value.{layer}", by_head(v, groups), groups, dim)
    return query, keys, values


def _side_by_side(lowering: Lowering, call: ir.Node, attended: ir.Value) -> ir.Value:
    """[1, n, T, d] -> float32 [T, n*d]."""
    op, a = lowering.rewriter.op, attributes_of(call)
    rows = op("Transpose", [lowering.full(attended)], perm=[0, 2, 1, 3])
    return op("Reshape", [rows, lowering.rewriter.ints(-1, a["num_heads"] * a["head_dim"])])


def _attend_by_mask(lowering: Lowering, inputs: list[ir.Value], mask: ir.Value) -> ir.Value:
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    mask = op("Unsqueeze", [mask, ints(0, 1)])
    return op("TRT_Attention", [*inputs, mask, None, lowering.length], domain=MASKED_DOMAIN, causal_kind="none")


def visible_slots(lowering: Lowering, window: int) -> ir.Value:
    """bool [T, L]: the slots that each token attends to, `window` in all where that is not 0; made once for all
    layers."""
    op, ints = lowering.rewriter.op, lowering.rewriter.ints
    if window not in lowering.masks:
        assert lowering.slots is not None and lowering.places is not None
        last = op("Unsqueeze", [lowering.places, ints(1)])
        mask = op("LessOrEqual", [lowering.slots, last])
        if window:
            mask = op("And", [mask, op("Greater", [lowering.slots, op("Sub", [last, ints(window)])])])
        lowering.masks[window] = mask
    return lowering.masks[window]


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
    a, layer, slots = attributes_of(call), layer_of(call), lowering.max_seq_len
    heads, nope, rope, rank = a["num_heads"], a["qk_nope_head_dim"], a["qk_rope_head_dim"], a["kv_lora_rank"]
    rotary = {"interleaved": a["interleaved"]}
    by_token = op("Reshape", [op("Mul", [q, scale_of(lowering, a["scale"])]), ints(1, -1, heads, nope + rope)])
    by_head = op("Transpose", [by_token], perm=[0, 2, 1, 3])
    q_nope, q_rope = ops("Split", [by_head, ints(nope, rope)], 2, axis=3)
    q_rope = lowering.half(op("Reshape", [op("RotaryEmbedding", [q_rope, cos, sin], **rotary), ints(-1, rope)]))
    k_rope = op("RotaryEmbedding", [op("Reshape", [k_rope, ints(1, 1, -1, rope)]), cos, sin], **rotary)
    latents = lowering.update_cache(f"latent.{layer}", op("Reshape", [latent, ints(1, 1, -1, rank)]), 1, rank)
    ropes = lowering.update_cache(f"rope.{layer}", k_rope, 1, rope)
    latents, ropes = op("Reshape", [latents, ints(slots, rank)]), op("Reshape", [ropes, ints(slots, rope)])
    # [heads, r, nope] read through a Transpose: the layout [N, K] that both profiles share.
    up = lowering.weights.heads(f"layers.{layer}.attn.k_up.turned", find_matrix(k_up), turned=True)
    up = op("Transpose", [lowering.put(up)], perm=[0, 2, 1])
    query = op("MatMul", [lowering.half(op("Squeeze", [q_nope, ints(0)])), up])
    query = op("Reshape", [query, ints(-1, rank)])
    scores = lowering.product(query, op("Transpose", [latents], perm=[1, 0]))
    scores = op("Add", [scores, lowering.product(q_rope, op("Transpose", [ropes], perm=[1, 0]))])
    never = lowering.rewriter.constant("float.never", np.array(-1e30, np.float32))
    scores = op("Where", [visible_slots(lowering, 0), op("Reshape", [scores, ints(heads, -1, slots)]), never])
    shares = lowering.half(op("Reshape", [op("Softmax", [scores], axis=-1), ints(-1, slots)]))
    mixed = op("Reshape", [op("MatMul", [shares, latents]), ints(heads, -1, rank)])
    down = lowering.weights.heads(f"layers.{layer}.attn.v_up", find_matrix(v_up), turned=False)
    values = lowering.product(mixed, op("Transpose", [lowering.put(down)], perm=[0, 2, 1]))
    values = op("Transpose", [values], perm=[1, 0, 2])
    lowering.rewriter.replace(call, [op("Reshape", [values, ints(-1, heads * a["v_head_dim"])])])


def layer_of(node: ir.Node) -> int:
    """The layer of a node that the exporter named `layers.N....`."""
    assert node.name is not None and node.name.startswith("layers."), f"{node.name} is in no layer"
    return int(node.name.split(".")[1])
