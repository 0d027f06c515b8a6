"""The decoder in plain numpy, one layer at a time: what the canonical graph is compared with at every export.

Written from the papers and apart from the graph: latent attention in its expanded form, experts one token at a
time, nothing shared with `functions.py`. T = tokens of one sequence, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .config import (
    CLAMPED_SWIGLU_ALPHA,
    CLAMPED_SWIGLU_LIMIT,
    GroupedAttentionConfig,
    LatentAttentionConfig,
    MoEConfig,
    RopeConfig,
)
from .load_balance import choose

Array = np.ndarray[Any, Any]
Weights = Callable[[str], Array]


def embed_tokens(weights: Weights, tokens: Array) -> Array:
    """int64 [T] -> float32 [T, H]."""
    rows: Array = weights("embed.weight")[tokens]
    return rows


def run_layer(config: MoEConfig, weights: Weights, layer: int, x: Array) -> Array:
    """One decoder layer over a whole sequence from position 0: float32 [T, H] -> [T, H]."""
    prefix = f"layers.{layer}"
    if layer == 0:
        x = x * np.float32(config.embedding_multiplier)
    h = norm(config, weights, f"{prefix}.attn_norm", x)
    attention = config.attention
    if isinstance(attention, LatentAttentionConfig):
        attended = latent_attention(config, attention, weights, f"{prefix}.attn", h)
    else:
        attended = grouped_attention(config, attention, weights, layer, h)
    x = x + np.float32(config.residual_multiplier) * attended
    h = norm(config, weights, f"{prefix}.mlp_norm", x)
    if layer not in config.moe.layers:
        return x + np.float32(config.residual_multiplier) * gated_mlp(weights, f"{prefix}.mlp", h)
    y = mixture(config, weights, prefix, h)
    if config.moe.shared_intermediate_size:
        shared = gated_mlp(weights, f"{prefix}.shared", h)
        if config.moe.shared_gate:
            shared = shared / (1 + np.exp(-(h @ weights(f"{prefix}.shared.gate.weight").T)))
        y = y + shared
    return x + np.float32(config.residual_multiplier) * y


def run_head(config: MoEConfig, weights: Weights, x: Array) -> Array:
    """float32 [T, H] -> logits [T, vocab]."""
    name = "embed.weight" if config.tie_word_embeddings else "head.weight"
    logits = norm(config, weights, "final_norm", x) @ weights(name).T
    if config.head_bias:
        logits = logits + weights("head.bias")
    scaled: Array = logits / np.float32(config.logits_divisor)
    return scaled


def norm(config: MoEConfig, weights: Weights, name: str, x: Array) -> Array:
    """RMSNorm, or LayerNorm (Ba et al. 2016, arXiv:1607.06450), as the config says."""
    if config.norm == "rms":
        return rms_norm(x, weights(f"{name}.weight"), config.rms_norm_eps)
    centred = x - x.mean(axis=-1, keepdims=True)
    return rms_norm(centred, weights(f"{name}.weight"), config.rms_norm_eps) + weights(f"{name}.bias")


def rms_norm(x: Array, weight: Array, epsilon: float) -> Array:
    """Zhang & Sennrich 2019 (arXiv:1910.07467)."""
    scaled: Array = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + np.float32(epsilon))
    return scaled * weight


def silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-np.clip(x, -80, None)))
    return y


def gated_mlp(weights: Weights, prefix: str, h: Array) -> Array:
    gate, up = np.split(h @ weights(f"{prefix}.gate_up.weight").T, 2, axis=-1)
    y: Array = (silu(gate) * up) @ weights(f"{prefix}.down.weight").T
    return y


def mixture(config: MoEConfig, weights: Weights, prefix: str, h: Array) -> Array:
    """Each token through its own experts, one after the other."""
    gate = config.moe.gate
    inputs = [weights(f"{prefix}.router.bias")] if gate.bias else []
    logits = h @ weights(f"{prefix}.router.weight").T
    if config.moe.router_bias:
        logits = logits + weights(f"{prefix}.router.logits_bias")
    experts, shares = choose(gate, logits, inputs)
    return run_experts(config, weights, prefix, h, experts, shares)


def run_experts(config: MoEConfig, weights: Weights, prefix: str, h: Array, experts: Array, shares: Array) -> Array:
    """The sum of each token's chosen experts by their shares [T, k]; the parity check also chooses for itself."""
    gate_up, down = weights(f"{prefix}.experts.gate_up.weight"), weights(f"{prefix}.experts.down.weight")
    biases: dict[str, Array] = {name: np.zeros((len(down), 1), np.float32) for name in ("gate_up", "down")}
    if config.moe.activation == "clamped_swiglu":
        biases = {name: weights(f"{prefix}.experts.{name}.bias") for name in biases}
    y = np.zeros_like(h)
    for expert in range(config.moe.num_experts):
        tokens, choice = np.nonzero(experts == expert)
        if len(tokens):
            inner = activate(config, h[tokens] @ gate_up[expert].T + biases["gate_up"][expert])
            output = inner @ down[expert].T + biases["down"][expert]
            y[tokens] += shares[tokens, choice, None] * output
    return y


def activate(config: MoEConfig, both: Array) -> Array:
    """[T, 2I] -> [T, I] of an expert, whose gate and up take turns; gpt-oss clamps them and adds 1 to up."""
    gate, up = both[:, 0::2], both[:, 1::2]
    if config.moe.activation == "swiglu":
        return silu(gate) * up
    gate = np.minimum(gate, np.float32(CLAMPED_SWIGLU_LIMIT))
    up = np.clip(up, -CLAMPED_SWIGLU_LIMIT, CLAMPED_SWIGLU_LIMIT)
    slope = np.float32(CLAMPED_SWIGLU_ALPHA)
    y: Array = silu(gate * slope) / slope * (up + 1)
    return y


