"""The functions of the moedge domain that are not gates, each with a body in standard ONNX ops, as ONNX text.

A target replaces the calls by what is fast there; a runtime that knows nothing of moedge runs the bodies.
T = tokens (batch x sequence), B = batch, S = sequence, E = experts, k = experts per token, H = hidden size,
I = intermediate size, n = heads, d = head size, r = kv_lora_rank.
"""

from __future__ import annotations

DOMAIN = "moedge"
VERSION = 1
OPSET = 23

# input_ids int64 [B, S] -> positions int64 [B, S]
POSITIONS = """
<domain: "moedge", opset_import: ["" : 23]>
Positions (input_ids) => (positions)
{
    shape = Shape (input_ids)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    first = Constant <value_ints = [0]> ()
    length_1d = Shape <start = 1, end = 2> (input_ids)
    length = Squeeze (length_1d, first)
    range = Range (zero, length, one)
    positions = Expand (range, shape)
}
"""

# positions int64 [B, S], inv_freq float32 [d/2] -> cos, sin float32 [B, S, d/2]
ROTARY_ANGLES = """
<domain: "moedge", opset_import: ["" : 23]>
RotaryAngles <attention_factor> (positions, inv_freq) => (cos, sin)
{
    last = Constant <value_ints = [-1]> ()
    float_positions = Cast <to = 1> (positions)
    column = Unsqueeze (float_positions, last)
    angles = Mul (column, inv_freq)
    factor = Constant <value_float: float = @attention_factor> ()
    plain_cos = Cos (angles)
    plain_sin = Sin (angles)
    cos = Mul (plain_cos, factor)
    sin = Mul (plain_sin, factor)
}
"""

# q [T, n*(nope+rope)], latent [T, r], k_rope [T, rope], cos/sin [B, S, rope/2], k_up [n, nope, r], v_up [n, v, r]
# -> y [T, n*v]. Keys and values are expanded from the latent (arXiv:2405.04434, eq. 9-19); causal within S.
LATENT_ATTENTION = """
<domain: "moedge", opset_import: ["" : 23]>
LatentAttention <num_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank, scale, interleaved>
    (q, latent, k_rope, cos, sin, k_up, v_up) => (y)
{
    flat = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_scalar, flat)
    nope_scalar = Constant <value_int: int = @qk_nope_head_dim> ()
    nope = Reshape (nope_scalar, flat)
    rope_scalar = Constant <value_int: int = @qk_rope_head_dim> ()
    rope = Reshape (rope_scalar, flat)
    rank_scalar = Constant <value_int: int = @kv_lora_rank> ()
    rank = Reshape (rank_scalar, flat)
    batch_sequence = Shape <start = 0, end = 2> (cos)
    head_dim = Add (nope, rope)
    q_shape = Concat <axis = 0> (batch_sequence, heads, head_dim)
    q_rows = Reshape (q, q_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    q_sizes = Concat <axis = 0> (nope, rope)
    q_nope, q_plain = Split <axis = 3> (q_heads, q_sizes)
    q_rope = RotaryEmbedding <interleaved: int = @interleaved> (q_plain, cos, sin)
    query = Concat <axis = 3> (q_nope, q_rope)
    k_shape = Concat <axis = 0> (batch_sequence, one, rope)
    k_rows = Reshape (k_rope, k_shape)
    k_plain = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    k_rotated = RotaryEmbedding <interleaved: int = @interleaved> (k_plain, cos, sin)
    latent_shape = Concat <axis = 0> (batch_sequence, one, rank)
    latent_rows = Reshape (latent, latent_shape)
    latent_heads = Transpose <perm = [0, 2, 1, 3]> (latent_rows)
    k_down = Transpose <perm = [0, 2, 1]> (k_up)
    v_down = Transpose <perm = [0, 2, 1]> (v_up)
    k_nope = MatMul (latent_heads, k_down)
    value = MatMul (latent_heads, v_down)
    all_heads = Shape <start = 0, end = 3> (k_nope)
    k_rope_all_shape = Concat <axis = 0> (all_heads, rope)
    k_rope_all = Expand (k_rotated, k_rope_all_shape)
    key = Concat <axis = 3> (k_nope, k_rope_all)
    attended = Attention <is_causal = 1, scale: float = @scale> (query, key, value)
    rows = Transpose <perm = [0, 2, 1, 3]> (attended)
    value_scalar = Constant <value_int: int = @v_head_dim> ()
    value_dim = Reshape (value_scalar, flat)
    width = Mul (heads, value_dim)
    y_shape = Concat <axis = 0> (flat, width)
    y = Reshape (rows, y_shape)
}
"""

