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

# As RotaryAngles, but sequences of more than `original_length` tokens take the long frequencies and factor. The length
# is the last position's: a step of decoding counts all tokens so far.
LONG_ROTARY_ANGLES = """
<domain: "moedge", opset_import: ["" : 23]>
LongRotaryAngles <attention_factor, long_attention_factor, original_length>
    (positions, inv_freq, long_inv_freq) => (cos, sin)
{
    last = Constant <value_ints = [-1]> ()
    original = Constant <value_int: int = @original_length> ()
    final = ReduceMax <keepdims = 0> (positions)
    is_long = GreaterOrEqual (final, original)
    frequencies = Where (is_long, long_inv_freq, inv_freq)
    short_factor = Constant <value_float: float = @attention_factor> ()
    long_factor = Constant <value_float: float = @long_attention_factor> ()
    factor = Where (is_long, long_factor, short_factor)
    float_positions = Cast <to = 1> (positions)
    column = Unsqueeze (float_positions, last)
    angles = Mul (column, frequencies)
    plain_cos = Cos (angles)
    plain_sin = Sin (angles)
    cos = Mul (plain_cos, factor)
    sin = Mul (plain_sin, factor)
}
"""

# positions int64 [B, S], exponents float32 [d/2] (2i/d) -> cos, sin float32 [B, S, d/2]. The base grows with the
# length once it is beyond `original_length`: theta * (factor * length / original - (factor - 1)) ^ (d / (d - 2)).
DYNAMIC_ROTARY_ANGLES = """
<domain: "moedge", opset_import: ["" : 23]>
DynamicRotaryAngles <theta, factor, growth, original_length> (positions, exponents) => (cos, sin)
{
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_float = 1.0> ()
    original = Constant <value_int: int = @original_length> ()
    final = ReduceMax <keepdims = 0> (positions)
    step = Constant <value_int = 1> ()
    length = Add (final, step)
    counted = Max (length, original)
    float_counted = Cast <to = 1> (counted)
    float_original = Cast <to = 1> (original)
    times = Div (float_counted, float_original)
    stretch = Constant <value_float: float = @factor> ()
    stretched = Mul (times, stretch)
    less = Sub (stretch, one)
    ratio = Sub (stretched, less)
    power = Constant <value_float: float = @growth> ()
    grown = Pow (ratio, power)
    base = Constant <value_float: float = @theta> ()
    new_base = Mul (base, grown)
    waves = Pow (new_base, exponents)
    float_positions = Cast <to = 1> (positions)
    column = Unsqueeze (float_positions, last)
    angles = Div (column, waves)
    cos = Cos (angles)
    sin = Sin (angles)
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
_ROTATED_HEADS_AND_MASK = """
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
"""
_HEADS_SIDE_BY_SIDE = """
    rows = Transpose <perm = [0, 2, 1, 3]> (attended)
    width = Mul (heads, dim)
    y_shape = Concat <axis = 0> (flat, width)
    y = Reshape (rows, y_shape)
}
"""
GROUPED_ATTENTION = f"""
<domain: "moedge", opset_import: ["" : 23]>
GroupedAttention <num_heads, num_key_value_heads, head_dim, scale, interleaved, window> (q, k, v, cos, sin) => (y)
{{{_ROTATED_HEADS_AND_MASK}
    attended = Attention <scale: float = @scale> (query, key, value, allowed)
{_HEADS_SIDE_BY_SIDE}}}
"""

# As GroupedAttention, with sinks [n]: a logit of each head that takes its share of the softmax and gives nothing. It is
# the score of one more key, whose value is 0: queries get a channel more, which only that key answers. (As part of the
# mask it would need a mask a head, which onnxruntime 1.23 refuses.)
SINK_ATTENTION = f"""
<domain: "moedge", opset_import: ["" : 23]>
SinkAttention <num_heads, num_key_value_heads, head_dim, scale, interleaved, window>
    (q, k, v, cos, sin, sinks) => (y)
{{{_ROTATED_HEADS_AND_MASK}
    factor = Constant <value_float: float = @scale> ()
    scaled_sinks = Div (sinks, factor)
    sink_shape = Concat <axis = 0> (heads, second, second)
    sink_heads = Reshape (scaled_sinks, sink_shape)
    batch = Shape <start = 0, end = 1> (cos)
    query_channel_shape = Concat <axis = 0> (batch, heads, length_1d, second)
    query_channel = Expand (sink_heads, query_channel_shape)
    wide_query = Concat <axis = 3> (query, query_channel)
    key_channel_shape = Concat <axis = 0> (batch, groups, length_1d, second)
    key_channel = ConstantOfShape <value = float[1] {{0.0}}> (key_channel_shape)
    wide_key = Concat <axis = 3> (key, key_channel)
    nothing_shape = Concat <axis = 0> (batch, groups, second, dim)
    nothing = ConstantOfShape <value = float[1] {{0.0}}> (nothing_shape)
    answer_shape = Concat <axis = 0> (batch, groups, second, second)
    answer = ConstantOfShape <value = float[1] {{1.0}}> (answer_shape)
    sink_key = Concat <axis = 3> (nothing, answer)
    all_keys = Concat <axis = 2> (wide_key, sink_key)
    all_values = Concat <axis = 2> (value, nothing)
    column_shape = Concat <axis = 0> (length_1d, second)
    column = ConstantOfShape <value = int64[1] {{1}}> (column_shape)
    always = Cast <to = 9> (column)
    mask = Concat <axis = 1> (allowed, always)
    attended = Attention <scale: float = @scale> (wide_query, all_keys, all_values, mask)
{_HEADS_SIDE_BY_SIDE}}}
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