def grouped_attention(
    config: MoEConfig, attention: GroupedAttentionConfig, weights: Weights, layer: int, h: Array
) -> Array:
    """Attention one query head after the other; queries and keys normed and clipped as the config says."""
    prefix, dim, tokens = f"layers.{layer}.attn", attention.head_dim, len(h)
    parts = {name: _linear(weights, f"{prefix}.{name}", h, attention.qkv_bias) for name in ("q", "k", "v")}
    for name in ("q", "k") if attention.qk_norm != "none" else ():
        x = parts[name].reshape(tokens, -1, dim) if attention.qk_norm == "head" else parts[name]
        normed = rms_norm(x, weights(f"{prefix}.{name}_norm.weight"), config.rms_norm_eps)
        parts[name] = normed.reshape(tokens, -1)
    if attention.clip is not None:
        parts = {name: np.clip(x, -attention.clip, attention.clip) for name, x in parts.items()}
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    allowed = (distance >= 0) & (distance < (attention.windows[layer] or tokens))
    shared = attention.num_heads // attention.num_key_value_heads
    outputs = []
    for head in range(attention.num_heads):
        place = slice(head // shared * dim, (head // shared + 1) * dim)
        query = rotate(config, parts["q"][:, head * dim : (head + 1) * dim])
        scores = query @ rotate(config, parts["k"][:, place]).T * np.float32(attention.scale)
        scores = np.where(allowed, scores, np.float32(-np.inf))
        if attention.sinks:
            sink = np.full((tokens, 1), weights(f"{prefix}.sinks")[head], np.float32)
            shares = softmax(np.concatenate([scores, sink], axis=1))[:, :-1]
        else:
            shares = softmax(scores)
        outputs.append(shares @ parts["v"][:, place])
    return _linear(weights, f"{prefix}.o", np.concatenate(outputs, axis=-1).astype(np.float32), attention.o_bias)


def softmax(scores: Array) -> Array:
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares: Array = shifted / shifted.sum(axis=-1, keepdims=True)
    return shares


def latent_attention(
    config: MoEConfig, attention: LatentAttentionConfig, weights: Weights, prefix: str, h: Array
) -> Array:
    """DeepSeek-V2's attention (arXiv:2405.04434, section 2.1), keys and values expanded by head."""
    tokens, heads, nope = len(h), attention.num_heads, attention.qk_nope_head_dim
    if attention.q_lora_rank is None:
        q = h @ weights(f"{prefix}.q.weight").T
    else:
        q_a = _linear(weights, f"{prefix}.q_a", h, attention.bias)
        q = rms_norm(q_a, weights(f"{prefix}.q_a_norm.weight"), attention.lora_norm_eps)
        q = q @ weights(f"{prefix}.q_b.weight").T
    q = q.reshape(tokens, heads, attention.qk_head_dim)
    kv_a = _linear(weights, f"{prefix}.kv_a", h, attention.bias)
    latent = rms_norm(
        kv_a[:, : attention.kv_lora_rank], weights(f"{prefix}.kv_a_norm.weight"), attention.lora_norm_eps
    )
    k_rope = rotate(config, kv_a[:, attention.kv_lora_rank :])
    causal = np.tril(np.ones((tokens, tokens), bool))
    k_up, v_up = weights(f"{prefix}.k_up.weight"), weights(f"{prefix}.v_up.weight")
    outputs = []
    for head in range(heads):
        query = np.concatenate([q[:, head, :nope], rotate(config, q[:, head, nope:])], axis=-1)
        key = np.concatenate([latent @ k_up[head].T, k_rope], axis=-1)
        shares = softmax(np.where(causal, query @ key.T * np.float32(attention.scale), -np.inf))
        outputs.append(shares @ (latent @ v_up[head].T))
    return _linear(weights, f"{prefix}.o", np.concatenate(outputs, axis=-1).astype(np.float32), attention.bias)


def _linear(weights: Weights, name: str, x: Array, bias: bool) -> Array:
    y: Array = x @ weights(f"{name}.weight").T
    return y + weights(f"{name}.bias") if bias else y


def rotate(config: MoEConfig, x: Array) -> Array:
    """Rotary embedding at positions 0 to T-1 of x [T, dim]; pairs are neighbours or halves."""
    inv_freq, factor = frequencies(config.rope, len(x))
    angles = np.arange(len(x), dtype=np.float32)[:, None] * inv_freq
    cos, sin = np.cos(angles) * np.float32(factor), np.sin(angles) * np.float32(factor)
    first, second = (x[:, 0::2], x[:, 1::2]) if config.rope.interleaved else np.split(x, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    # Which order the pairs end in does not matter as long as queries and keys agree.
    return np.concatenate(rotated, axis=-1)


def frequencies(rope: RopeConfig, length: int) -> tuple[Array, float]:
    """float32 [dim/2] and the factor of cosine and sine, for a sequence of `length` tokens."""
    if rope.kind == "fixed" or length <= rope.original_length:
        return np.array(rope.inv_freq, np.float32), rope.attention_factor
    if rope.kind == "long":
        return np.array(rope.long_inv_freq, np.float32), rope.long_attention_factor
    ratio = rope.factor * length / rope.original_length - (rope.factor - 1)
    base = rope.theta * ratio ** (rope.dim / (rope.dim - 2))
    return (base ** (-np.arange(0, rope.dim, 2) / rope.dim)).astype(np.float32), rope.attention_factor