# q [T, n*d], k and v [T, g*d], cos/sin [B, S, d/2] -> y [T, n*d]; g key and value heads serve n query heads
# (arXiv:2305.13245). A query attends to itself and what is before it, `window` tokens in all where that is not 0.
GROUPED_ATTENTION = """
<domain: "moedge", opset_import: ["" : 23]>
GroupedAttention <num_heads, num_key_value_heads, head_dim, scale, interleaved, window> (q, k, v, cos, sin) => (y)
{
    flat = Constant <value_ints = [-1]> ()
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    heads_scalar = Constant <value_int: int = @num_heads> ()
    heads = Reshape (heads_scalar, flat)
    groups_scalar = Constant <value_int: int = @num_key_value_heads> ()
    groups = Reshape (groups_scalar, flat)
    dim_scalar = Constant <value_int: int = @head_dim> ()
    dim = Reshape (dim_scalar, flat)
    batch_sequence = Shape <start = 0, end = 2> (cos)
    q_shape = Concat <axis = 0> (batch_sequence, heads, dim)
    k_shape = Concat <axis = 0> (batch_sequence, groups, dim)
    q_rows = Reshape (q, q_shape)
    k_rows = Reshape (k, k_shape)
    v_rows = Reshape (v, k_shape)
    q_heads = Transpose <perm = [0, 2, 1, 3]> (q_rows)
    k_heads = Transpose <perm = [0, 2, 1, 3]> (k_rows)
    value = Transpose <perm = [0, 2, 1, 3]> (v_rows)
    query = RotaryEmbedding <interleaved: int = @interleaved> (q_heads, cos, sin)
    key = RotaryEmbedding <interleaved: int = @interleaved> (k_heads, cos, sin)
    length_1d = Shape <start = 1, end = 2> (cos)
    length = Squeeze (length_1d, first)
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    steps = Range (zero, length, one)
    query_steps = Unsqueeze (steps, second)
    key_steps = Unsqueeze (steps, first)
    distance = Sub (query_steps, key_steps)
    window = Constant <value_int: int = @window> ()
    no_window = Equal (window, zero)
    reach = Where (no_window, length, window)
    not_ahead = GreaterOrEqual (distance, zero)
    within = Less (distance, reach)
    allowed = And (not_ahead, within)
    attended = Attention <scale: float = @scale> (query, key, value, allowed)
    rows = Transpose <perm = [0, 2, 1, 3]> (attended)
    width = Mul (heads, dim)
    y_shape = Concat <axis = 0> (flat, width)
    y = Reshape (rows, y_shape)
}
"""

# gate_up [T, 2I], the gate's half first -> y [T, I]
SWIGLU = """
<domain: "moedge", opset_import: ["" : 23]>
SwiGLU (gate_up) => (y)
{
    gate, up = Split <axis = -1, num_outputs = 2> (gate_up)
    sigmoid = Sigmoid (gate)
    silu = Mul (gate, sigmoid)
    y = Mul (silu, up)
}
"""

# x [T, H], experts int64 [T, k], weights [T, k], gate_up [E, 2I, H] (rows g0, u0, g1, u1 ...), down [E, H, I]
# -> y [T, H]. Few tokens: only the chosen experts are gathered; many: every expert over all tokens, weighted by 0
# where it was not chosen, which is as exact and never gathers more than the stack.
EXPERTS = """
<domain: "moedge", opset_import: ["" : 23]>
Experts (x, experts, weights, gate_up, down) => (y)
{
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    choices = Size (experts)
    count_1d = Shape <start = 0, end = 1> (gate_up)
    count = Squeeze (count_1d, first)
    few = LessOrEqual (choices, count)
    pair_shape = Constant <value_ints = [0, 0, -1, 2]> ()
    y = If (few) <
        then_branch = sparse () => (float[t, h] y_sparse) {
            column_axes = Constant <value_ints = [1, 3]> ()
            column = Unsqueeze (x, column_axes)
            chosen_gate_up = Gather <axis = 0> (gate_up, experts)
            both = MatMul (chosen_gate_up, column)
            pairs = Reshape (both, pair_shape)
            gate, up = Split <axis = 3, num_outputs = 2> (pairs)
            sigmoid = Sigmoid (gate)
            silu = Mul (gate, sigmoid)
            inner = Mul (silu, up)
            chosen_down = Gather <axis = 0> (down, experts)
            outputs = MatMul (chosen_down, inner)
            rows = Squeeze (outputs, last)
            weight_column = Unsqueeze (weights, last)
            weighted = Mul (rows, weight_column)
            over_choices = Constant <value_ints = [1]> ()
            y_sparse = ReduceSum <keepdims = 0> (weighted, over_choices)
        },
        else_branch = dense () => (float[t, h] y_dense) {
            zero = Constant <value_int = 0> ()
            step = Constant <value_int = 1> ()
            no_weight = Constant <value_float = 0.0> ()
            ids = Range (zero, count, step)
            choice_column = Unsqueeze (experts, last)
            is_expert = Equal (choice_column, ids)
            weight_choice = Unsqueeze (weights, last)
            scattered = Where (is_expert, weight_choice, no_weight)
            choice_axis = Constant <value_ints = [1]> ()
            token_weights = ReduceSum <keepdims = 0> (scattered, choice_axis)
            up_matrices = Transpose <perm = [0, 2, 1]> (gate_up)
            all_both = MatMul (x, up_matrices)
            all_pairs = Reshape (all_both, pair_shape)
            all_gate, all_up = Split <axis = 3, num_outputs = 2> (all_pairs)
            all_sigmoid = Sigmoid (all_gate)
            all_silu = Mul (all_gate, all_sigmoid)
            all_inner_column = Mul (all_silu, all_up)
            all_inner = Squeeze (all_inner_column, last)
            by_expert = Transpose <perm = [1, 0]> (token_weights)
            expert_column = Unsqueeze (by_expert, last)
            weighted_inner = Mul (all_inner, expert_column)
            down_matrices = Transpose <perm = [0, 2, 1]> (down)
            all_outputs = MatMul (weighted_inner, down_matrices)
            y_dense = ReduceSum <keepdims = 0> (all_outputs, first)
        }
    >
}
"""

FUNCTIONS = {
    "Positions": POSITIONS,
    "RotaryAngles": ROTARY_ANGLES,
    "LatentAttention": LATENT_ATTENTION,
    "GroupedAttention": GROUPED_ATTENTION,
    "SwiGLU": SWIGLU,
    "Experts": EXPERTS,
}