# As Experts, with biases gate_up_bias [E, 2I] and down_bias [E, H] and gpt-oss's activation: gate * sigmoid(alpha *
# gate) * (up + 1), the gate at most `limit`, up between -limit and limit.
BIASED_EXPERTS = """
<domain: "moedge", opset_import: ["" : 23]>
BiasedExperts <alpha, limit> (x, experts, weights, gate_up, gate_up_bias, down, down_bias) => (y)
{
    first = Constant <value_ints = [0]> ()
    second = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_float = 1.0> ()
    slope = Constant <value_float: float = @alpha> ()
    high = Constant <value_float: float = @limit> ()
    low = Neg (high)
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
            product = MatMul (chosen_gate_up, column)
            chosen_bias = Gather <axis = 0> (gate_up_bias, experts)
            bias_column = Unsqueeze (chosen_bias, last)
            both = Add (product, bias_column)
            pairs = Reshape (both, pair_shape)
            free_gate, free_up = Split <axis = 3, num_outputs = 2> (pairs)
            gate = Min (free_gate, high)
            up = Clip (free_up, low, high)
            steep = Mul (gate, slope)
            sigmoid = Sigmoid (steep)
            swish = Mul (gate, sigmoid)
            up_1 = Add (up, one)
            inner = Mul (swish, up_1)
            chosen_down = Gather <axis = 0> (down, experts)
            outputs = MatMul (chosen_down, inner)
            plain_rows = Squeeze (outputs, last)
            chosen_down_bias = Gather <axis = 0> (down_bias, experts)
            rows = Add (plain_rows, chosen_down_bias)
            weight_column = Unsqueeze (weights, last)
            weighted = Mul (rows, weight_column)
            y_sparse = ReduceSum <keepdims = 0> (weighted, second)
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
            token_weights = ReduceSum <keepdims = 0> (scattered, second)
            up_matrices = Transpose <perm = [0, 2, 1]> (gate_up)
            all_products = MatMul (x, up_matrices)
            bias_row = Unsqueeze (gate_up_bias, second)
            all_both = Add (all_products, bias_row)
            all_pairs = Reshape (all_both, pair_shape)
            all_free_gate, all_free_up = Split <axis = 3, num_outputs = 2> (all_pairs)
            all_gate = Min (all_free_gate, high)
            all_up = Clip (all_free_up, low, high)
            all_steep = Mul (all_gate, slope)
            all_sigmoid = Sigmoid (all_steep)
            all_swish = Mul (all_gate, all_sigmoid)
            all_up_1 = Add (all_up, one)
            all_inner_column = Mul (all_swish, all_up_1)
            all_inner = Squeeze (all_inner_column, last)
            down_matrices = Transpose <perm = [0, 2, 1]> (down)
            all_plain = MatMul (all_inner, down_matrices)
            down_row = Unsqueeze (down_bias, second)
            all_outputs = Add (all_plain, down_row)
            by_expert = Transpose <perm = [1, 0]> (token_weights)
            expert_column = Unsqueeze (by_expert, last)
            all_weighted = Mul (all_outputs, expert_column)
            y_dense = ReduceSum <keepdims = 0> (all_weighted, first)
        }
    >
}
"""

# packed uint8 [3, n, k / 4] (`export.quantization.pack_int6`) -> codes uint8 [n, k], whose middle is 128, as any
# 8-bit code has. Bundles of before have `SixBitCodes`, of blocks, in their own graphs.
SIX_BIT_PLANES = """
<domain: "moedge", opset_import: ["" : 23]>
SixBitPlanes (packed) => (codes)
{
    two_thirds = Constant <value_ints = [2, 1]> ()
    rows = Shape <start = 1, end = 2> (packed)
    wide = Constant <value_ints = [-1]> ()
    row_shape = Concat <axis = 0> (rows, wide)
    last = Constant <value_ints = [2]> ()
    two = Constant <value = uint8 {2}> ()
    four = Constant <value = uint8 {4}> ()
    six = Constant <value = uint8 {6}> ()
    low_bits = Constant <value = uint8 {15}> ()
    pair = Constant <value = uint8 {3}> ()
    shift = Constant <value = uint8 {96}> ()
    upper_plane, lower_plane = Split <axis = 0> (packed, two_thirds)
    bytes = Reshape (upper_plane, row_shape)
    first = BitwiseAnd (bytes, low_bits)
    second = BitShift <direction = "RIGHT"> (bytes, four)
    first_column = Unsqueeze (first, last)
    second_column = Unsqueeze (second, last)
    both = Concat <axis = 2> (first_column, second_column)
    upper = Reshape (both, row_shape)
    fours = Reshape (lower_plane, row_shape)
    by_two = BitShift <direction = "RIGHT"> (fours, two)
    by_four = BitShift <direction = "RIGHT"> (fours, four)
    by_six = BitShift <direction = "RIGHT"> (fours, six)
    fours_column = Unsqueeze (fours, last)
    two_column = Unsqueeze (by_two, last)
    four_column = Unsqueeze (by_four, last)
    six_column = Unsqueeze (by_six, last)
    all = Concat <axis = 2> (fours_column, two_column, four_column, six_column)
    flat = Reshape (all, row_shape)
    lower = BitwiseAnd (flat, pair)
    moved = BitShift <direction = "LEFT"> (upper, two)
    whole = BitwiseOr (moved, lower)
    codes = Add (whole, shift)
}
"""

# scales uint8 (`export.quantization.FLOAT8`: four bits of exponent, then four of mantissa) -> float32, exactly.
FLOAT8_SCALES = """
<domain: "moedge", opset_import: ["" : 23]>
Float8Scales (packed) => (scales)
{
    four = Constant <value = uint32 {4}> ()
    low_bits = Constant <value = uint32 {15}> ()
    sixteen = Constant <value = uint32 {16}> ()
    one = Constant <value = uint32 {1}> ()
    unit = Constant <value = float {1.9073486328125e-06}> ()
    wide = Cast <to = 12> (packed)
    exponents = BitShift <direction = "RIGHT"> (wide, four)
    fractions = BitwiseAnd (wide, low_bits)
    mantissas = Add (fractions, sixteen)
    powers = BitShift <direction = "LEFT"> (one, exponents)
    whole = Mul (mantissas, powers)
    floats = Cast <to = 1> (whole)
    scales = Mul (floats, unit)
}
"""

FUNCTIONS = {
    "Positions": POSITIONS,
    "RotaryAngles": ROTARY_ANGLES,
    "LongRotaryAngles": LONG_ROTARY_ANGLES,
    "DynamicRotaryAngles": DYNAMIC_ROTARY_ANGLES,
    "LatentAttention": LATENT_ATTENTION,
    "GroupedAttention": GROUPED_ATTENTION,
    "SinkAttention": SINK_ATTENTION,
    "SwiGLU": SWIGLU,
    "Experts": EXPERTS,
    "BiasedExperts": BIASED_EXPERTS,
    "SixBitPlanes": SIX_BIT_PLANES,
    "Float8Scales": FLOAT8_SCALES,
}
